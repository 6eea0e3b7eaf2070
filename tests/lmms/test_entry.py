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
        import json, sys, types
        # lmms_eval/__init__ imports nothing, lmms_eval.models is mid-import when it calls us
        import importlib.util
        spec = importlib.util.find_spec("lmms_eval")
        package = types.ModuleType("lmms_eval.models")
        package.__path__ = [spec.submodule_search_locations[0] + "/models"]
        sys.modules["lmms_eval.models"] = package
        import lmms_eval.models.registry_v2
        import leaml_plugin.lmms.entry as entry
        entry.guard()
        manifest = entry.register()
        heavy = [n for n in ("torch", "numpy", "lmms_eval.tasks", "transformers") if n in sys.modules]
        print(json.dumps([manifest.model_id, heavy]))
        """
    )
    assert json.loads(out.splitlines()[-1]) == ["leaml", []]


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


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--tasks", "leaml_sports"], ["--tasks", "leaml_sports,*/"]),
        (["--tasks=leaml_sports"], ["--tasks=leaml_sports,*/"]),
        (["--tasks", "mine"], ["--tasks", "mine"]),
        (["--tasks", "leaml_mine"], ["--tasks", "leaml_mine"]),
        (["--tasks", "leaml_text"], ["--tasks", "leaml_text"]),
        (["--output_path", "leaml_sports"], ["--output_path", "leaml_sports"]),
    ],
)
def test_a_directory_called_like_a_task_is_no_task_directory(tmp_path, monkeypatch, words, wanted):
    """But one that holds task files is."""
    for name in ("leaml_sports", "leaml_mine", "mine"):
        (tmp_path / name).mkdir()
    (tmp_path / "leaml_mine" / "task.yaml").write_text("task: x")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lmms-eval", *words])
    entry.prefer_task_to_directory()
    assert sys.argv == ["lmms-eval", *wanted]


def test_the_pattern_adds_no_task():
    from lmms_eval.utils import pattern_match

    assert list(pattern_match(["leaml_sports", "*/"], ["leaml_sports", "leaml_sports_text"])) == ["leaml_sports"]


class Point:
    """An entry point with this payload, or one whose loading fails."""

    name, value = "theirs", "theirs:register"

    def __init__(self, payload):
        self.payload = payload

    def load(self):
        if isinstance(self.payload, Exception):
            raise self.payload
        return self.payload


def fails():
    raise ValueError("no such model")


@pytest.mark.parametrize("payload", [ImportError("gone"), fails, 3, lambda: 3, [3]])
def test_a_plugin_that_fails_takes_no_other_along(payload, capsys):
    from lmms_eval.models import registry_v2

    module = types.SimpleNamespace(ModelRegistryV2=type("Registry", (registry_v2.ModelRegistryV2,), {}))
    good = registry_v2.ModelManifest(model_id="good", simple_class_path="a.b")
    module.ModelRegistryV2._select_entry_points = lambda self, group: [Point(payload), Point(lambda: good)]
    with pytest.raises((ImportError, ValueError, TypeError)):
        module.ModelRegistryV2().load_entrypoint_manifests()
    entry._load_each_alone(module)
    entry._load_each_alone(module)
    registry = module.ModelRegistryV2()
    registry.load_entrypoint_manifests()
    assert registry.list_canonical_model_ids() == ["good"]
    assert "plugin 'theirs' (theirs:register) failed and is left out" in capsys.readouterr().err


class FakeManager:
    """Finds a task under each name in the path that it is given."""

    def initialize_tasks(self, include_path=None, include_defaults=True):
        return {name: include_path for name in include_path or ()} | {"defaults": include_defaults}


@pytest.fixture
def wrapped():
    class Manager(FakeManager):
        initialize_tasks = FakeManager.initialize_tasks

    module = types.SimpleNamespace(TaskManager=Manager)
    entry._wrap(module)
    entry._wrap(module)  # twice must be once
    return Manager()


def test_our_tasks_come_after_the_users(wrapped):
    ours = entry.task_index()
    assert wrapped.initialize_tasks() == {**ours, "defaults": True}
    mine = ["leaml_sports", "mine"]
    assert wrapped.initialize_tasks(mine) == {**ours, "leaml_sports": mine, "mine": mine, "defaults": True}


def test_a_manager_without_defaults_stays_without_us(wrapped):
    assert wrapped.initialize_tasks(["mine"], include_defaults=False) == {"mine": ["mine"], "defaults": False}


def test_our_index_is_the_one_that_lmms_eval_makes():
    from lmms_eval.tasks import TaskManager

    made = TaskManager("WARNING", entry.tasks_directory(), include_defaults=False)
    assert entry.task_index() == made.task_index
    assert {entry["type"] for entry in made.task_index.values()} == {"task", "group"}


def test_every_task_file_is_listed_with_a_description():
    from leaml_plugin.lmms.tasks import tasks

    found = dict(tasks())
    assert {"leaml_endoscopy", "leaml_sports", "leaml_endoscopy_synthetic", "leaml_sports_synthetic"} <= set(found)
    assert all(about for about in found.values())
    files = sorted(path.stem for path in Path(entry.tasks_directory()).rglob("*.yaml"))
    assert files == sorted(found)
