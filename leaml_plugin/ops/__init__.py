"""The kernels: neuron relevance, selection, sparse masked AdamW, their fusion, the selective weight gradient.

Covers: the public, checked signatures over ``torch.ops.leaml.*``. Every op takes lists, so all layers of a model are
one call, and runs on compiled CPU or CUDA code where that was built and on the eager twins
(:mod:`leaml_plugin.ops.reference`) elsewhere, with the same semantics.
Does not cover: finding a model's layers, saving scores (``leaml_plugin.selection``), the optimizer class
(``leaml_plugin.optim``).

Importing this module imports torch; it builds nothing and loads nothing before the first call, be it of a function
here or of ``torch.ops.leaml.*``.

Common rules
------------
* A *neuron* is an output row of a weight ``[out, in]`` (``dims`` 0) or an input column (``dims`` 1). A vector (a
  bias) counts as ``[out, 1]``. Weights may have any strides (a transposed view gives sparse AdamW over columns).
* Weights are fp32, bf16 or fp16; a gradient has its weight's dtype or fp32. Statistics and state are fp32.
* ``grad_scale`` and ``found_inf`` are those of ``torch.amp.GradScaler``: one-element tensors on the device.
  Gradients are divided by ``grad_scale``; where ``found_inf`` is not 0 nothing is changed.
* NaN and Inf: a bad gradient element makes its neuron's statistics (and the squared norm) NaN or Inf, and the same
  element of weight and state NaN, as in ``torch.optim.AdamW``; with 8-bit state it takes its block of 256 with it.
  ``select_top`` ranks NaN below every number.
* Results on one device do not depend on the number of threads, nor on the CPU's vector width.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from leaml_plugin.errors import unknown_name
from leaml_plugin.ops import _library, reference
from leaml_plugin.ops._loader import build_info, native, use_backend

__all__ = [
    "BLOCK",
    "CRITERIA",
    "build_info",
    "clip_coefficient",
    "ffn_parts",
    "neuron_relevance_",
    "new_state",
    "relevance_sparse_adamw_",
    "remap_rows",
    "select_top",
    "selected_count",
    "selected_weight_grad",
    "sparse_adamw_",
    "use_backend",
]

Criterion = Literal["taylor", "taylor_abs", "fisher", "grad_norm"]
CRITERIA: dict[str, int] = {
    "taylor": reference.TAYLOR,  # |sum w*g|: first-order Taylor, what removing the neuron does to the loss
    "taylor_abs": reference.TAYLOR_ABS,  # sum |w*g|: the same without cancellation inside a neuron
    "fisher": reference.FISHER,  # sum g^2: empirical Fisher information
    "grad_norm": reference.GRAD_NORM,  # sqrt(sum g^2)
}
BLOCK = reference.BLOCK

_WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _codes(criteria: Criterion | Sequence[Criterion]) -> list[int]:
    names = [criteria] if isinstance(criteria, str) else list(criteria)
    for name in names:
        if name not in CRITERIA:
            raise unknown_name("relevance criterion", name, CRITERIA)
    _check(len(names) > 0, "criteria: got an empty list, wanted at least one of " + ", ".join(CRITERIA))
    return [CRITERIA[name] for name in names]


def _check_pair(i: int, weight: Tensor, grad: Tensor) -> None:
    _check(weight.dim() in (1, 2), f"weight {i}: wanted 1 or 2 dimensions, got shape {list(weight.shape)}")
    _check(weight.dtype in _WEIGHT_DTYPES, f"weight {i}: wanted float32, bfloat16 or float16, got {weight.dtype}")
    _check(
        grad.dtype in (weight.dtype, torch.float32),
        f"gradient {i}: wanted its weight's {weight.dtype} or float32, got {grad.dtype}",
    )
    _check(
        grad.device == weight.device,
        f"gradient {i} is on {grad.device}, its weight on {weight.device}; one call takes one device",
    )


def _scalar(name: str, value: Tensor | None, device: torch.device) -> Tensor | None:
    if value is None:
        return None
    _check(value.numel() == 1, f"{name}: wanted one element, got shape {list(value.shape)}")
    _check(value.device == device, f"{name}: wanted a tensor on {device}, got one on {value.device}")
    return value if value.dtype == torch.float32 else value.to(torch.float32)


def _relevance_out(out: Sequence[Tensor], criteria: list[int], sizes: dict[int, int]) -> list[Tensor]:
    views = []
    for j, target in enumerate(out):
        _check(target.dtype == torch.float32, f"out {j}: wanted float32, got {target.dtype}")
        view = target.unsqueeze(0) if target.dim() == 1 else target
        wanted = [len(criteria), sizes.get(j, view.shape[-1])]
        _check(
            list(view.shape) == wanted,
            f"out {j}: wanted shape {wanted if len(criteria) > 1 else wanted[1:]}, got {list(target.shape)}",
        )
        views.append(view)
    return views


def _slot_sizes(neurons: Sequence[int], slots: Sequence[int], count: int) -> dict[int, int]:
    """How many neurons each slot holds, where weight ``i`` has ``neurons[i]``."""
    sizes: dict[int, int] = {}
    for i, (size, slot) in enumerate(zip(neurons, slots)):
        _check(0 <= slot < count, f"slots[{i}]: wanted 0 to {count - 1}, got {slot}")
        _check(
            sizes.setdefault(slot, size) == size,
            f"slot {slot}: weight {i} has {size} neurons, an earlier part has {sizes[slot]}",
        )
    return sizes


def _slots(slots: Sequence[int] | None, count: int) -> list[int]:
    chosen = list(range(count)) if slots is None else list(slots)
    _check(len(chosen) == count, f"slots: wanted one for each of the {count} weights, got {len(chosen)}")
    return chosen


def _check_distinct(out: Sequence[Tensor]) -> None:
    wrong = reference.shared_out(out)
    _check(wrong is None, str(wrong))


# --- relevance -------------------------------------------------------------------------------------------------


def _check_relevance(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    out: Sequence[Tensor],
    codes: list[int],
    dims: list[int],
    slots: list[int],
) -> None:
    for i, (weight, grad, dim) in enumerate(zip(weights, grads, dims)):
        _check_pair(i, weight, grad)
        _check(weight.shape == grad.shape, f"gradient {i}: wanted {list(weight.shape)}, got {list(grad.shape)}")
        _check(dim in (0, 1) and dim < weight.dim(), f"dims[{i}]: wanted 0 or 1 below {weight.dim()}, got {dim}")
    _relevance_out(out, codes, _slot_sizes([w.shape[dim] for w, dim in zip(weights, dims)], slots, len(out)))
    _check_distinct(out)


@torch.no_grad()
def neuron_relevance_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    out: Sequence[Tensor],
    *,
    criteria: Criterion | Sequence[Criterion] = "taylor",
    dims: int | Sequence[int] = 0,
    slots: Sequence[int] | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> Tensor:
    """Add each neuron's relevance to ``out``, in one pass over weights and gradients.

    Args:
        weights: ``[out, in]`` (or ``[out]``) each.
        grads: the same shapes.
        out: fp32, ``[neurons]`` each, or ``[len(criteria), neurons]`` where several criteria are asked for; added
            to in place, so that micro-batches accumulate: ``|sum w*g|`` of each call is added, not of the sum. The
            same tensor twice is refused: weights of the same neurons share one through ``slots``.
        criteria: among ``taylor``, ``taylor_abs``, ``fisher``, ``grad_norm``; several cost no second pass.
        dims: 0 where the neurons of a weight are its rows, 1 where they are its columns; one for all or one each.
        slots: which ``out`` each weight feeds; weights of one slot are parts of the same neurons and their sums are
            joined before ``|.|`` and the root (see :func:`ffn_parts`). Default: weight ``i`` feeds ``out[i]``.
        grad_scale: statistics are those of ``grad / grad_scale``.
        found_inf: where not 0, ``out`` stays as it is.

    Returns:
        The squared L2 norm of all gradients (fp32 scalar), for clipping at no further read
        (:func:`clip_coefficient`).

    Raises:
        ValueError: shapes, dtypes or devices do not fit. LeamlError: an unknown criterion.

    Source: LEAML (arXiv 2510.03232), selective neuron distillation. The paper's exact formula is not public, so the
    four usual ones are offered.
    """
    codes = _codes(criteria)
    count = len(weights)
    _check(len(grads) == count, f"grads: wanted one for each of the {count} weights, got {len(grads)}")
    dim_list = [dims] * count if isinstance(dims, int) else list(dims)
    slot_list = _slots(slots, count)
    _check(len(dim_list) == count, f"dims: wanted one for each of the {count} weights, got {len(dim_list)}")
    if not count:
        return torch.zeros((), dtype=torch.float32)
    views = [target.unsqueeze(0) if target.dim() == 1 else target for target in out]
    device = weights[0].device
    args = (
        weights, grads, views, codes, dim_list, slot_list,
        _scalar("grad_scale", grad_scale, device), _scalar("found_inf", found_inf, device),
    )  # fmt: skip
    if native(device):
        try:
            return torch.ops.leaml.neuron_relevance_(*args)
        except (RuntimeError, TypeError):
            # the compiled op checks all before it changes any; its complaint is told as that of this function
            _check_relevance(weights, grads, out, codes, dim_list, slot_list)
            raise
    _check_relevance(weights, grads, out, codes, dim_list, slot_list)
    return reference.neuron_relevance_(*args)


def ffn_parts(
    groups: Sequence[tuple[Tensor, Tensor, Tensor]],
) -> tuple[list[Tensor], list[int], list[int]]:
    """``(gate, up, down)`` triples, flattened for FFN granularity: ``(tensors, dims, slots)``.

    A neuron of a gated feed-forward layer is row *i* of gate and up and column *i* of down. Call it on the weights
    and on the gradients alike.
    """
    tensors = [tensor for group in groups for tensor in group]
    return tensors, [0, 0, 1] * len(groups), [slot for slot in range(len(groups)) for _ in range(3)]


# --- selection -------------------------------------------------------------------------------------------------


def selected_count(density: float, neurons: int) -> int:
    """How many of ``neurons`` a density selects: rounded half up, at least one where density > 0, at most all."""
    _check(0.0 <= density <= 1.0, f"density: wanted a fraction from 0 to 1, got {density}")
    if density == 0.0 or neurons == 0:
        return 0
    return min(neurons, max(1, math.floor(density * neurons + 0.5)))


@torch.no_grad()
def select_top(
    scores: Sequence[Tensor],
    density: float,
    *,
    scope: Literal["layer", "group", "model"] = "layer",
    groups: Sequence[int] | None = None,
) -> list[Tensor]:
    """The neurons with the highest scores: ``int64 [k]`` ascending for each score vector.

    Args:
        scores: fp32 ``[neurons]`` each.
        density: fraction selected, from 0 to 1 (:func:`selected_count`).
        scope: the fraction holds in each vector (``layer``), in each group of vectors (``group``) or over all of
            them (``model``).
        groups: for ``scope="group"``, the group id of each vector, any ints.

    Ties go to the lower index (of an earlier vector first). NaN ranks below every number.
    """
    if scope not in ("layer", "group", "model"):
        raise unknown_name("selection scope", scope, ("layer", "group", "model"))
    _check((groups is not None) == (scope == "group"), "groups: wanted with scope='group' and only there")
    for i, vector in enumerate(scores):
        _check(vector.dim() == 1, f"scores[{i}]: wanted one dimension, got shape {list(vector.shape)}")
    if not scores:
        return []
    if scope == "layer":
        ids = list(range(len(scores)))
    elif scope == "model":
        ids = [0] * len(scores)
    else:
        assert groups is not None
        _check(len(groups) == len(scores), f"groups: wanted {len(scores)} ids, got {len(groups)}")
        order = {group: i for i, group in enumerate(dict.fromkeys(groups))}
        ids = [order[group] for group in groups]
    sizes = [vector.shape[0] for vector in scores]
    totals = [0] * (max(ids) + 1)
    for group, size in zip(ids, sizes):
        totals[group] += size
    counts = [selected_count(density, total) for total in totals]
    vectors = [vector.contiguous().to(torch.float32) for vector in scores]
    op = torch.ops.leaml.select_top if native(scores[0].device) else reference.select_top
    flat = op(vectors, ids, counts)

    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + size)
    if scope == "layer":
        lengths = counts
    else:
        cuts = torch.searchsorted(flat, torch.tensor(starts, device=flat.device)).tolist()
        lengths = [b - a for a, b in itertools.pairwise(cuts)]
    return [part - start for part, start in zip(flat.split(lengths), starts)]


# --- sparse AdamW ---------------------------------------------------------------------------------------------


def new_state(param: Tensor, rows: Tensor, *, eight_bit: bool = False, master: bool = False) -> dict[str, Tensor]:
    """Zero optimizer state of the selected rows of one parameter, compact.

    Returns ``step`` fp32 ``[k]`` and ``exp_avg``, ``exp_avg_sq`` fp32 ``[k, in]``; with ``eight_bit`` these two are
    uint8 and ``exp_avg_scale``, ``exp_avg_sq_scale`` fp32 ``[k, ceil(in / 256)]`` join them; with ``master`` (for
    bf16 and fp16 weights) ``master`` fp32 ``[k, in]`` is a copy of the rows.
    """
    k, width = rows.numel(), param.shape[1] if param.dim() == 2 else 1
    device = param.device
    state = {"step": torch.zeros(k, dtype=torch.float32, device=device)}
    if eight_bit:
        scales = (k, reference.blocks(width))
        state["exp_avg"] = torch.full((k, width), 128, dtype=torch.uint8, device=device)  # 128 codes zero
        state["exp_avg_sq"] = torch.zeros(k, width, dtype=torch.uint8, device=device)
        state["exp_avg_scale"] = torch.zeros(scales, dtype=torch.float32, device=device)
        state["exp_avg_sq_scale"] = torch.zeros(scales, dtype=torch.float32, device=device)
    else:
        state["exp_avg"] = torch.zeros(k, width, dtype=torch.float32, device=device)
        state["exp_avg_sq"] = torch.zeros(k, width, dtype=torch.float32, device=device)
    if master:
        state["master"] = reference.as_rows(param.detach()).index_select(0, rows).to(torch.float32)
    return state


def remap_rows(old_rows: Tensor, new_rows: Tensor, tensors: Sequence[Tensor], fill: Sequence[float]) -> list[Tensor]:
    """Compact ``[k_old, ...]`` tensors carried to a new selection: surviving rows keep their values bit for bit.

    Args:
        old_rows, new_rows: ascending int64.
        tensors: state tensors whose first axis follows ``old_rows``.
        fill: what the rows that are new start from, one number for each tensor (0; 128 for an 8-bit ``exp_avg``).

    Returns:
        New tensors whose first axis follows ``new_rows``; the very same tensors where the selections are equal.
    """
    if old_rows.shape == new_rows.shape and torch.equal(old_rows, new_rows):
        return list(tensors)
    if old_rows.numel():
        place = torch.searchsorted(old_rows, new_rows).clamp_max(old_rows.numel() - 1)
        kept = old_rows[place] == new_rows
    else:
        place, kept = torch.zeros_like(new_rows), torch.zeros_like(new_rows, dtype=torch.bool)
    result = []
    for tensor, value in zip(tensors, fill):
        new = torch.full((new_rows.numel(), *tensor.shape[1:]), value, dtype=tensor.dtype, device=tensor.device)
        new[kept] = tensor[place[kept]]
        result.append(new)
    return result


def clip_coefficient(sqnorm: Tensor, max_norm: float) -> Tensor:
    """``min(1, max_norm / (sqrt(sqnorm) + 1e-6))`` as a device scalar: the factor of ``clip_grad_norm_``."""
    return (max_norm / (sqnorm.sqrt() + 1e-6)).clamp_max(1.0)


def _check_adamw(
    params: Sequence[Tensor],
    rows: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    steps: Sequence[Tensor],
    scales: tuple[Sequence[Tensor], Sequence[Tensor]] | None,
    masters: Sequence[Tensor] | None,
    dense_only: bool,
) -> None:
    count = len(params)
    lists: dict[str, Sequence[Tensor]] = {
        "rows": rows, "grads": grads, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "steps": steps,
    }  # fmt: skip
    if scales is not None:
        lists["scales[0]"], lists["scales[1]"] = scales
    if masters is not None:
        lists["masters"] = masters
    for name, tensors in lists.items():
        _check(len(tensors) == count, f"{name}: wanted one for each of the {count} params, got {len(tensors)}")
    wanted = torch.float32 if scales is None else torch.uint8
    for i, param in enumerate(params):
        _check_pair(i, param, grads[i])
        k, n = rows[i].numel(), param.shape[0]
        width = param.shape[1] if param.dim() == 2 else 1
        _check(rows[i].dtype == torch.int64, f"rows {i}: wanted int64, got {rows[i].dtype}")
        _check(rows[i].dim() == 1 and k <= n, f"rows {i}: wanted at most {n} indices, got {list(rows[i].shape)}")
        shapes = [list(param.shape)] if dense_only else [list(param.shape), [k, *param.shape[1:]]]
        _check(
            list(grads[i].shape) in shapes,
            f"gradient {i}: wanted {' (dense) or '.join(map(str, shapes))}{' (compact)' * (not dense_only)}, "
            f"got {list(grads[i].shape)}",
        )
        _check(
            steps[i].dtype == torch.float32 and list(steps[i].shape) == [k],
            f"steps {i}: wanted float32 [{k}], one for each row, got {steps[i].dtype} {list(steps[i].shape)}",
        )
        for name, state in (("exp_avg", exp_avg[i]), ("exp_avg_sq", exp_avg_sq[i])):
            _check(
                state.dtype not in (torch.bfloat16, torch.float16),
                f"{name} {i}: {state.dtype} cannot hold it (at beta2 = 0.999 a step changes less than its last bit, "
                "so it never decays); wanted float32, or uint8 with scales",
            )
            _check(state.dtype == wanted, f"{name} {i}: wanted {wanted}, got {state.dtype}")
            _check(
                list(reference.as_rows(state).shape) == [k, width] and state.is_contiguous(),
                f"{name} {i}: wanted contiguous [{k}, {width}], got {list(state.shape)}",
            )
        for name, scale in zip(("scales[0]", "scales[1]"), () if scales is None else (scales[0][i], scales[1][i])):
            blocks = reference.blocks(width)
            _check(
                scale.dtype == torch.float32 and list(scale.shape) == [k, blocks] and scale.is_contiguous(),
                f"{name} {i}: wanted contiguous float32 [{k}, {blocks}], got {scale.dtype} {list(scale.shape)}",
            )
        if masters is not None and masters[i].numel() > 0:
            _check(
                masters[i].dtype == torch.float32
                and list(reference.as_rows(masters[i]).shape) == [k, width]
                and masters[i].is_contiguous(),
                f"masters {i}: wanted contiguous float32 [{k}, {width}] or an empty tensor, "
                f"got {masters[i].dtype} {list(masters[i].shape)}",
            )


def _adamw_tail(
    device: torch.device,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    maximize: bool,
    clip_coef: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    stochastic_rounding: bool,
    seed: int,
) -> tuple[Any, ...]:
    _check(all(0.0 <= beta < 1.0 for beta in betas), f"betas: wanted 0 <= beta < 1, got {betas}")
    _check(eps >= 0.0, f"eps: wanted >= 0, got {eps}")
    _check(weight_decay >= 0.0, f"weight_decay: wanted >= 0, got {weight_decay}")
    rate, rate_tensor = (0.0, lr) if isinstance(lr, Tensor) else (float(lr), None)
    if rate_tensor is not None and rate_tensor.device != device and rate_tensor.device.type == "cpu":
        rate, rate_tensor = float(rate_tensor), None  # a host scalar needs no synchronisation
    return (
        _scalar("lr", rate_tensor, device),
        _scalar("clip_coef", clip_coef, device),
        _scalar("grad_scale", grad_scale, device),
        _scalar("found_inf", found_inf, device),
        rate, betas[0], betas[1], eps, weight_decay, maximize, stochastic_rounding, seed,
    )  # fmt: skip


def _mark_changed(tensors: Sequence[Tensor]) -> None:
    # custom ops do not bump version counters themselves; autograd must notice a weight changed under its feet
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(tensors)


@torch.no_grad()
def sparse_adamw_(
    params: Sequence[Tensor],
    rows: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    maximize: bool = False,
    scales: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None,
    masters: Sequence[Tensor] | None = None,
    stochastic_rounding: bool = False,
    seed: int = 0,
    clip_coef: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One AdamW step (decoupled decay) of the selected rows, in place; all other rows keep their bits.

    Args:
        params: ``[out, in]`` or ``[out]`` each, any strides.
        rows: int64 ``[k]`` each, strictly ascending, below ``out``.
        grads: dense (the shape of the parameter) or compact ``[k, in]``, told apart by the shape.
        exp_avg, exp_avg_sq: contiguous ``[k, in]``: fp32, or uint8 with ``scales`` (:func:`new_state`).
        steps: fp32 ``[k]``: steps each row has taken so far, raised by one here. Each row has its own, so a row
            selected later gets the bias correction of its own age.
        lr: a number, or a one-element tensor that is read on the device (CUDA-graph capturable).
        scales: ``(exp_avg_scale, exp_avg_sq_scale)``, fp32 ``[k, ceil(in / 256)]`` each, for 8-bit state.
        masters: fp32 ``[k, in]`` copies the step is taken on; the weight gets their rounding. Empty tensors mean
            none for that parameter.
        stochastic_rounding: round bf16 and fp16 weights without masters stochastically: unbiased, reproducible from
            ``seed``, the row and its step. Without it and without masters they are rounded to nearest, which loses
            every update below half a unit in the last place.
        seed: also seeds the rounding of 8-bit state.
        clip_coef: a factor on all gradients (:func:`clip_coefficient`).
        grad_scale, found_inf: see the module docstring.

    Weight decay reaches the selected rows only. Formula and order of operations are those of ``torch.optim.AdamW``
    (AMSGrad off), but the root of the second moment is multiplied by the reciprocal of its bias correction, where torch
    divides by the correction.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or a state tensor is bf16 or fp16. RuntimeError (CPU): a
            row index out of range or out of order.
    """
    lists = (params, rows, grads, exp_avg, exp_avg_sq, steps)
    if not params:
        _check_adamw(*lists, scales, masters, dense_only=False)
        return
    device = params[0].device
    tail = _adamw_tail(
        device, lr, betas, eps, weight_decay, maximize, clip_coef, grad_scale, found_inf, stochastic_rounding, seed
    )
    first, second = scales if scales is not None else ((), ())
    if native(device):
        try:
            torch.ops.leaml.sparse_adamw_(*lists, first, second, masters or (), *tail)
        except (RuntimeError, TypeError):
            # the compiled op checks all before it changes any; its complaint is told as that of this function
            _check_adamw(*lists, scales, masters, dense_only=False)
            raise
    else:
        _check_adamw(*lists, scales, masters, dense_only=False)
        reference.sparse_adamw_(*lists, first, second, masters or (), *tail)
    _mark_changed(params)


@torch.no_grad()
def relevance_sparse_adamw_(
    params: Sequence[Tensor],
    rows: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    steps: Sequence[Tensor],
    out: Sequence[Tensor],
    *,
    lr: float | Tensor,
    criteria: Criterion | Sequence[Criterion] = "taylor",
    slots: Sequence[int] | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    maximize: bool = False,
    scales: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None,
    masters: Sequence[Tensor] | None = None,
    stochastic_rounding: bool = False,
    seed: int = 0,
    clip_coef: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> Tensor:
    """:func:`sparse_adamw_` and :func:`neuron_relevance_` of all rows in one pass, for selection during training.

    A transposed weight is read twice: its rows lie across memory, so that a pass over all of them comes first.

    ``out`` gets the relevance of every row, from the weights before the step and the gradients before clipping.
    Gradients must be dense. Returns the squared gradient norm, which comes too late to clip this very step: pass
    the coefficient of a separate relevance pass, or that of the step before. With ``found_inf`` set neither weights
    nor scores change.

    ``slots`` is that of :func:`neuron_relevance_`: which ``out`` each weight feeds, by default ``out[i]``. An FFN
    neuron is a row of ``gate``, ``up`` and ``down.t()`` (and of their gradients), all in one slot with equal ``rows``.
    """
    codes = _codes(criteria)
    lists = (params, rows, grads, exp_avg, exp_avg_sq, steps)
    slot_list = _slots(slots, len(params))
    if slots is None:
        _check(len(out) == len(params), f"out: wanted one for each of the {len(params)} params, got {len(out)}")
    if not params:
        _check_adamw(*lists, scales, masters, dense_only=True)
        return torch.zeros((), dtype=torch.float32)
    views = _relevance_out(out, codes, _slot_sizes([param.shape[0] for param in params], slot_list, len(out)))
    device = params[0].device
    tail = _adamw_tail(
        device, lr, betas, eps, weight_decay, maximize, clip_coef, grad_scale, found_inf, stochastic_rounding, seed
    )
    first, second = scales if scales is not None else ((), ())
    if native(device):
        try:
            sqnorm = torch.ops.leaml.relevance_sparse_adamw_(
                *lists, first, second, masters or (), views, codes, slot_list, *tail
            )  # fmt: skip
        except (RuntimeError, TypeError):
            _check_adamw(*lists, scales, masters, dense_only=True)
            _check_distinct(views)
            raise
    else:
        _check_adamw(*lists, scales, masters, dense_only=True)
        _check_distinct(views)
        sqnorm = reference.relevance_sparse_adamw_(
            *lists, first, second, masters or (), views, codes, slot_list, *tail
        )  # fmt: skip
    _mark_changed(params)
    return sqnorm


# --- selective weight gradient ----------------------------------------------------------------------------------


def selected_weight_grad(x: Tensor, grad_out: Tensor, rows: Tensor) -> Tensor:
    """The weight gradient of the selected rows of a Linear, compact ``[k, in]``.

    Args:
        x: the Linear's input ``[..., in]``.
        grad_out: the gradient of its output ``[..., out]``, same dtype.
        rows: int64 ``[k]``.

    Work and memory scale with ``k``. Differentiable, and transparent to ``torch.compile``.
    """
    return torch.ops.leaml.selected_weight_grad(x, grad_out, rows)
