"""The entry hook: found, quick, harmless, and never the reason why another plugin's models are missing."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest

from leaml_plugin.lmms import entry

pytest.importorskip("lmms_eval")


def python(code: str, **environment: str) -> str:
    """Run code in a fresh interpreter, outside the checkout."""
    import os

    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        cwd="/",
        env={**os.environ, **environment},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_and_registering_is_light():
    """No torch, no lmms_eval.tasks; the registry module itself is lmms-eval's, already imported when we are called."""
    out = python(
        """
        import json, sys, time, types
        # lmms_eval/__init__ imports nothing, lmms_eval.models is mid-import when it calls us
        import importlib.util
        spec = importlib.util.find_spec("lmms_eval")
        package = types.ModuleType("lmms_eval.models")
        package.__path__ = [spec.submodule_search_locations[0] + "/models"]
        sys.modules["lmms_eval.models"] = package
        import lmms_eval.models.registry_v2
        began = time.perf_counter()
        import leaml_plugin.lmms.entry as entry
        manifest = entry.register()
        took = time.perf_counter() - began
        print(json.dumps([took, manifest.model_id, [n for n in ("torch", "lmms_eval.tasks") if n in sys.modules]]))
        """
    )
    took, name, heavy = json.loads(out.splitlines()[-1])
    assert name == "leaml"
    assert heavy == []
    assert took < 0.5, "ten times the fifty milliseconds it takes alone: this machine may be busy"


def test_failure_becomes_a_warning_and_no_manifest(monkeypatch):
    def broken():
        raise OSError("no such thing")

    monkeypatch.setattr(entry, "add_tasks", broken)
    with pytest.warns(RuntimeWarning, match="not registered with lmms-eval"):
        assert entry.register() == []


def test_half_imported_task_module_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "lmms_eval.tasks", types.ModuleType("lmms_eval.tasks"))
    with pytest.warns(RuntimeWarning, match="lmms-eval>=0.7.3"):
        entry.add_tasks()


class FakeManager:
    def initialize_tasks(self, include_path=None, include_defaults=True):
        return {"paths": include_path, "defaults": include_defaults}


@pytest.fixture
def wrapped():
    class Manager(FakeManager):
        initialize_tasks = FakeManager.initialize_tasks

    module = types.SimpleNamespace(TaskManager=Manager)
    entry._wrap(module)
    entry._wrap(module)  # twice must be once
    return Manager()


def test_our_directory_comes_after_the_users(wrapped):
    ours = entry.tasks_directory()
    assert wrapped.initialize_tasks()["paths"] == [ours]
    assert wrapped.initialize_tasks("mine")["paths"] == ["mine", ours]
    assert wrapped.initialize_tasks(["mine", ours])["paths"] == ["mine", ours]


def test_a_manager_without_defaults_stays_without_us(wrapped):
    assert wrapped.initialize_tasks("mine", include_defaults=False)["paths"] == ["mine"]


def test_every_task_file_is_listed_with_a_description():
    from leaml_plugin.lmms.tasks import tasks

    found = dict(tasks())
    assert {"leaml_endoscopy", "leaml_sports", "leaml_endoscopy_synthetic", "leaml_sports_synthetic"} <= set(found)
    assert all(about for about in found.values())
    files = sorted(path.stem for path in Path(entry.tasks_directory()).rglob("*.yaml"))
    assert files == sorted(found)
