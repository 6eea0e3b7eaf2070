"""Where the tasks keep what they make: converted and generated data sets, built once, found again by their name.

Covers: the cache directory (``LEAML_CACHE``, else ``leaml`` in the user's cache directory) and building an entry so
that a killed or concurrent build never leaves half of one behind.
Does not cover: the caches of ``datasets`` and ``huggingface_hub``, which keep to their own variables.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from leaml_plugin.errors import LeamlError


def cache_root() -> Path:
    """``$LEAML_CACHE``, else ``$XDG_CACHE_HOME/leaml``, else ``~/.cache/leaml``."""
    if own := os.environ.get("LEAML_CACHE"):
        return Path(own).expanduser().resolve()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "leaml"


def build_once(name: str, build: Callable[[Path], None]) -> Path:
    """The directory ``name`` of the cache, made by ``build(directory)`` where it is not there yet.

    ``name`` must say everything the content depends on. Several processes may ask at once: each builds aside and the
    first to finish is kept.
    """
    target = cache_root() / name
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise LeamlError(
            f"{target.parent}: cannot be written ({error.strerror}); set LEAML_CACHE to a directory that can."
        ) from error
    try:
        build(aside)
        try:
            aside.rename(target)
        except OSError:
            if not target.is_dir():  # otherwise another process was first, with the same content
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target
