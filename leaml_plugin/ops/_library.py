"""The ``leaml`` operator library: schemas, fake (meta) kernels and the reference twins as the kernel of last resort.

Covers: what ``torch.ops.leaml.*`` is. Schemas are defined here, once, so that they exist whether or not anything was
compiled; ``_C.abi3.so`` and ``_C_cuda.abi3.so`` only add CPU and CUDA implementations, which win over the twins once
they are loaded: by the wrappers in ``leaml_plugin.ops``, or by the first call that reaches a twin here.
Does not cover: argument checks for users (the wrappers in ``leaml_plugin.ops``) and loading (``_loader``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from leaml_plugin.ops import _loader, reference

SCHEMAS = {
    "neuron_relevance_": (
        "(Tensor[] weights, Tensor[] grads, Tensor(a!)[] out, int[] criteria, int[] dims, int[] slots, "
        "Tensor? grad_scale, Tensor? found_inf) -> Tensor"
    ),
    "select_top": "(Tensor[] scores, int[] groups, int[] counts) -> Tensor",
    "sparse_adamw_": (
        "(Tensor(a!)[] params, Tensor[] rows, Tensor[] grads, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, "
        "Tensor(d!)[] steps, Tensor(e!)[] exp_avg_scale, Tensor(f!)[] exp_avg_sq_scale, Tensor(g!)[] masters, "
        "Tensor? lr_tensor, Tensor? clip_coef, Tensor? grad_scale, Tensor? found_inf, float lr, float beta1, "
        "float beta2, float eps, float weight_decay, bool maximize, bool stochastic_rounding, int seed) -> ()"
    ),
    "relevance_sparse_adamw_": (
        "(Tensor(a!)[] params, Tensor[] rows, Tensor[] grads, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, "
        "Tensor(d!)[] steps, Tensor(e!)[] exp_avg_scale, Tensor(f!)[] exp_avg_sq_scale, Tensor(g!)[] masters, "
        "Tensor(h!)[] out, int[] criteria, int[] slots, Tensor? lr_tensor, Tensor? clip_coef, Tensor? grad_scale, "
        "Tensor? found_inf, float lr, float beta1, float beta2, float eps, float weight_decay, bool maximize, "
        "bool stochastic_rounding, int seed) -> Tensor"
    ),
    "selected_weight_grad": "(Tensor x, Tensor grad_out, Tensor rows) -> Tensor",
}

LIBRARY = torch.library.Library("leaml", "DEF")
for _name, _schema in SCHEMAS.items():
    LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))


def _last_resort(name: str) -> None:
    """Register the twin of ``name``; its first call loads the compiled kernel of that device, which then runs."""

    def kernel(tensors: list[Tensor], *rest: Any) -> Any:
        # one that is loaded already and did not win has no kernel for this call: to ask it again would never end
        if tensors and not _loader.loaded(tensors[0].device) and _loader.native(tensors[0].device):
            return getattr(torch.ops.leaml, name)(tensors, *rest)
        return getattr(reference, name)(tensors, *rest)

    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")


for _name in ("neuron_relevance_", "select_top", "sparse_adamw_", "relevance_sparse_adamw_"):
    _last_resort(_name)
# a gather and a matrix product: left to PyTorch, so that autograd and torch.compile see through it
LIBRARY.impl("selected_weight_grad", reference.selected_weight_grad, "CompositeImplicitAutograd")


@torch.library.register_fake("leaml::neuron_relevance_", lib=LIBRARY)
def _(weights, grads, out, criteria, dims, slots, grad_scale, found_inf) -> Tensor:
    return weights[0].new_empty((), dtype=torch.float32)


@torch.library.register_fake("leaml::select_top", lib=LIBRARY)
def _(scores, groups, counts) -> Tensor:
    return scores[0].new_empty(sum(counts), dtype=torch.int64)


@torch.library.register_fake("leaml::sparse_adamw_", lib=LIBRARY)
def _(params, *_: object) -> None:
    return None


@torch.library.register_fake("leaml::relevance_sparse_adamw_", lib=LIBRARY)
def _(params, *_: object) -> Tensor:
    return params[0].new_empty((), dtype=torch.float32)
