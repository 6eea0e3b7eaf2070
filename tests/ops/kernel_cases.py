"""Inputs of the kernel tests: odd shapes, strides and dtypes, and calls into the compiled op and its twin."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from leaml_plugin import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "padded", "transposed", "every_other")
# around the sizes at which the code changes its path: lanes of 32, chunks of 64, blocks of 256, tiles of 512, pages
WIDTHS = (0, 1, 2, 7, 31, 32, 33, 64, 255, 256, 257, 512, 1023, 1030, 2050)

shapes = st.tuples(st.sampled_from((0, 1, 2, 3, 17, 65, 130)), st.sampled_from(WIDTHS))
dtypes = st.sampled_from(DTYPES)
layouts = st.sampled_from(LAYOUTS)
# gradients come in strides of their own: .sum().backward() gives one number expanded, .sum(0) one row
grad_layouts = st.sampled_from((*LAYOUTS, "one_number", "one_row"))
# nothing, squares among the subnormal numbers of fp32, ordinary, squares near fp32's largest number
grad_scales = st.sampled_from((0.0, 1e-22, 1e-3, 0.1, 1e18))
bad_values = st.sampled_from((None, None, None, math.nan, math.inf, -math.inf))


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same values under other strides."""
    rows, columns = values.shape
    if layout in ("one_number", "one_row"):
        first = values.new_zeros(1, 1 if layout == "one_number" else columns)
        if values.numel():
            first.copy_(values[:1, : first.shape[1]])
        return first.expand(rows, columns)
    if layout == "padded":
        result = values.new_zeros(rows, columns + 3)[:, :columns]
    elif layout == "transposed":
        result = values.new_zeros(columns, rows).t()
    elif layout == "every_other":
        result = values.new_zeros(rows, 2 * columns)[:, ::2]
    else:
        result = torch.empty_like(values)
    return result.copy_(values)


def random_matrix(
    shape: tuple[int, int], dtype: torch.dtype, layout: str, seed: int, scale: float = 1.0, bad: float | None = None
) -> Tensor:
    """Normal numbers times ``scale``; ``bad`` in one place at random."""
    generator = torch.Generator().manual_seed(seed)
    values = (torch.randn(*shape, generator=generator) * scale).to(dtype)
    if bad is not None and values.numel():
        values.view(-1)[int(torch.randint(values.numel(), (1,), generator=generator))] = bad
    return laid_out(values, layout)


def bits(tensor: Tensor) -> Tensor:
    """The raw bytes, so that NaN equals NaN and -0 differs from 0."""
    return tensor.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


def same_bits(got: Tensor, wanted: Tensor) -> bool:
    """Equal bit for bit where neither is NaN, and NaN in the same places."""
    nan = wanted.isnan()
    return torch.equal(got.isnan(), nan) and torch.equal(bits(got[~nan]), bits(wanted[~nan]))


def random_rows(neurons: int, k: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(neurons, generator=generator)[:k].sort().values


@dataclass
class Problem:
    """Everything one sparse AdamW call changes or reads, for a list of parameters."""

    params: list[Tensor]
    rows: list[Tensor]
    grads: list[Tensor]
    states: list[dict[str, Tensor]]
    options: dict[str, Any] = field(default_factory=dict)

    def copy(self) -> Problem:
        def same_strides(t: Tensor) -> Tensor:
            return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype).copy_(t)

        return Problem(
            [same_strides(p) for p in self.params],
            list(self.rows),
            list(self.grads),
            copy.deepcopy(self.states),
            dict(self.options),
        )

    def arguments(self) -> tuple[tuple[list[Tensor], ...], dict[str, Any]]:
        def column(name: str) -> list[Tensor]:
            return [state[name] for state in self.states]

        options = dict(self.options)
        if self.states and "exp_avg_scale" in self.states[0]:
            options["scales"] = (column("exp_avg_scale"), column("exp_avg_sq_scale"))
        if self.states and "master" in self.states[0]:
            options["masters"] = column("master")
        lists = (self.params, self.rows, self.grads, column("exp_avg"), column("exp_avg_sq"), column("step"))
        return lists, options

    def step(self, backend: str) -> None:
        lists, options = self.arguments()
        with ops.use_backend(backend):
            ops.sparse_adamw_(*lists, **options)

    def tensors(self) -> list[Tensor]:
        return [*self.params, *(tensor for state in self.states for tensor in state.values())]


def make_problem(
    shapes: list[tuple[int, int]],
    dtype: torch.dtype = torch.float32,
    grad_dtype: torch.dtype | None = None,
    layout: str = "contiguous",
    density: float = 0.3,
    compact: bool = False,
    eight_bit: bool = False,
    master: bool = False,
    seed: int = 0,
    grad_layout: str | None = None,
    grad_magnitude: float = 0.1,
    bad: float | None = None,
    **options: Any,
) -> Problem:
    params, rows, grads, states = [], [], [], []
    for i, shape in enumerate(shapes):
        param = random_matrix(shape, dtype, layout, seed + 7 * i)
        k = ops.selected_count(density, shape[0])
        index = random_rows(shape[0], k, seed + i)
        grad_shape = (k, shape[1]) if compact else shape
        params.append(param)
        rows.append(index)
        grads.append(
            random_matrix(grad_shape, grad_dtype or dtype, grad_layout or layout, seed + 7 * i + 3, grad_magnitude, bad)
        )
        states.append(ops.new_state(param, index, eight_bit=eight_bit, master=master))
    return Problem(params, rows, grads, states, {"lr": 1e-2, "seed": 11, **options})


FFN_SLOTS = [0, 0, 0, 1, 1, 1]


def ffn_problem(dtype: torch.dtype, neurons: int, hidden: int, **kind: bool) -> Problem:
    """Two blocks' gate, up and down, each weight and gradient by its neurons' rows; a block's selection is one."""
    result = Problem([], [], [], [], {})
    for number in range(2):
        gate_up = make_problem([(neurons, hidden)] * 2, dtype, density=0.2, seed=100 * number)
        # down lies as [hidden, neurons] and is seen from its columns
        down = make_problem([(neurons, hidden)], dtype, layout="transposed", density=0.2, seed=100 * number + 50)
        params = gate_up.params + down.params
        result.params += params
        result.grads += gate_up.grads + down.grads
        result.rows += gate_up.rows[:1] * 3
        result.states += [ops.new_state(param, gate_up.rows[0], **kind) for param in params]
        result.options = gate_up.options
    return result
