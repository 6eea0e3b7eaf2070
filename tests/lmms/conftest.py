"""Small copies of the real data sets, and one tiny model, for all tests of the lmms-eval plugin."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import real_schema


@pytest.fixture(scope="session")
def kvasir(tmp_path_factory) -> Path:
    return real_schema.write_kvasir(tmp_path_factory.mktemp("kvasir") / "data set", pictures=40)


@pytest.fixture(scope="session")
def sportu(tmp_path_factory) -> Path:
    return real_schema.write_sportu(tmp_path_factory.mktemp("sportu") / "SPORTU", clips=60)


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Tiny models gain nothing from a second thread, and lose much where other processes want it."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch, tmp_path_factory):
    for name in ("LEAML_ENDOSCOPY_DATA", "LEAML_SPORTS_DATA", "LEAML_PROMPTS", "LEAML_LABEL_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LEAML_CACHE", str(tmp_path_factory.getbasetemp() / "leaml-cache"))


@pytest.fixture(scope="session")
def kvasir_dataset(kvasir):
    from datasets import load_dataset

    from leaml_plugin.lmms import endoscopy

    path, kwargs = endoscopy.source(str(kvasir))
    return load_dataset(path, **kwargs)["raw"]
