"""From files to batches: formats, pictures, prompts, collation. Names resolve lazily; torch is not imported here."""

from __future__ import annotations

from leaml_plugin.lazy import attributes

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

__getattr__ = attributes(__name__, _EXPORTS)
