"""The adapter path: LEAML as a PEFT method, and its files. Importing this module registers the method with PEFT.

Covers: :class:`LeamlConfig` for ``get_peft_model`` and everything that loads PEFT adapters, and the conversions
between adapters and weights (:func:`save_adapter`, :func:`merge`, :func:`diff`, :func:`export_lora`,
:func:`hotswap`).
Does not cover: training without an adapter (``leaml_plugin.selective``).
"""

from __future__ import annotations

from leaml_plugin.tuner import register as _register
from leaml_plugin.tuner.config import LeamlConfig
from leaml_plugin.tuner.convert import (
    apply_delta,
    delta_between,
    diff,
    export_lora,
    hotswap,
    load_delta,
    max_logit_difference,
    merge,
    probe,
    save_adapter,
    selection_of,
)
from leaml_plugin.tuner.layer import LeamlLayer
from leaml_plugin.tuner.model import LeamlModel

_register.register()

__all__ = [
    "LeamlConfig",
    "LeamlLayer",
    "LeamlModel",
    "apply_delta",
    "delta_between",
    "diff",
    "export_lora",
    "hotswap",
    "load_delta",
    "max_logit_difference",
    "merge",
    "probe",
    "save_adapter",
    "selection_of",
]
