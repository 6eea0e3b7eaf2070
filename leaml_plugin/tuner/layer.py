"""The adapter on one Linear: ``base(x)`` plus the delta of the selected neurons.

Rows: ``y[..., index] += x @ delta.T`` with delta ``[k, in]``. Columns: ``y += x[..., index] @ delta`` with delta
``[k, out]``. The base module is only called, never read, so it may be quantised, hooked or of any class; reading its
weight is left to merging.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn
from torch.nn import functional as F

from leaml_plugin.errors import LeamlError
from leaml_plugin.selection import is_conv1d, linear_shape


class IndexDict(BufferDict):
    """Neuron indices by adapter name: saved with the adapter, checked against the layer when loaded."""

    def __init__(self) -> None:
        super().__init__(persistent=True)
        self.limits: dict[str, tuple[str, int]] = {}  # adapter -> what the layer is called, how many neurons it has

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for adapter, (name, size) in self.limits.items():
            index = state_dict.get(prefix + adapter)
            if index is not None and index.numel() and (int(index.min()) < 0 or int(index.max()) >= size):
                raise LeamlError(
                    f"the adapter tunes neuron {int(index.max())} of {name}, which has {size}: "
                    "it was made for another base model."
                )
        super()._load_from_state_dict(state_dict, prefix, *args)


class LeamlLayer(BaseTunerLayer):
    """Per adapter: ``leaml_delta`` ``[k, fan]`` (trainable), ``leaml_index`` int64 ``[k]``, ``leaml_axis`` 0 or 1."""

    adapter_layer_names = ("leaml_delta",)
    other_param_names = ("leaml_index", "leaml_axis")

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        self.base_layer = base_layer
        self.leaml_delta = nn.ParameterDict({})
        self.leaml_index = IndexDict()
        self.leaml_axis: dict[str, int] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._before_merge: dict[str, Tensor] = {}
        self.kwargs = kwargs
        self.out_features, self.in_features = linear_shape(self.get_base_layer())
        self.quantization_backend = resolve_quantization_backend(
            self.get_base_layer(), get_apply_tensor_subclass=kwargs.get("get_apply_tensor_subclass")
        )

    def update_layer(
        self,
        adapter_name: str,
        axis: int,
        index: Tensor,
        *,
        name: str = "the layer",
        init_weights: bool = True,
        inference_mode: bool = False,
    ) -> None:
        """Add or replace the adapter ``adapter_name`` on neurons ``index`` (rows for axis 0, columns for 1)."""
        size, fan = (self.out_features, self.in_features)[:: 1 if axis == 0 else -1]
        if index.numel() and int(index.max()) >= size:
            raise LeamlError(f"{('row', 'column')[axis]} {int(index.max())} of {name} is out of range, it has {size}.")
        delta = torch.zeros(index.numel(), fan) if init_weights else 0.02 * torch.randn(index.numel(), fan)
        self.leaml_delta[adapter_name] = nn.Parameter(delta)
        self.leaml_index[adapter_name] = index.long().clone()
        self.leaml_index.limits[adapter_name] = (name, size)
        self.leaml_axis[adapter_name] = axis
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The delta as a dense ``[out, in]`` (``[in, out]`` for Conv1D), for conversions that PEFT offers."""
        delta, index, axis = self.leaml_delta[adapter], self.leaml_index[adapter], self.leaml_axis[adapter]
        dense = delta.new_zeros(self.out_features, self.in_features)
        dense = dense.index_copy(axis, index.to(delta.device), delta if axis == 0 else delta.t())
        return dense.t() if is_conv1d(self.get_base_layer()) else dense

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True


class Linear(nn.Module, LeamlLayer):
    """A Linear (or Conv1D, or quantised Linear) with LEAML adapters."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, axis: int, index: Tensor, **kwargs: Any) -> None:
        super().__init__()
        options = {key: kwargs.pop(key) for key in ("name", "init_weights", "inference_mode") if key in kwargs}
        LeamlLayer.__init__(self, base_layer, **kwargs)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, axis, index, **options)

    # -- forward

    def _add(self, result: Tensor, x: Tensor, adapter: str) -> Tensor:
        delta, index = self.leaml_delta[adapter], self.leaml_index[adapter]
        if self.leaml_axis[adapter] == 0:
            change = F.linear(self._cast_input_dtype(x, delta.dtype), delta)
            return result.index_add(-1, index, change.to(result.dtype))
        change = self._cast_input_dtype(x.index_select(-1, index), delta.dtype) @ delta
        return result + change.to(result.dtype)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names: list[str] | None = kwargs.pop("adapter_names", None)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if names is not None:
            return self._mixed_batch(x, names, *args, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        if not self.merged:
            for adapter in self.active_adapters:
                if adapter in self.leaml_delta:
                    result = self._add(result, x, adapter)
        return result

    def _mixed_batch(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """Sample ``i`` of the batch through adapter ``names[i]``; ``"__base__"`` stands for none."""
        if len(x) != len(names):
            raise ValueError(f"adapter_names must name one adapter per sample: got {len(names)} for {len(x)} samples.")
        if self.merged:
            raise ValueError("Cannot pass `adapter_names` while adapters are merged, call `unmerge_adapter` first.")
        result = self.base_layer(x, *args, **kwargs).clone()
        for adapter in sorted(set(names) & set(self.leaml_delta.keys())):
            where = torch.tensor([i for i, name in enumerate(names) if name == adapter], device=x.device)
            result[where] = self._add(result[where], x[where], adapter)
        return result

    # -- merging

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the deltas to the base weight. The neurons as they were are kept, so that :meth:`unmerge` is exact.

        ``safe_merge`` raises ``ValueError`` instead where the result would not be finite.
        """
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter not in self.leaml_delta:
                continue
            if self.quantization_backend is not None:
                merged = self.get_base_weight() + self.get_delta_weight(adapter)
                self._check_finite(merged, adapter, safe_merge)
                self.set_base_weight(merged)
            else:
                axis, index = self._place(adapter)
                weight = self.get_base_layer().weight
                before = weight.index_select(axis, index)
                delta = self.leaml_delta[adapter].to(weight.device)
                same_way = axis == 0
                merged = before.float() + (delta if same_way else delta.t()).float()
                self._check_finite(merged, adapter, safe_merge)
                weight.data.index_copy_(axis, index, merged.to(weight.dtype))
                self._before_merge[adapter] = before
            self.merged_adapters.append(adapter)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put back the neurons as they were before :meth:`merge`, bit for bit (a quantised base: up to rounding)."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:  # last in, first out: adapters may share neurons
            adapter = self.merged_adapters.pop()
            if adapter not in self.leaml_delta:
                continue
            if self.quantization_backend is not None:
                self.set_base_weight(self.get_base_weight() - self.get_delta_weight(adapter))
            else:
                axis, index = self._place(adapter)
                weight = self.get_base_layer().weight
                weight.data.index_copy_(axis, index, self._before_merge.pop(adapter).to(weight.device, weight.dtype))

    def _place(self, adapter: str) -> tuple[int, Tensor]:
        """The axis and indices of the adapter's neurons in the stored weight."""
        base = self.get_base_layer()
        return self.leaml_axis[adapter] ^ int(is_conv1d(base)), self.leaml_index[adapter].to(base.weight.device)

    @staticmethod
    def _check_finite(merged: Tensor, adapter: str, safe: bool) -> None:
        if safe and not torch.isfinite(merged).all():
            raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken")

    def __repr__(self) -> str:
        return "leaml." + super().__repr__()
