"""Finding and loading the compiled kernels; choosing and forcing a backend.

Covers: ``_C.abi3.so`` (CPU) and the optional ``_C_cuda.abi3.so``, loaded on the first call of an op and never built
here; a failure is kept with its cause and told once, and the reference twins take over.
Does not cover: the ops themselves (``_library``, ``reference``) and building (``setup.py``).

The environment variable ``LEAML_OPS`` chooses: ``auto`` (the default), ``native`` (a missing library is an error) or
``reference`` (nothing compiled is used).
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from leaml_plugin.errors import unknown_name

BACKENDS = ("auto", "native", "reference")
PACKAGE = Path(__file__).resolve().parent.parent
LIBRARIES = {"cpu": PACKAGE / "_C.abi3.so", "cuda": PACKAGE / "_C_cuda.abi3.so"}

_forced: str | None = None
_outcome: dict[str, str | None] = {}  # device kind -> None where loaded, else why not
_told: set[str] = set()


def _requested() -> str:
    name = _forced or os.environ.get("LEAML_OPS", "auto")
    if name not in BACKENDS:
        raise unknown_name("LEAML_OPS backend", name, BACKENDS)
    return name


def _load(kind: str) -> str | None:
    """Load one library once; the cause of a failure, or None."""
    if kind not in _outcome:
        path = LIBRARIES[kind]
        if not path.exists():
            _outcome[kind] = f"{path.name} was not built (pip install --no-build-isolation -e . builds it)"
        else:
            try:
                torch.ops.load_library(str(path))
                _outcome[kind] = None
            except (OSError, RuntimeError) as error:  # missing symbol or library; ABI newer than this torch
                _outcome[kind] = f"{path.name} did not load: {error.__cause__ or error}"
    return _outcome[kind]


def loaded(device: torch.device) -> bool:
    """Whether compiled kernels for ``device`` are in this process. Loads nothing."""
    return _outcome.get(device.type, "not tried") is None


def native(device: torch.device) -> bool:
    """Whether calls for ``device`` go to compiled code. Warns once where it is missing though it was expected."""
    requested = _requested()
    if requested == "reference":
        return False
    kind = device.type
    if kind not in LIBRARIES:
        cause = f"there are no compiled kernels for {kind} devices"
    else:
        cause = _load(kind)
    if cause is None:
        return True
    if requested == "native":
        raise RuntimeError(f"LEAML_OPS=native, but {cause}")
    if kind not in _told:
        _told.add(kind)
        warnings.warn(f"leaml_plugin uses its slower reference kernels on {kind}: {cause}", stacklevel=3)
    return False


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force ``auto``, ``native`` or ``reference`` inside a ``with`` block (tests, benchmarks)."""
    global _forced
    if name not in BACKENDS:
        raise unknown_name("LEAML_OPS backend", name, BACKENDS)
    previous, _forced = _forced, name
    try:
        yield
    finally:
        _forced = previous


def build_info() -> dict[str, Any]:
    """What was built and what runs: for ``leaml doctor`` and for result files. Loads, but never builds.

    Keys: ``cpu`` and ``cuda`` (``{"built", "loaded", "cause", "path"}`` each), ``backend`` (as requested),
    ``torch``, ``torch_cuda``, ``threads``, and ``cpu_features`` (None without the native helper module).
    """
    info: dict[str, Any] = {"backend": _requested(), "torch": torch.__version__, "torch_cuda": torch.version.cuda}
    for kind, path in LIBRARIES.items():
        cause = _load(kind)
        info[kind] = {"built": path.exists(), "loaded": cause is None, "cause": cause, "path": str(path)}
    info["threads"] = torch.get_num_threads()
    info["cpu_features"] = None
    if importlib.util.find_spec("leaml_plugin._native") is not None:
        from leaml_plugin import _native

        info["cpu_features"] = _native.cpu_features()
    return info
