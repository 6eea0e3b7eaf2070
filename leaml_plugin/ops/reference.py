"""Eager reference twins of the kernels: the same semantics in plain PyTorch, on any device.

Covers: every op of :mod:`leaml_plugin.ops`, operation for operation, including the counter hash of the stochastic
rounding and the block-wise 8-bit code. The twins are what runs where nothing was compiled, and what the tests hold
the compiled code to (``dtype=torch.float64`` gives the error-free side of a comparison).
Does not cover: speed. A twin makes several passes and temporaries per tensor.

Arguments here are the raw ones of ``torch.ops.leaml.*`` (criteria as codes, absent lists empty); users call the
wrappers of :mod:`leaml_plugin.ops`, which check them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

TAYLOR, TAYLOR_ABS, FISHER, GRAD_NORM = range(4)
BLOCK = 256  # elements that share one scale of an 8-bit state; blocks never straddle two rows

_M32 = 0xFFFFFFFF


def as_rows(tensor: Tensor) -> Tensor:
    """A weight seen as ``[neurons, inputs]``: a vector (a bias) is one input wide."""
    return tensor.unsqueeze(1) if tensor.dim() == 1 else tensor


def _sqrt(x: Tensor) -> Tensor:
    """Correctly rounded, as the processor's own instruction is; ``torch.sqrt`` may miss the last bit."""
    return x.to(torch.float64).sqrt().to(x.dtype)


# --- relevance -------------------------------------------------------------------------------------------------


def shared_out(out: Sequence[Tensor]) -> str | None:
    """What is wrong where two outs begin in the same memory, in the words of the compiled op; None where none do."""
    places: dict[int, int] = {}
    for j, target in enumerate(out):
        if target.numel() and places.setdefault(target.data_ptr(), j) != j:
            return (
                f"out {j}: wanted memory of its own, got that of out {places[target.data_ptr()]}; "
                "weights of the same neurons share one out through slots="
            )
    return None


def neuron_relevance_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    out: Sequence[Tensor],
    criteria: Sequence[int],
    dims: Sequence[int],
    slots: Sequence[int],
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``out[slot][c] += criterion c of the neuron``; returns the squared norm of all gradients (fp32 scalar)."""
    if wrong := shared_out(out):
        raise RuntimeError(wrong)
    inverse = None if grad_scale is None else 1.0 / grad_scale.to(dtype)
    sums: list[Tensor | None] = [None] * len(out)
    total = torch.zeros((), dtype=torch.float64, device=weights[0].device)
    for weight, grad, dim, slot in zip(weights, grads, dims, slots):
        w, g = as_rows(weight).to(dtype), as_rows(grad).to(dtype)
        product = w * g
        axis = 1 - dim
        stats = torch.stack([product.sum(axis), product.abs().sum(axis), (g * g).sum(axis)])
        total += stats[2].to(torch.float64).sum()
        sums[slot] = stats if sums[slot] is None else sums[slot] + stats
    if inverse is not None:
        total = total * (inverse * inverse).to(torch.float64)
    for target, stats in zip(out, sums):
        if stats is None:
            continue
        if inverse is not None:
            stats = stats * torch.stack([inverse, inverse, inverse * inverse]).reshape(3, 1)
        rows = []
        for code in criteria:
            if code == TAYLOR:
                rows.append(stats[0].abs())
            elif code == TAYLOR_ABS:
                rows.append(stats[1])
            elif code == FISHER:
                rows.append(stats[2])
            else:
                rows.append(stats[2].sqrt())
        step = torch.stack(rows).to(target.dtype)
        if found_inf is not None:  # where(), not a multiplication by zero: the statistics may be NaN
            step = torch.where(found_inf.reshape(()) != 0, torch.zeros_like(step), step)
        target.add_(step)
    return total.to(torch.float32)


# --- selection -------------------------------------------------------------------------------------------------


def select_top(scores: Sequence[Tensor], groups: Sequence[int], counts: Sequence[int]) -> Tensor:
    """Flat, ascending positions (over the concatenated vectors) of the ``counts[g]`` largest scores of each group."""
    flat = torch.cat([s.reshape(-1).to(torch.float32) for s in scores])
    flat = torch.where(flat.isnan(), torch.full_like(flat, -math.inf), flat)  # NaN never beats a number
    device = flat.device
    sizes = [s.numel() for s in scores]
    member = torch.repeat_interleave(torch.tensor(list(groups), device=device), torch.tensor(sizes, device=device))
    # by group, within a group by score, within a score by position: two stable sorts
    order = torch.sort(flat, descending=True, stable=True).indices
    order = order[torch.sort(member[order], stable=True).indices]
    totals = [0] * len(counts)
    for group, size in zip(groups, sizes):
        totals[group] += size
    taken = [torch.arange(total, device=device) < count for total, count in zip(totals, counts)]
    return order[torch.cat(taken)].sort().values if taken else order[:0]


# --- counter hash, stochastic rounding, 8-bit code ----------------------------------------------------------------


def _mix32(x: Tensor) -> Tensor:
    """A bijective 32-bit mixer (lowbias32) on values held in int64."""
    x = x & _M32
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _M32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _M32
    return x ^ (x >> 16)


def row_key(seed: int, tensor: int, rows: Tensor, steps: Tensor) -> Tensor:
    """One 32-bit key per (seed, tensor, row, step): what a row's random numbers are counted from. ``[k]`` int64."""
    low, high = seed & _M32, (seed >> 32) & _M32
    key = _mix32(torch.full_like(rows, low ^ 0x9E3779B9))
    key = _mix32(key ^ high)
    key = _mix32(key ^ (tensor & _M32))
    key = _mix32(key ^ (rows & _M32))
    return _mix32(key ^ steps.to(torch.int64))


def random_bits(key: Tensor, columns: int, stream: int) -> Tensor:
    """32 random bits for each element of the keyed rows: ``[k, columns]`` int64. Streams: 0 weight, 1 m, 2 v."""
    counter = torch.arange(columns, device=key.device, dtype=torch.int64) * 4 + stream
    return _mix32((key.reshape(-1, 1) + (counter * 0x9E3779B1)) & _M32)


def round_stochastically(value: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    """fp32 to bf16 or fp16, up or down with the probability that makes the rounding unbiased.

    Values that ``dtype`` holds exactly stay as they are. NaN and Inf are kept.
    """
    value = value.to(torch.float32)
    if dtype == torch.bfloat16:
        raw = value.contiguous().view(torch.int32).to(torch.int64) & _M32
        rounded = (raw + (bits >> 16)) & 0xFFFF0000
    elif dtype == torch.float16:
        # normal numbers lose 13 bits; below 2^-14 the spacing is a constant 2^-24
        raw = value.contiguous().view(torch.int32).to(torch.int64) & _M32
        rounded = (raw + (bits >> 19)) & 0xFFFFE000
        small = torch.floor(value.abs() * 2.0**24 + (bits >> 8).to(torch.float32) * 2.0**-24) * 2.0**-24
        small = torch.copysign(small, value)
    else:
        return value.to(dtype)
    signed = torch.where(rounded > 0x7FFFFFFF, rounded - (1 << 32), rounded).to(torch.int32)
    result = signed.view(torch.float32)
    if dtype == torch.float16:
        result = torch.where(value.abs() < 2.0**-14, small, result)
    return torch.where(value.isfinite(), result, value).to(dtype)


def blocks(columns: int) -> int:
    """Scales per row of an 8-bit state."""
    return -(-columns // BLOCK)


def dequantize(code: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """8-bit code ``[k, in]`` (uint8) and scales ``[k, blocks]`` to fp32: ``scale * (q / q_max)^4``, sign apart."""
    columns = code.shape[1]
    scale = scales.repeat_interleave(BLOCK, dim=1)[:, :columns]
    if signed:
        q = code.to(torch.float32) - 128.0
        unit = q * (1.0 / 127.0)
        return (unit * unit) * (unit * unit.abs()) * scale
    unit = code.to(torch.float32) * (1.0 / 255.0)
    return (unit * unit) * (unit * unit) * scale


def quantize(value: Tensor, bits: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """fp32 ``[k, in]`` to (uint8 code, fp32 scales ``[k, blocks]``), rounding stochastically between two codes.

    The fourth-power code spans nine decades (v) and eight (m) below a block's largest value. Rounding is unbiased:
    to-nearest would freeze a second moment whose change per step is smaller than half a code. The exception: a second
    moment that is not zero gets at least the first code.
    A block that holds NaN or Inf gets the scale NaN, so all of it reads as NaN.
    """
    rows, columns = value.shape
    pad = blocks(columns) * BLOCK - columns
    magnitude = value.abs() if signed else value.clamp_min(0.0)
    padded = torch.nn.functional.pad(magnitude, (0, pad)).reshape(rows, -1, BLOCK)
    scales = padded.amax(2) if columns else value.new_zeros(rows, 0)
    scales = torch.where(scales.isfinite(), scales, torch.full_like(scales, math.nan))
    spread = scales.repeat_interleave(BLOCK, dim=1)[:, :columns]
    tiny = torch.finfo(torch.float32).tiny  # the reciprocal of a subnormal overflows: such a block is stored as zero
    inverse = torch.where(spread >= tiny, 1.0 / spread, torch.zeros_like(spread))
    x = torch.nan_to_num(magnitude * inverse, nan=0.0, posinf=0.0).clamp_max(1.0)
    top = 127.0 if signed else 255.0
    low = torch.floor(_sqrt(_sqrt(x)) * top).clamp_max(top - 1.0)
    a, b = low * (1.0 / top), (low + 1.0) * (1.0 / top)
    below, above = (a * a) * (a * a), (b * b) * (b * b)
    uniform = (bits >> 8).to(torch.float32) * 2.0**-24
    q = low + ((x - below) - uniform * (above - below) > 0).to(torch.float32)
    if signed:
        q = 128.0 + torch.copysign(q, value)
    else:  # beside a first moment that is not zero, a second moment that became zero would divide the step by eps
        q = torch.maximum(q, ((value > 0) & (inverse > 0)).to(torch.float32))
    return q.to(torch.uint8), scales


# --- sparse AdamW ---------------------------------------------------------------------------------------------


def _check_order(index: Tensor, count: int, i: int) -> None:
    """Refuse rows that are not strictly ascending from 0 to ``count - 1``, in the words of the compiled op."""
    bad = (index < 0) | (index >= count)
    bad[1:] |= index[1:] <= index[:-1]
    if bad.any():
        at = int(bad.nonzero()[0])
        raise RuntimeError(
            f"rows {i}: wanted strictly ascending indices from 0 to {count - 1}, got {int(index[at])} at position {at}"
        )


def sparse_adamw_(
    params: Sequence[Tensor],
    rows: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    steps: Sequence[Tensor],
    exp_avg_scale: Sequence[Tensor],
    exp_avg_sq_scale: Sequence[Tensor],
    masters: Sequence[Tensor],
    lr_tensor: Tensor | None,
    clip_coef: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    stochastic_rounding: bool,
    seed: int,
    *,
    dtype: torch.dtype = torch.float32,
) -> None:
    """One AdamW step of the listed rows, in place; every other row keeps its bits."""
    for i, (param, index) in enumerate(zip(params, rows)):
        if index.device.type == "cpu":  # elsewhere looking at them would wait for the device
            _check_order(index, param.shape[0], i)
    skip = None if found_inf is None else found_inf.reshape(()) != 0
    if lr_tensor is not None:
        rate = lr_tensor.reshape(()).to(torch.float64)
    else:
        rate = torch.tensor(lr, dtype=torch.float64, device=params[0].device)
    decay = (1.0 - rate * weight_decay).to(dtype)
    for i, (param, index, grad) in enumerate(zip(params, rows, grads)):
        if index.numel() == 0:
            continue
        param2, grad2 = as_rows(param), as_rows(grad)
        compact = grad2.shape[0] == index.numel()
        g = (grad2 if compact else grad2.index_select(0, index)).to(dtype)
        if grad_scale is not None:
            g = g * (1.0 / grad_scale.reshape(()).to(dtype))
        if clip_coef is not None:
            g = g * clip_coef.reshape(()).to(dtype)
        if maximize:
            g = -g
        step = steps[i] + 1.0
        eight_bit = len(exp_avg_scale) > 0
        master = len(masters) > 0 and masters[i].numel() > 0
        if eight_bit:
            m = dequantize(as_rows(exp_avg[i]), exp_avg_scale[i], signed=True).to(dtype)
            v = dequantize(as_rows(exp_avg_sq[i]), exp_avg_sq_scale[i], signed=False).to(dtype)
        else:
            m, v = as_rows(exp_avg[i]).to(dtype), as_rows(exp_avg_sq[i]).to(dtype)
        w = (as_rows(masters[i]) if master else param2.index_select(0, index)).to(dtype)

        t = step.to(torch.float64).reshape(-1, 1)
        correction1 = -torch.expm1(t * math.log(beta1)) if beta1 > 0 else torch.ones_like(t)
        correction2 = -torch.expm1(t * math.log(beta2)) if beta2 > 0 else torch.ones_like(t)
        step_size, inverse_root2 = (rate / correction1).to(dtype), (1.0 / correction2.sqrt()).to(dtype)
        w = w * decay
        m = m + (g - m) * (1.0 - beta1)
        v = v * beta2 + (g * g) * (1.0 - beta2)
        w = w - step_size * (m / (_sqrt(v) * inverse_root2 + eps))

        new_w = w.to(torch.float32)
        key = row_key(seed, i, index, step)
        width = param2.shape[1]
        if stochastic_rounding and not master:
            stored = round_stochastically(new_w, param.dtype, random_bits(key, width, 0))
        else:
            stored = new_w.to(param.dtype)
        changes = [(steps[i], step)]
        if master:
            changes.append((as_rows(masters[i]), new_w))
        if eight_bit:
            m_code, m_scale = quantize(m.to(torch.float32), random_bits(key, width, 1), signed=True)
            v_code, v_scale = quantize(v.to(torch.float32), random_bits(key, width, 2), signed=False)
            changes += [(as_rows(exp_avg[i]), m_code), (exp_avg_scale[i], m_scale)]
            changes += [(as_rows(exp_avg_sq[i]), v_code), (exp_avg_sq_scale[i], v_scale)]
        else:
            changes += [(as_rows(exp_avg[i]), m.to(torch.float32)), (as_rows(exp_avg_sq[i]), v.to(torch.float32))]
        if skip is not None:
            stored = torch.where(skip, param2.index_select(0, index), stored)
        param2.index_copy_(0, index, stored)
        for old, new in changes:
            old.copy_(new if skip is None else torch.where(skip, old, new))


def relevance_sparse_adamw_(
    params: Sequence[Tensor],
    rows: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    steps: Sequence[Tensor],
    exp_avg_scale: Sequence[Tensor],
    exp_avg_sq_scale: Sequence[Tensor],
    masters: Sequence[Tensor],
    out: Sequence[Tensor],
    criteria: Sequence[int],
    slots: Sequence[int],
    lr_tensor: Tensor | None,
    clip_coef: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    stochastic_rounding: bool,
    seed: int,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The relevance of every row from the weights before the step, then the step of the selected rows."""
    sqnorm = neuron_relevance_(
        params, grads, out, criteria, [0] * len(params), slots, grad_scale, found_inf, dtype=dtype
    )
    sparse_adamw_(
        params, rows, grads, exp_avg, exp_avg_sq, steps, exp_avg_scale, exp_avg_sq_scale, masters,
        lr_tensor, clip_coef, grad_scale, found_inf, lr, beta1, beta2, eps, weight_decay, maximize,
        stochastic_rounding, seed, dtype=dtype,
    )  # fmt: skip
    return sqnorm


# --- selective weight gradient ----------------------------------------------------------------------------------


def selected_weight_grad(x: Tensor, grad_out: Tensor, rows: Tensor) -> Tensor:
    """``(grad_out[..., rows])^T @ x``: the weight gradient of the selected rows only, ``[k, in]``."""
    selected = grad_out.reshape(-1, grad_out.shape[-1]).index_select(1, rows)
    return selected.t() @ x.reshape(-1, x.shape[-1])
