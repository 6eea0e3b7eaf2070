"""``leaml bench kernels``: every op against named peers and against the physical limit, in one run.

Covers: relevance (of rows by one criterion and by all four, of columns), selection, sparse AdamW (of rows and of
columns), their fusion and the selective weight gradient, by dtype and density, at the layer shapes of Qwen2.5-VL. Each
repetition times every contender once, in rotated order; a ratio is the median over the repetitions of ``peer time / our
time`` of the same repetition, so a slow moment of the machine hits both sides. On the CPU with one thread it is that
thread's CPU time that is taken, which a busy neighbour does not lengthen.
Does not cover: whole training steps (``step``) and correctness (the tests).

The limit of an op is the time its necessary bytes take at the bandwidth measured in the same repetition: by reading as
many where the op only reads; for a sparse step on a CPU by moving the very same rows and state without any arithmetic,
since scattered rows cannot stream. ``stream_share`` is the share of what as many adjacent bytes would take.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from leaml_plugin.artifacts import read_json, write_text
from leaml_plugin.benchmark import tables
from leaml_plugin.errors import LeamlError, unknown_name
from leaml_plugin.report.markdown import require_marks, write_between

OPS = ("relevance", "select", "sparse_adamw", "fusion", "weight_grad")
DTYPES = ("float32", "bfloat16", "float16")
GPU_LAYERS = 4  # of a 7B model: a billion weights, far more than the caches hold
STATES = ("fp32", "8bit", "master")  # of the optimizer: fp32; 8-bit in blocks; fp32 with fp32 masters of half weights
# (hidden, feed-forward, key-value width, layers of the language model)
MODELS = {
    "qwen2.5-vl-3b": (2048, 11008, 256, 36),
    "qwen2.5-vl-7b": (3584, 18944, 512, 28),
    "tiny": (256, 688, 64, 2),
}


@dataclass(frozen=True)
class Config:
    """Options of the benchmark; the defaults fit a laptop's CPU."""

    ops: Sequence[str] = OPS
    dtypes: Sequence[str] = DTYPES
    densities: Sequence[float] = (0.01, 0.05, 0.10, 0.20)
    model: str = "qwen2.5-vl-3b"
    layers: int = 0  # 0: one on a CPU, at most GPU_LAYERS on a GPU
    device: str = "auto"
    threads: int = 1
    pairs: int = 15
    compile: bool = True
    peers: Sequence[str] = ()  # none: all
    json: Path | None = None
    plot: Path | None = None
    page: Path | None = None
    rows: Path | None = None

    def validate(self) -> None:
        """Raises LeamlError for a name that is not known or a number out of range."""
        for kind, values, known in (("op", self.ops, OPS), ("dtype", self.dtypes, DTYPES)):
            for value in values:
                if value not in known:
                    raise unknown_name(f"benchmark {kind}", value, known)
        if self.model not in MODELS:
            raise unknown_name("benchmark model", self.model, MODELS)
        for density in self.densities:
            if not 0.0 < density <= 1.0:
                raise LeamlError(f"--densities: wanted fractions above 0 and up to 1, got {density}.")
        if self.pairs < 3:
            raise LeamlError(f"--pairs: a median needs at least 3, got {self.pairs}.")
        if self.page is not None:
            require_marks(self.page)


@dataclass
class Contender:
    """One way to do the work. ``before`` is not timed."""

    name: str
    run: Callable[[], Any]
    before: Callable[[], Any] | None = None


@dataclass
class Row:
    """One line of the result: times in milliseconds, ``ratio[peer]`` = peer's time / our time."""

    op: str
    dtype: str
    density: float | None
    device: str
    time_ms: float
    limit_share: float | None
    ratio: dict[str, float]
    spread: dict[str, tuple[float, float]] = field(default_factory=dict)
    stream_share: float | None = None
    state: str | None = None
    bytes: int | None = None
    bandwidth_gb_s: float | None = None
    model: str = ""
    layers: int = 0
    parameters: int = 0
    pairs: int = 0
    machine: dict[str, Any] = field(default_factory=dict)


# --- measuring -----------------------------------------------------------------------------------------------------


class Timer:
    """Milliseconds of one call: CUDA events, the thread's CPU time, or the clock where there are several threads.

    On a GPU the work queues up behind a short sleep of the device, as it does in training, where the host runs ahead:
    else the time it takes to launch would count as the device's.
    """

    def __init__(self, device: Any, threads: int):
        import torch

        self.cuda = device.type == "cuda"
        self.torch = torch
        self.clock = time.thread_time_ns if threads == 1 else time.perf_counter_ns

    def __call__(self, contender: Contender) -> float:
        if contender.before is not None:
            contender.before()
        if not self.cuda:
            start = self.clock()
            contender.run()
            return (self.clock() - start) / 1e6
        begin, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.torch.cuda.synchronize()
        self.torch.cuda._sleep(4_000_000)  # cycles: about two milliseconds
        begin.record()
        contender.run()
        end.record()
        self.torch.cuda.synchronize()
        return begin.elapsed_time(end)


def compare(contenders: Sequence[Contender], timer: Timer, pairs: int) -> list[dict[str, float]]:
    """``pairs`` repetitions of all contenders, each repetition in another order, after two to warm up."""
    for contender in contenders:
        for _ in range(2):
            timer(contender)
    result = []
    for number in range(pairs):
        shift = number % len(contenders)
        order = [*contenders[shift:], *contenders[:shift]]
        result.append({contender.name: timer(contender) for contender in order})
    return result


def quantile(values: Sequence[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def summary(times: list[dict[str, float]], limit_bytes: int | None, measured_bytes: int) -> dict[str, Any]:
    """Medians of the paired ratios. ``limit`` moved ``measured_bytes``; the op needs ``limit_bytes``."""
    ours = [t["ours"] for t in times]
    result: dict[str, Any] = {"time_ms": statistics.median(ours), "ratio": {}, "spread": {}, "limit_share": None}
    for name in times[0]:
        if name in ("ours", "limit", "same_bytes"):
            continue
        ratios = [t[name] / t["ours"] for t in times]
        result["ratio"][name] = round(statistics.median(ratios), 3)
        result["spread"][name] = (round(quantile(ratios, 0.2), 3), round(quantile(ratios, 0.8), 3))
    if "limit" in times[0] and limit_bytes:
        shares = [t["limit"] * limit_bytes / measured_bytes / t["ours"] for t in times]
        result["limit_share"] = round(statistics.median(shares), 3)
        result["spread"]["limit"] = (round(quantile(shares, 0.2), 3), round(quantile(shares, 0.8), 3))
        result["bandwidth_gb_s"] = round(measured_bytes / statistics.median(t["limit"] for t in times) / 1e6, 1)
        result["bytes"] = limit_bytes
    if "same_bytes" in times[0]:
        result["stream_share"] = result["limit_share"]
        result["spread"]["stream"] = result["spread"]["limit"]
        shares = [t["same_bytes"] / t["ours"] for t in times]
        result["limit_share"] = round(statistics.median(shares), 3)
        result["spread"]["limit"] = (round(quantile(shares, 0.2), 3), round(quantile(shares, 0.8), 3))
    return result


class Limit:
    """A buffer that is streamed through memory: the read-modify-write (or the read) that bounds an op."""

    def __init__(self, count: int, device: Any, read_only: bool):
        import torch

        # larger than the caches, whatever the op moves; the time is scaled to the op's bytes
        least = (2**30 if device.type == "cuda" else 48 * 2**20) // 4
        self.elements = max(count // (4 if read_only else 8), least)
        self.buffer = torch.ones(self.elements, device=device)
        self.bytes = self.elements * (4 if read_only else 8)
        self.contender = Contender("limit", self.buffer.sum if read_only else lambda: self.buffer.add_(1.0))


def same_bytes(layers: Layers) -> Contender:
    """The traffic of a sparse step over the selected rows and nothing else: the limit that scattered rows set."""
    from leaml_plugin import _native

    traffic = _native.RowTraffic()
    for weight, rows, grad, exp_avg, exp_avg_sq, _ in zip(*layers.step_lists):
        size = weight.shape[1] * weight.element_size()
        state = exp_avg.shape[1] * exp_avg.element_size()
        for number, row in enumerate(rows.tolist()):
            traffic.add(
                weight.data_ptr() + row * size, grad.data_ptr() + row * size, exp_avg.data_ptr() + number * state,
                exp_avg_sq.data_ptr() + number * state, size, state,
            )  # fmt: skip
    return Contender("same_bytes", traffic.move)


# --- the layers ----------------------------------------------------------------------------------------------------


def layer_shapes(model: str) -> list[tuple[int, int]]:
    """``[out, in]`` of one decoder layer's Linears: q, k, v, o, gate, up, down."""
    hidden, inner, kv, _ = MODELS[model]
    return [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden), *[(inner, hidden)] * 2, (hidden, inner)]


class Layers:
    """Weights, gradients, rows and state of some layers in one dtype."""

    def __init__(self, config: Config, dtype: Any, device: Any, layers: int):
        import torch

        self.device, self.dtype, self.layers = device, dtype, layers
        shapes = layer_shapes(config.model) * layers
        generator = torch.Generator(device).manual_seed(0)

        def normal(scale: float) -> list[Any]:
            return [(torch.randn(s, device=device, generator=generator) * scale).to(dtype) for s in shapes]

        self.weights, self.grads = normal(0.02), normal(1e-3)
        self.out = self.zeros(lambda w: (w.shape[0],))
        self.parameters = sum(w.numel() for w in self.weights)

    def zeros(self, shape: Callable[[Any], tuple[int, ...]]) -> list[Any]:
        """An fp32 tensor a weight."""
        import torch

        return [torch.zeros(shape(w), device=self.device) for w in self.weights]

    def select(self, density: float) -> None:
        """Rows of a random selection."""
        import torch

        from leaml_plugin import ops

        generator = torch.Generator().manual_seed(1)
        self.rows = [
            torch.randperm(w.shape[0], generator=generator)[: ops.selected_count(density, w.shape[0])].sort().values
            for w in self.weights
        ]
        self.rows = [r.to(self.device) for r in self.rows]
        self.keep("fp32")
        self.selected = sum(m.numel() for m in self.exp_avg)

    def turned(self, density: float) -> Layers:
        """The same weights and gradients by their columns, a random selection of which is trained."""
        result = copy.copy(self)
        result.weights, result.grads = [w.t() for w in self.weights], [g.t() for g in self.grads]
        result.select(density)
        return result

    def keep(self, kind: str) -> None:
        """Fresh optimizer state of a kind of ``STATES``."""
        from leaml_plugin import ops

        wanted = {"eight_bit": kind == "8bit", "master": kind == "master"}
        states = [ops.new_state(w, r, **wanted) for w, r in zip(self.weights, self.rows)]
        self.exp_avg, self.exp_avg_sq, self.steps = ([s[k] for s in states] for k in ("exp_avg", "exp_avg_sq", "step"))
        self.options: dict[str, Any] = {"lr": HYPER[0]}
        if kind == "8bit":
            self.options["scales"] = tuple([s[k] for s in states] for k in ("exp_avg_scale", "exp_avg_sq_scale"))
        if kind == "master":
            self.options["masters"] = [s["master"] for s in states]

    def step_bytes(self, kind: str) -> int:
        """What a step must move for the selected weights: the gradient read; weight, moments and masters both ways (a
        weight that has a master is only written)."""
        size, scales = self.weights[0].element_size(), 4 / 256
        state = {"fp32": 16, "8bit": 2 * 2 * (1 + scales), "master": 24}[kind]
        return round(self.selected * (size + (1 if kind == "master" else 2) * size + state))

    @property
    def step_lists(self) -> tuple[list[Any], ...]:
        return self.weights, self.rows, self.grads, self.exp_avg, self.exp_avg_sq, self.steps


# --- the peers -------------------------------------------------------------------------------------------------------


def eager_relevance(weights, grads, out) -> None:
    """What one writes in PyTorch: the first-order Taylor score of every row."""
    for w, g, o in zip(weights, grads, out):
        o += (w * g).sum(1, dtype=o.dtype).abs()


def eager_relevance_of_columns(weights, grads, out) -> None:
    """The same of every input column."""
    for w, g, o in zip(weights, grads, out):
        o += (w * g).sum(0, dtype=o.dtype).abs()


def eager_relevance_all(weights, grads, out) -> None:
    """All four criteria of every row: ``out`` is ``[4, rows]`` each."""
    for w, g, o in zip(weights, grads, out):
        product, squares = w * g, (g * g).sum(1, dtype=o.dtype)
        o[0] += product.sum(1, dtype=o.dtype).abs()
        o[1] += product.abs().sum(1, dtype=o.dtype)
        o[2] += squares
        o[3] += squares.sqrt()


def eager_relevance_and_norm(weights, grads, out) -> Any:
    """The same and the gradients' norm for clipping, which our op returns anyway."""
    import torch

    eager_relevance(weights, grads, out)
    return torch.nn.utils.get_total_norm(grads)


def eager_sparse_adamw(weights, rows, grads, exp_avg, exp_avg_sq, step, lr, beta1, beta2, eps, decay) -> None:
    """The selected rows by indexing, fp32 state."""
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    for w, r, g, m, v in zip(weights, rows, grads, exp_avg, exp_avg_sq):
        own, grad = w[r].to(m.dtype), g[r].to(m.dtype)
        m.lerp_(grad, 1 - beta1)
        v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        own = own * (1 - lr * decay) - (lr / correction1) * m / ((v / correction2).sqrt() + eps)
        w[r] = own.to(w.dtype)


HYPER = (1e-4, 0.9, 0.999, 1e-8, 0.01)


def gather_fused_scatter(layers: Layers) -> Callable[[], None]:
    import torch

    scalar_steps = [torch.ones((), device=layers.device) for _ in layers.weights]
    lr, beta1, beta2, eps, decay = HYPER

    def run() -> None:
        own = [w.index_select(0, r).float() for w, r in zip(layers.weights, layers.rows)]
        grads = [g.index_select(0, r).float() for g, r in zip(layers.grads, layers.rows)]
        torch._fused_adamw_(
            own, grads, layers.exp_avg, layers.exp_avg_sq, [], scalar_steps,
            lr=lr, beta1=beta1, beta2=beta2, weight_decay=decay, eps=eps, amsgrad=False, maximize=False,
        )  # fmt: skip
        for w, r, values in zip(layers.weights, layers.rows, own):
            w.index_copy_(0, r, values.to(w.dtype))

    return run


def masked_dense(layers: Layers, kind: str) -> list[Contender]:
    """torch.optim.AdamW over whole weights: with their gradients masked, which every step has to do, as each backward
    pass makes new ones; and the optimizer's step alone."""
    import torch

    params = [torch.nn.Parameter(w.clone()) for w in layers.weights]
    masks = []
    for p, g, r in zip(params, layers.grads, layers.rows):
        p.grad = g.clone()
        masks.append(torch.zeros(len(g), 1, dtype=g.dtype, device=g.device))
        masks[-1][r] = 1
    grads = [p.grad for p in params]
    optimizer = torch.optim.AdamW(params, lr=HYPER[0], weight_decay=HYPER[4], **{kind: True})

    def masked() -> None:
        torch._foreach_mul_(grads, masks)
        optimizer.step()

    return [Contender(f"dense_{kind}_masked", masked), Contender(f"dense_{kind}", optimizer.step)]


def optional_gpu_peers(layers: Layers) -> list[Contender]:
    """bitsandbytes' and apex's dense AdamW, their steps alone, where installed."""
    import importlib.util

    import torch

    peers = []

    def params() -> list[Any]:
        result = [torch.nn.Parameter(w.clone()) for w in layers.weights]
        for p, g in zip(result, layers.grads):
            p.grad = g.clone()
        return result

    if importlib.util.find_spec("bitsandbytes"):
        import bitsandbytes

        peers.append(Contender("bitsandbytes_8bit", bitsandbytes.optim.AdamW8bit(params(), lr=HYPER[0]).step))
    if importlib.util.find_spec("apex"):
        from apex.optimizers import FusedAdam

        peers.append(Contender("apex_fused", FusedAdam(params(), lr=HYPER[0]).step))
    return peers


# --- the ops ------------------------------------------------------------


class Bench:
    """State of one run: the device, what was asked for, and the rows so far."""

    def __init__(self, config: Config):
        import torch

        from leaml_plugin import ops
        from leaml_plugin.ops import _loader

        config.validate()
        self.config = config
        name = config.device if config.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
        self.device = torch.device(name)
        torch.set_num_threads(config.threads)
        if not _loader.native(self.device):
            raise LeamlError(f"bench kernels: the compiled kernels for {self.device.type} are missing; {why(ops)}")
        self.timer = Timer(self.device, config.threads)
        self.machine = machine(self.device, config.threads)
        self.rows: list[Row] = []

    def layers_that_fit(self, element_size: int) -> int:
        if self.config.layers:
            return self.config.layers
        if self.device.type == "cpu":
            return 1
        import torch

        per_layer = sum(a * b for a, b in layer_shapes(self.config.model))
        free, _ = torch.cuda.mem_get_info()
        # weight, gradient, a dense peer's copy of both with its two moments and temporaries, our states
        return max(1, min(GPU_LAYERS, int(free * 0.8 / (per_layer * (8 * element_size + 16)))))

    def wanted(self, contenders: list[Contender]) -> list[Contender]:
        if not self.config.peers:
            return contenders
        return [c for c in contenders if c.name in ("ours", "limit", "same_bytes") or c.name in self.config.peers]

    def measure(self, op: str, dtype: str, density: float | None, contenders: list[Contender], limit: Limit | None,
                needed: int | None, layers: Layers | None, state: str | None = None) -> None:  # fmt: skip
        chosen = self.wanted([*contenders, *([limit.contender] if limit else [])])
        times = compare(chosen, self.timer, self.config.pairs)
        values = summary(times, needed, limit.bytes if limit else 0)
        self.rows.append(
            Row(op=op, dtype=dtype, density=density, device=self.machine["device"], model=self.config.model,
                layers=layers.layers if layers else 0, parameters=layers.parameters if layers else 0,
                pairs=self.config.pairs, machine=self.machine, state=state, **values)
        )  # fmt: skip
        print(line(self.rows[-1]), flush=True)
        self.write()

    def write(self) -> None:
        """All rows so far: a run that is cut off leaves what it has measured."""
        if self.config.json is not None:
            self.config.json.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.config.json, json.dumps(as_json(self.rows), indent=1) + "\n")

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        import torch

        torch._dynamo.reset()  # more than eight versions of one function would silently run uncompiled
        return torch.compile(function)

    def relevance(self, dtype: str, layers: Layers) -> None:
        """Rows by one criterion, rows by all four, columns: every weight and gradient is read once in each."""
        from leaml_plugin import ops

        columns, table = layers.zeros(lambda w: (w.shape[1],)), layers.zeros(lambda w: (4, w.shape[0]))
        needed = 2 * layers.parameters * layers.weights[0].element_size()
        for op, out, options, eager in (
            ("relevance", layers.out, {}, eager_relevance),
            ("relevance_all", table, {"criteria": list(ops.CRITERIA)}, eager_relevance_all),
            ("relevance_columns", columns, {"dims": 1}, eager_relevance_of_columns),
        ):
            self.relevance_of(op, dtype, layers, (layers.weights, layers.grads, out), options, eager, needed)

    def relevance_of(self, op: str, dtype: str, layers: Layers, lists: Any, options: dict[str, Any], eager: Any,
                     needed: int) -> None:  # fmt: skip
        from leaml_plugin import ops

        contenders = [
            Contender("ours", lambda: ops.neuron_relevance_(*lists, **options)),
            Contender("eager", lambda: eager(*lists)),
        ]
        if op == "relevance":
            contenders.append(Contender("eager_with_norm", lambda: eager_relevance_and_norm(*lists)))
        if self.config.compile:
            fast = self.compiled(eager)
            contenders.append(Contender("compile", lambda: fast(*lists)))
        self.measure(op, dtype, None, contenders, Limit(needed, self.device, True), needed, layers)

    def sparse_adamw(self, dtype: str, layers: Layers, density: float) -> None:
        import torch

        from leaml_plugin import ops

        step = torch.ones((), device=layers.device)
        ours = Contender("ours", lambda: ops.sparse_adamw_(*layers.step_lists, **layers.options))
        contenders = [
            ours,
            Contender("gather_fused_scatter", gather_fused_scatter(layers)),
            Contender("eager", lambda: eager_sparse_adamw(*layers.step_lists[:5], step, *HYPER)),
        ]
        if layers.device.type == "cpu":
            contenders.append(same_bytes(layers))
        # on a GPU, where compiling takes most of the time, at the densities that the bars are about
        if self.config.compile and (layers.device.type == "cpu" or density in (0.05, 0.10)):
            fast = self.compiled(eager_sparse_adamw)
            contenders.append(Contender("compile", lambda: fast(*layers.step_lists[:5], step, *HYPER)))
        needed = layers.step_bytes("fp32")
        self.measure(
            "sparse_adamw", dtype, density, contenders, Limit(needed, self.device, False), needed, layers, "fp32"
        )
        # the dense peers take so long that a few pairs tell: a measurement of their own, with ours beside it
        few = max(3, self.config.pairs // 3)
        for kind in ("fused", "foreach"):
            chosen = self.wanted([ours, *masked_dense(layers, kind)])
            if len(chosen) > 1:
                merge(self.rows[-1], summary(compare(chosen, self.timer, few), None, 0))
            del chosen  # a copy of the weights, their gradients and moments
            if layers.device.type == "cuda":
                torch.cuda.empty_cache()
        if layers.device.type == "cuda":
            for peer in optional_gpu_peers(layers):
                merge(self.rows[-1], summary(compare([ours, peer], self.timer, few), None, 0))
        print(line(self.rows[-1]), flush=True)
        self.columns(dtype, layers.turned(density), density)
        for state in STATES[1:] if not self.config.peers else ():
            self.other_state(dtype, layers, density, state)

    def columns(self, dtype: str, layers: Layers, density: float) -> None:
        """The step of input columns. No limit: how many bytes move depends on which columns share a cache line."""
        import torch

        from leaml_plugin import ops

        step = torch.ones((), device=layers.device)
        contenders = [
            Contender("ours", lambda: ops.sparse_adamw_(*layers.step_lists, **layers.options)),
            Contender("gather_fused_scatter", gather_fused_scatter(layers)),
            Contender("eager", lambda: eager_sparse_adamw(*layers.step_lists[:5], step, *HYPER)),
        ]
        self.measure("sparse_adamw_columns", dtype, density, contenders, None, None, layers, "fp32")

    def other_state(self, dtype: str, layers: Layers, density: float, state: str) -> None:
        """The step and the fusion with 8-bit states or masters, against those with plain fp32 states."""
        from leaml_plugin import ops

        if state == "master" and dtype == "float32":
            return
        layers.keep("fp32")
        lists, options = layers.step_lists, layers.options
        layers.keep(state)
        contenders = [
            Contender("ours", lambda: ops.sparse_adamw_(*layers.step_lists, **layers.options)),
            Contender("ours_fp32_state", lambda: ops.sparse_adamw_(*lists, **options)),
        ]
        needed = layers.step_bytes(state)
        self.measure(
            "sparse_adamw", dtype, density, contenders, Limit(needed, self.device, False), needed, layers, state
        )
        if "fusion" in self.config.ops:
            self.fusion(dtype, layers, density, state)
        layers.keep("fp32")

    def fusion(self, dtype: str, layers: Layers, density: float, state: str = "fp32") -> None:
        from leaml_plugin import ops

        size = layers.weights[0].element_size()
        # every weight and gradient once; of the selected what the step moves but for reading these two
        read_anyway = layers.selected * (size if state == "master" else 2 * size)
        needed = 2 * layers.parameters * size + layers.step_bytes(state) - read_anyway

        def parts() -> None:
            ops.neuron_relevance_(layers.weights, layers.grads, layers.out)
            ops.sparse_adamw_(*layers.step_lists, **layers.options)

        contenders = [
            Contender("ours", lambda: ops.relevance_sparse_adamw_(*layers.step_lists, layers.out, **layers.options)),
            Contender("our_two_parts", parts),
            Contender("relevance_alone", lambda: ops.neuron_relevance_(layers.weights, layers.grads, layers.out)),
        ]
        self.measure("fusion", dtype, density, contenders, Limit(needed, self.device, True), needed, layers, state)

    def select(self, density: float) -> None:
        """One score for every neuron of the whole model."""
        import torch

        from leaml_plugin import ops

        count = MODELS[self.config.model][3]
        scores = [torch.rand(shape[0], device=self.device) for shape in layer_shapes(self.config.model) * count]
        flat = torch.cat(scores)
        k = ops.selected_count(density, flat.numel())
        contenders = [
            Contender("ours", lambda: ops.select_top(scores, density, scope="model")),
            Contender("topk", lambda: torch.topk(torch.cat(scores), k).indices.sort()),
            Contender("sort", lambda: torch.sort(torch.cat(scores), descending=True, stable=True).indices[:k].sort()),
        ]
        self.measure("select", "float32", density, contenders, None, None, None)

    def weight_grad(self, dtype: str, torch_dtype: Any, density: float) -> None:
        """Tokens of a short batch through the feed-forward projection."""
        import torch

        from leaml_plugin import ops

        hidden, inner, _, _ = MODELS[self.config.model]
        tokens = 256 if self.device.type == "cpu" else 8192
        x = torch.randn(tokens, hidden, device=self.device).to(torch_dtype)
        grad = torch.randn(tokens, inner, device=self.device).to(torch_dtype)
        k = ops.selected_count(density, inner)
        rows = torch.randperm(inner, generator=torch.Generator().manual_seed(0))[:k].sort().values.to(self.device)
        contenders = [
            Contender("ours", lambda: ops.selected_weight_grad(x, grad, rows)),
            Contender("whole_gradient", lambda: grad.t() @ x),
            Contender("whole_then_select", lambda: (grad.t() @ x).index_select(0, rows)),
        ]
        self.measure("weight_grad", dtype, density, contenders, None, None, None)

    def run(self) -> list[Row]:
        import torch

        config = self.config
        print(header(self.machine), flush=True)
        if "select" in config.ops:
            for density in config.densities:
                self.select(density)
        for dtype in config.dtypes:
            torch_dtype = getattr(torch, dtype)
            if "weight_grad" in config.ops:
                for density in config.densities:
                    self.weight_grad(dtype, torch_dtype, density)
            if not {"relevance", "sparse_adamw", "fusion"} & set(config.ops):
                continue
            layers = Layers(config, torch_dtype, self.device, self.layers_that_fit(torch_dtype.itemsize))
            if "relevance" in config.ops:
                self.relevance(dtype, layers)
            for density in config.densities:
                layers.select(density)
                if "sparse_adamw" in config.ops:
                    self.sparse_adamw(dtype, layers, density)
                if "fusion" in config.ops:
                    self.fusion(dtype, layers, density)
            del layers
        if self.device.type == "cpu" and {"relevance", "sparse_adamw"} & set(config.ops) and not config.peers:
            self.tuned_allocator()
        return self.rows

    def tuned_allocator(self) -> None:
        """The peers that make large temporaries again, where the allocator keeps large blocks: no page faults then."""
        tuned = [op for op in ("relevance", "sparse_adamw") if op in self.config.ops]
        peers = {"eager", "eager_with_norm", "gather_fused_scatter"}
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "rows.json"
            command = [
                sys.executable, "-m", "leaml_plugin.benchmark.kernels", "--ops", *tuned, "--peers", *peers,
                "--dtypes", *self.config.dtypes, "--densities", *map(str, self.config.densities), "--model",
                self.config.model, "--device", "cpu", "--layers", str(self.config.layers), "--threads",
                str(self.config.threads), "--pairs", str(self.config.pairs), "--json", str(target),
            ]  # fmt: skip
            keeping = {"MALLOC_MMAP_THRESHOLD_": str(4 << 30), "MALLOC_TRIM_THRESHOLD_": str(16 << 30)}
            subprocess.run(command, env={**os.environ, **keeping}, check=True, stdout=subprocess.DEVNULL)
            own = {(row.op, row.dtype, row.density): row for row in self.rows if row.state in (None, "fp32")}
            for extra in json.loads(target.read_text()):
                row = own[extra["op"], extra["dtype"], extra["density"]]
                for peer in peers & extra["ratio"].keys():
                    row.ratio[f"{peer}_tuned_malloc"] = extra["ratio"][peer]
                    row.spread[f"{peer}_tuned_malloc"] = tuple(extra["spread"][peer])
                print(line(row), flush=True)


def merge(row: Row, values: dict[str, Any]) -> None:
    row.ratio |= values["ratio"]
    row.spread |= values["spread"]


def why(ops: Any) -> str:
    info = ops.build_info()
    return "; ".join(str(info[kind]["cause"]) for kind in ("cpu", "cuda") if info[kind]["cause"]) or "forced off"


def machine(device: Any, threads: int) -> dict[str, Any]:
    """What the numbers were taken on."""
    import torch

    from leaml_plugin import ops

    info = ops.build_info()
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), name)
    result = {
        "device": name if device.type == "cpu" else torch.cuda.get_device_name(device),
        "threads": threads,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "cpu_features": info["cpu_features"],
        "date": time.strftime("%Y-%m-%d"),
        "clock": "CUDA events" if device.type == "cuda" else "thread CPU time" if threads == 1 else "wall",
    }
    return result


# --- showing ------------------------------------------------------------


def header(info: dict[str, Any]) -> str:
    return (
        f"{info['device']}, {info['threads']} thread(s), torch {info['torch']}, {info['clock']}; "
        "ratio = peer's time / our time, median of paired runs [20th-80th percentile]"
    )


def line(row: Row) -> str:
    density = "" if row.density is None else f"{row.density:.0%}"
    state = "" if row.state in (None, "fp32") else f" {row.state}"
    share = "" if row.limit_share is None else f"limit {row.limit_share:.2f}"
    share += "" if row.stream_share is None else f" (stream {row.stream_share:.2f})"
    peers = "  ".join(
        f"{name} {value:.2f} [{row.spread[name][0]:.2f}-{row.spread[name][1]:.2f}]" for name, value in row.ratio.items()
    )
    return f"{row.op + state:20} {row.dtype:9} {density:>4} {row.time_ms:9.2f} ms  {share:25} {peers}"


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [vars(row) for row in rows]


def read_rows(path: Path) -> list[Row]:
    """The rows of a file of ``--json``, or of a result file of ``scripts/gpu_check.sh``."""
    found = read_json(path)
    found = found.get("kernels") if isinstance(found, dict) else found
    known = {f.name for f in fields(Row)}
    if not isinstance(found, list) or not all(isinstance(row, dict) and row.keys() <= known for row in found):
        raise LeamlError(f"--rows {path}: wanted the rows that leaml bench kernels --json writes.")
    return [Row(**row) for row in found]


def plot(rows: Sequence[Row], path: Path) -> None:
    """Time of a sparse AdamW step against density, ours and each peer's, one panel a dtype."""
    try:
        import matplotlib
    except ImportError as error:
        raise LeamlError("--plot needs matplotlib; install leaml_plugin[report].") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [row for row in rows if row.op == "sparse_adamw" and row.state == "fp32"]
    dtypes = list(dict.fromkeys(row.dtype for row in steps))
    if not dtypes:
        raise LeamlError("--plot draws sparse_adamw; it is not among the ops measured.")
    size = (4.0 * len(dtypes) + 1.8, 3.6)
    figure, panels = pyplot.subplots(1, len(dtypes), figsize=size, squeeze=False, sharey=True, layout="constrained")
    for panel, dtype in zip(panels[0], dtypes):
        own = [row for row in steps if row.dtype == dtype]
        density = [100 * row.density for row in own]
        panel.plot(density, [row.time_ms for row in own], "o-", lw=2, label="leaml")
        panel.plot(density, [row.time_ms * (row.limit_share or math.nan) for row in own], "k:", label="limit")
        for name, title in tables.PEERS.items():
            if any(name in row.ratio for row in own):
                panel.plot(density, [row.time_ms * row.ratio.get(name, math.nan) for row in own], ".-", label=title)
        panel.set(xscale="log", yscale="log", xlabel="density, %", title=dtype)
        panel.set_xticks(density, [f"{d:g}" for d in density])
        panel.minorticks_off()
    panels[0][0].set_ylabel("ms per step")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside right center", fontsize=7)
    first = steps[0]
    figure.suptitle(f"sparse AdamW, {first.layers} layer(s) of {first.model}, {first.device}", fontsize=9)
    figure.savefig(path)
    pyplot.close(figure)


# --- the command ------------------------------------------------------------


def run(config: Config) -> list[Row]:
    """Measure, or take the rows of a file; write the JSON, the plot and the page where asked for."""
    if config.rows is not None:
        config.validate()
        rows = read_rows(config.rows)
    else:
        bench = Bench(config)
        rows = bench.run()
        bench.write()
    if config.plot is not None:
        plot(rows, config.plot)
    if config.page is not None:
        write_between(config.page, tables.page(as_json(rows)))
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``leaml bench kernels``."""
    default = Config()
    parser.add_argument("--ops", nargs="+", default=list(default.ops), help=f"among {', '.join(OPS)}")
    parser.add_argument("--dtypes", nargs="+", default=list(default.dtypes), help=f"among {', '.join(DTYPES)}")
    parser.add_argument("--densities", nargs="+", type=float, default=list(default.densities), metavar="FRACTION")
    parser.add_argument("--model", default=default.model, help=f"layer shapes: {', '.join(MODELS)}")
    parser.add_argument("--layers", type=int, default=0, help=f"how many (default: 1 on a CPU, {GPU_LAYERS} on a GPU)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 … (default: a GPU where there is one)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; with 1 its CPU time is taken (default: 1)")
    parser.add_argument("--pairs", type=int, default=default.pairs, help="repetitions (default: %(default)s)")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    parser.add_argument("--peers", nargs="+", default=[], help="only these peers")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--plot", type=Path, help="draw cost against density here (.svg, .png)")
    parser.add_argument("--page", type=Path, help="write the tables into this page, between its marks")
    parser.add_argument("--rows", type=Path, help="measure nothing: the plot and the page from a file of --json")


def main(args: argparse.Namespace) -> int:
    """``leaml bench kernels``; exit code 0."""
    names = [f.name for f in fields(Config)]
    run(Config(**{name: getattr(args, name) for name in names}))
    return 0


if __name__ == "__main__":
    _parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(_parser)
    raise SystemExit(main(_parser.parse_args()))
