"""LEAML as a tuner of ms-swift (4.x), through its tuner mapping.

    LEAML_SELECTION=runs/endo/selection.safetensors \\
    swift sft --model Qwen/Qwen2.5-VL-3B-Instruct --dataset train.jsonl \\
        --external_plugins examples/ms_swift_plugin.py --tuner_type leaml

ms-swift imports this file, and finds ``leaml`` in its ``tuners_map``. ``LEAML_SELECTION`` names a saved selection;
without it ``LEAML_DENSITY`` (default 0.05) of each language-model Linear's rows are drawn at random, the control.
Checkpoints are ordinary PEFT adapters.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from peft import get_peft_model
from swift.tuner_plugin import PeftTuner, tuners_map

from leaml_plugin import LeamlConfig, models


class LeamlTuner(PeftTuner):
    """Saving and loading are PeftTuner's; importing LeamlConfig has made the method known to PEFT."""

    @staticmethod
    def prepare_model(args: Any, model: torch.nn.Module) -> torch.nn.Module:
        if path := os.environ.get("LEAML_SELECTION"):
            config = LeamlConfig(selection=path)
        else:
            density = float(os.environ.get("LEAML_DENSITY", "0.05"))
            config = LeamlConfig(target_modules=list(models.target_linears(model)), density=density)
        return get_peft_model(model, config)


tuners_map["leaml"] = LeamlTuner
