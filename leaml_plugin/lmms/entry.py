"""The entry point of group ``lmms_eval.models``: registers the model ``leaml`` and the directory of its tasks.

Covers: the model manifest, and the tasks, for which lmms-eval 0.7 has no entry point. Its evaluator imports
``lmms_eval.models``, and with it this module, before it builds a ``TaskManager``; so this module wraps
``TaskManager.initialize_tasks`` once, adding our directory, as soon as ``lmms_eval.tasks`` has been imported.
Does not cover: commands of lmms-eval that never import its models (``lmms-eval tasks list``, the server, the web
interface); ``leaml tasks`` and ``leaml eval`` stand in for them.

Imports neither torch nor ``lmms_eval.tasks``. Never raises: lmms-eval drops the models of every plugin when one
plugin's entry point fails.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.util
import sys
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

_TASKS_MODULE = "lmms_eval.tasks"
_MARK = "_leaml_tasks"


def register() -> Any:
    """The manifest of the model ``leaml``, or an empty list (with a warning) where registration is not possible."""
    try:
        add_tasks()
        return manifest()
    except Exception as error:  # whatever goes wrong here would take every other plugin's models along
        warnings.warn(f"leaml: not registered with lmms-eval: {error!r}", RuntimeWarning, stacklevel=2)
        return []


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
    elif module is not None:
        warnings.warn(
            "leaml: lmms_eval.tasks imports the models before its TaskManager exists, so the leaml tasks are missing; "
            "use lmms-eval>=0.7.3,<0.8, or leaml eval.",
            RuntimeWarning,
            stacklevel=2,
        )
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def _wrap(module: ModuleType) -> None:
    original: Callable[..., dict] = module.TaskManager.initialize_tasks
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def initialize_tasks(self: Any, include_path: Any = None, include_defaults: bool = True) -> dict:
        paths = [include_path] if isinstance(include_path, str) else list(include_path or [])
        if include_defaults:
            # appended: lmms-eval lets the earlier path win, so that a user's own --include_path overrides ours
            paths += [path for path in (tasks_directory(),) if path not in paths]
        return original(self, include_path=paths or None, include_defaults=include_defaults)

    setattr(initialize_tasks, _MARK, True)
    module.TaskManager.initialize_tasks = initialize_tasks


class _AfterImport(importlib.abc.MetaPathFinder):
    """Wraps the task manager right after ``lmms_eval.tasks`` has been executed, then is gone from the import path."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != _TASKS_MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _wrap(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
