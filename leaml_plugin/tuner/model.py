"""LEAML as a PEFT tuner: puts :class:`~leaml_plugin.tuner.layer.Linear` around the selected Linears of a model."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, get_quantization_kwargs
from torch import nn

from leaml_plugin import ops
from leaml_plugin.errors import LeamlError
from leaml_plugin.selection import check_base, fingerprint, is_linear, linear_shape, refuse_shared
from leaml_plugin.tuner.config import LeamlConfig
from leaml_plugin.tuner.layer import LeamlLayer, Linear


def _names_into_forward(target: nn.Module, args: tuple, kwargs: dict, adapter_names: list[str]) -> tuple:
    return args, {**kwargs, "adapter_names": adapter_names}


class LeamlModel(BaseTuner):
    """What ``get_peft_model(model, LeamlConfig(...))`` makes. See :class:`LeamlConfig` and ``docs/adapters.md``.

    Raises :class:`LeamlError` where a target is no Linear, is tied to another weight, or differs (in shape or in
    fingerprint) from the one that the adapter or selection was made for.
    """

    prefix: str = "leaml_"
    tuner_layer_cls = LeamlLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    @staticmethod
    def _check_target_module_exists(peft_config: LeamlConfig, key: str) -> Any:
        if peft_config._listed:
            return key in peft_config.row_counts or key in peft_config.column_counts
        return BaseTuner._check_target_module_exists(peft_config, key)

    def _prepare_model(self, peft_config: LeamlConfig, model: nn.Module) -> None:
        """Check the whole adapter against the model before the first layer is touched."""
        if not peft_config._listed:
            return
        modules = {
            name: module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
            for name, module in model.named_modules()
        }
        counts = peft_config.row_counts | peft_config.column_counts
        missing = [name for name in counts if name not in modules]
        if missing:
            raise LeamlError(
                f"{len(missing)} of the {len(counts)} modules that the adapter tunes are not in the model (first: "
                f"{missing[0]}): it was made for another base model."
            )
        for name in counts:
            if not is_linear(modules[name]) and not hasattr(modules[name], "in_features"):
                continue  # reported with its type when its turn comes
            size = linear_shape(modules[name])[0 if name in peft_config.row_counts else 1]
            wanted = peft_config.sizes.get(name, size)
            if wanted != size:
                raise LeamlError(
                    f"{name} has {size} neurons, the adapter was made for {wanted}: it belongs to another base model."
                )
        if any(m.merged for m in model.modules() if isinstance(m, BaseTunerLayer)):
            return  # the weights are not the base's now
        if peft_config._selection is not None:
            peft_config.base = fingerprint({name: modules[name] for name in counts})
        else:
            check_base(peft_config.base, {name: modules[name] for name in counts}, "the adapter")

    def _create_and_replace(
        self,
        peft_config: LeamlConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs: Any,
    ) -> None:
        if current_key is None:
            raise ValueError("Current Key shouldn't be `None`")
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not is_linear(base) and not (hasattr(base, "in_features") and hasattr(base, "out_features")):
            raise LeamlError(
                f"target {current_key} is a {type(base).__name__}; LEAML tunes Linear and Conv1D layers "
                "(narrow target_modules, or list the module in exclude_modules)."
            )
        if not isinstance(target, BaseTunerLayer):
            refuse_shared(self.model, current_key)
        axis, index = self._neurons(peft_config, current_key, base)
        options = {"name": current_key, "init_weights": peft_config.init_weights}
        if isinstance(target, LeamlLayer):
            target.update_layer(adapter_name, axis, index, inference_mode=peft_config.inference_mode, **options)
            return
        new = Linear(target, adapter_name, axis, index, **options, **get_quantization_kwargs(self), **optional_kwargs)
        if adapter_name not in self.active_adapters:
            new.requires_grad_(False)
        self._replace_module(parent, target_name, new, target)

    @staticmethod
    def _neurons(config: LeamlConfig, name: str, base: nn.Module) -> tuple[int, torch.Tensor]:
        """Which neurons of a module the adapter tunes; recorded in the config where they are drawn here."""
        chosen = config._selection
        if chosen is not None:
            return (0, chosen.rows[name]) if name in chosen.rows else (1, chosen.columns[name])
        if config._listed:  # a saved adapter: the indices follow with its weights
            axis = 0 if name in config.row_counts else 1
            return axis, torch.arange((config.row_counts | config.column_counts)[name])
        size = linear_shape(base)[0]
        seed = int.from_bytes(hashlib.sha256(f"{config.seed} {name}".encode()).digest()[:8], "little") >> 1
        order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
        index = order[: ops.selected_count(config.density, size)].sort().values
        config.row_counts[name], config.sizes[name] = len(index), size
        config.base |= fingerprint({name: base})
        config.criterion = "random"
        return 0, index

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """LoRA's, by which people look for it: always refused."""
        raise LeamlError(
            "LEAML adapters cannot be combined by weights; activate several together with set_adapter([...]), "
            "or merge them with merge_and_unload(adapter_names=[...])."
        )

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Mixed batches: hand ``adapter_names`` of a forward call to every adapted layer, as PEFT's LoRA does."""
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        layers = [m for m in self.modules() if isinstance(m, LeamlLayer)]
        known = {name for layer in layers for name in layer.leaml_delta}
        unknown = sorted({name for name in names if name != "__base__"} - known)
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        beams = kwargs.get("num_beams")
        if isinstance(beams, int) and beams > 1:
            names = [name for name in names for _ in range(beams)]
        hook = partial(_names_into_forward, adapter_names=list(names))
        handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
