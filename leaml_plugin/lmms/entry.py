"""What ties this package to lmms-eval: the model ``leaml`` and the directory of its tasks, known without a flag.

Covers: the model manifest (entry-point group ``lmms_eval.models``), and the tasks, for which lmms-eval 0.7 has no
entry point: ``TaskManager.initialize_tasks`` is wrapped once, adding ours to what it finds.

Two moments. :func:`register` runs when lmms-eval reads its entry points, which its evaluator does before it builds a
``TaskManager``. lmms-eval stops at the first plugin that fails there, and ``lmms-eval tasks``, its server and its web
interface never read them; so :func:`guard` runs before all of them, from the start-up hook (``leaml_plugin_startup``),
in processes whose command line is lmms-eval's and in no others. It makes every plugin load by itself.

Does not cover: a script of one's own that calls ``lmms_eval.evaluator`` where another plugin fails
(``leaml_plugin.lmms.run.evaluate`` does).

Imports neither torch nor ``lmms_eval.tasks``. Never raises: lmms-eval drops the models of every plugin when one
plugin's entry point fails.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

_TASKS_MODULE = "lmms_eval.tasks"
_REGISTRY_MODULE = "lmms_eval.models.registry_v2"
_MARK = "_leaml"


def register() -> Any:
    """The manifest of the model ``leaml``, or an empty list (with a warning) where registration is not possible."""
    try:
        add_tasks()
        prefer_task_to_directory()
        return manifest()
    except Exception as error:  # whatever goes wrong here would take every other plugin's models along
        warnings.warn(f"leaml: not registered with lmms-eval: {error!r}", RuntimeWarning, stacklevel=2)
        return []


def guard() -> None:
    """Before lmms-eval is imported: add our tasks, and keep one plugin's failure from hiding the others'."""
    try:
        add_tasks()
        if _REGISTRY_MODULE not in sys.modules:
            _after_import(_REGISTRY_MODULE, _load_each_alone)
    except Exception as error:  # a start-up hook must not be the reason why a command fails
        warnings.warn(f"leaml: not prepared for lmms-eval: {error!r}", RuntimeWarning, stacklevel=2)


def manifest() -> Any:
    """What lmms-eval needs to find the model class; the class itself is imported only when it is asked for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="leaml", chat_class_path="leaml_plugin.lmms.model.Leaml")


def tasks_directory() -> str:
    """The directory with the task files: ``tasks/`` in a checkout, ``leaml_plugin/tasks`` once installed."""
    spec = importlib.util.find_spec("leaml_plugin.tasks")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("leaml_plugin.tasks is not installed: pip install leaml_plugin, or pip install -e .")
    return next(iter(spec.submodule_search_locations))


def add_tasks() -> None:
    """Make every ``TaskManager`` index our tasks, now or once ``lmms_eval.tasks`` has been imported."""
    module = sys.modules.get(_TASKS_MODULE)
    if module is not None and hasattr(module, "TaskManager"):
        _wrap(module)
    elif module is None:
        _after_import(_TASKS_MODULE, _wrap)
    elif not getattr(module, _MARK, False):  # mid-import, and not by way of our own hook
        warnings.warn(
            "leaml: lmms_eval.tasks imports the models before its TaskManager exists, so the leaml tasks are missing; "
            "use lmms-eval>=0.7.3,<0.8, or leaml eval.",
            RuntimeWarning,
            stacklevel=2,
        )


def task_index() -> dict[str, dict[str, Any]]:
    """What lmms-eval's ``TaskManager`` would find in our directory, without parsing its files.

    lmms-eval reads each file, with all that it includes, to learn a name and whether it names a task or a group: 75 ms
    of processor time for ours, and as much again with each manager. A file of ours is called like its task or group.
    """
    index = {}
    for path in sorted(Path(tasks_directory()).glob("*/*.yaml")):
        group = "\ngroup:" in "\n" + path.read_text(encoding="utf-8")
        index[path.stem] = {"type": "group", "task": -1} if group else {"type": "task"}
        index[path.stem]["yaml_path"] = str(path)
    return index


def prefer_task_to_directory() -> None:
    """``lmms-eval --tasks leaml_sports`` means the task, also where a directory of that name lies here.

    lmms-eval takes a directory of task files for ``--tasks`` and looks for one first; a results directory called like
    the task would leave it with nothing to do. Where the directory holds no task file a pattern that matches no task
    is added to the name, which then is no directory's, before lmms-eval reads its command line.
    """
    for position, word in enumerate(sys.argv):
        option, equals, name = word.partition("=") if word.startswith("--tasks=") else ("", "", word)
        if not equals and (position == 0 or sys.argv[position - 1] != "--tasks"):
            continue
        if not name.startswith("leaml_") or not os.path.isdir(name):
            continue
        if not any(file.endswith(".yaml") for file in os.listdir(name)):
            print(f"leaml: there is a directory {name} here; the task of that name is meant.", file=sys.stderr)
            sys.argv[position] = f"{option}{equals}{name},*/"


def _wrap(module: ModuleType) -> None:
    original: Callable[..., dict] = module.TaskManager.initialize_tasks
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def initialize_tasks(self: Any, include_path: Any = None, include_defaults: bool = True) -> dict:
        found = original(self, include_path=include_path, include_defaults=include_defaults)
        # lmms-eval lets the earlier path win; ours is the last, so that a user's own --include_path overrides it
        return {**task_index(), **found} if include_defaults else found

    setattr(initialize_tasks, _MARK, True)
    module.TaskManager.initialize_tasks = initialize_tasks


# ------------------------------------------------------------------------------------------- other plugins' failures


def _load_each_alone(module: ModuleType) -> None:
    """lmms-eval's registry reads all entry points in one go: hand it each wrapped, so that a failure stays its own."""
    original: Callable[..., list] = module.ModelRegistryV2._select_entry_points
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def select(self: Any, group: str) -> list:
        return [_Alone(point, self._coerce_payload_to_manifests) for point in original(self, group)]

    setattr(select, _MARK, True)
    module.ModelRegistryV2._select_entry_points = select


class _Alone:
    """An entry point whose failure is a warning, and no models."""

    def __init__(self, point: Any, manifests: Callable[[Any], list]):
        self.name, self._point, self._manifests = point.name, point, manifests

    def load(self) -> list:
        try:
            return self._manifests(self._point.load())
        except Exception as error:  # what a stranger's plugin raises can be anything
            print(
                f"leaml: lmms-eval's plugin {self.name!r} ({self._point.value}) failed and is left out: {error!r}",
                file=sys.stderr,
            )
            return []


# -------------------------------------------------------------------------------------------------- after an import


def _after_import(name: str, then: Callable[[ModuleType], None]) -> None:
    if not any(isinstance(finder, _AfterImport) and finder.name == name for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport(name, then))


class _AfterImport(importlib.abc.MetaPathFinder):
    """Calls ``then`` with a module right after it has been executed, and is gone from the import path before that."""

    def __init__(self, name: str, then: Callable[[ModuleType], None]):
        self.name, self._then = name, then

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            setattr(module, _MARK, True)
            execute(module)
            self._then(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
