"""From files to batches: formats, pictures, prompts, collation. Names resolve lazily; torch is not imported here."""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {
    "Collator": "leaml_plugin.data.collate",
    "Prompts": "leaml_plugin.data.prompts",
    "Turn": "leaml_plugin.data.prompts",
    "check_images": "leaml_plugin.data.images",
    "load_labeled": "leaml_plugin.data.formats",
    "load_unlabeled": "leaml_plugin.data.formats",
    "open_image": "leaml_plugin.data.images",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        value = getattr(importlib.import_module(_EXPORTS[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'leaml_plugin.data' has no attribute {name!r}")
