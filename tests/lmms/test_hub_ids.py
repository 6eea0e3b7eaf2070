"""The Hub ids themselves, streamed and downloaded from a small Hub on this machine: as by a user with a network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import local_hub
import pytest
import real_schema

from leaml_plugin import splits
from leaml_plugin.lmms import endoscopy, endoscopy_x1, prepare

pytestmark = pytest.mark.slow

ROWS = """
from datasets import load_dataset
from leaml_plugin.lmms import endoscopy, endoscopy_x1

path, kwargs = endoscopy.source()
rows = endoscopy.evaluation_rows(load_dataset(path, **kwargs)["raw"])
print(path, len(rows), rows[0]["image"].size)
path, kwargs = endoscopy_x1.source()
rows = endoscopy_x1.evaluation_rows(load_dataset(path, **kwargs)["test"])
print(path, len(rows), endoscopy_x1.pictures(rows[0])[0].size)
"""


def run(endpoint: str, home: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {
        "HF_ENDPOINT": endpoint,
        "HF_HUB_OFFLINE": "0",
        "HF_DATASETS_OFFLINE": "0",
        "HF_HOME": str(home),
        "NO_PROXY": "127.0.0.1",
        "LEAML_LABEL_FRACTION": "0.2",
    }
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
        timeout=120,
    )


@pytest.fixture(scope="module")
def x1(tmp_path_factory) -> Path:
    return real_schema.write_kvasir_x1(tmp_path_factory.mktemp("x1") / "x1")


def test_data_are_streamed_from_the_hub(kvasir, tmp_path):
    """The same files, byte for byte, as from a local copy; and nothing is left in the Hub's cache."""
    with local_hub.serve({endoscopy.HUB_ID: kvasir}) as (endpoint, log):
        command = ["-m", "leaml_plugin.cli", "data", "endoscopy", "--labels", "0.2", "--output", str(tmp_path / "hub")]
        done = run(endpoint, tmp_path / "home", *command)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("licence: Kvasir-VQA: CC BY-NC 4.0")
    files = [path for _, path, _ in log if path.endswith(".parquet")]
    assert any("/resolve/" in path for path in files)
    assert not list((tmp_path / "home").rglob("*.parquet"))
    prepare.endoscopy_files(tmp_path / "local", data=str(kvasir), labels=0.2)
    made = (tmp_path / "hub", tmp_path / "local")
    names = [sorted(p.relative_to(d) for p in d.rglob("*") if p.is_file()) for d in made]
    assert names[0] == names[1]
    for name in names[0]:
        if name.name != "prepare.json":
            assert (tmp_path / "hub" / name).read_bytes() == (tmp_path / "local" / name).read_bytes(), name


def test_the_tasks_data_come_from_the_hub_and_then_from_its_cache(kvasir, x1, kvasir_dataset, tmp_path, monkeypatch):
    with local_hub.serve({endoscopy.HUB_ID: kvasir, endoscopy_x1.HUB_ID: x1}) as (endpoint, _):
        done = run(endpoint, tmp_path, "-c", ROWS)
    assert done.returncode == 0, done.stderr
    monkeypatch.setenv("LEAML_LABEL_FRACTION", "0.2")
    count = len(endoscopy.evaluation_rows(kvasir_dataset))
    first, second = done.stdout.splitlines()[-2:]
    assert first == f"SimulaMet-HOST/Kvasir-VQA {count} (40, 32)"
    asked = [i for i in range(40) for c in (1, 2, 3) if (i + c) % 2 and splits.is_test(real_schema.picture_name(i))]
    assert second == f"SimulaMet/Kvasir-VQA-x1 {len(asked)} (40, 32)"
    again = run(endpoint, tmp_path, "-c", f"import os; os.environ['HF_HUB_OFFLINE'] = '1'\n{ROWS}")
    assert again.stdout.splitlines()[-2:] == [first, second], again.stderr


def test_what_the_hub_refuses_is_one_sentence(kvasir, tmp_path):
    with local_hub.serve({}) as (endpoint, _):
        done = run(endpoint, tmp_path, "-m", "leaml_plugin.cli", "data", "endoscopy", "--output", str(tmp_path / "out"))
    assert done.returncode == 2
    assert (
        done.stderr.strip()
        .splitlines()[-1]
        .startswith("leaml: SimulaMet-HOST/Kvasir-VQA: the Hub refuses it (status 404); download it with")
    )
    assert not (tmp_path / "out").exists()
