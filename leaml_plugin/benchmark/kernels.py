"""``leaml bench kernels``: every op against named peers and against the physical limit, in one run.

Covers: relevance (of rows by one criterion and by all four, of columns), selection, sparse AdamW (of rows and of
columns), their fusion (of rows and of feed-forward neurons) and the selective weight gradient, by dtype and density, at
the layer shapes of Qwen2.5-VL. Each repetition times every contender once, in rotated order; a ratio is the median over
the repetitions of ``peer time / our time`` of the same repetition, so a slow moment of the machine hits both sides. On
the CPU with one thread it is that thread's CPU time that is taken, which a busy neighbour does not lengthen.
Does not cover: whole training steps (``step``) and correctness (the tests); the clock (``timing``), what is measured on
(``layers``), the peers (``peers``), the limits (``limits``) and the tables (``tables``) have modules of their own.

The limit of an op is the time its necessary bytes take at the bandwidth measured in the same repetition: by reading as
many where the op only reads; for a sparse step on one thread of a CPU by moving the very same rows and state without
any arithmetic, since scattered rows cannot stream. ``stream_share`` is the share of what as many adjacent bytes would
take; with several threads, and on a GPU, there is only that, and it is the limit. The reading and the moving are done
by whichever loop is the fastest on this machine: torch's, a plain one, or one that prefetches (``limits``);
``limit_by`` says which it was. A loop that any op could overtake would be no limit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
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
from leaml_plugin.benchmark.layers import MODELS, STATES, Layers, layer_shapes, random_rows
from leaml_plugin.benchmark.limits import Limit, column_bytes, fastest, feed_forward_bytes, same_bytes, same_product
from leaml_plugin.benchmark.peers import (
    HYPER,
    eager_fusion,
    eager_fusion_feed_forward,
    eager_relevance,
    eager_relevance_all,
    eager_relevance_and_norm,
    eager_relevance_of_columns,
    eager_select,
    eager_sparse_adamw,
    eager_weight_grad,
    gather_fused_scatter,
    masked_dense,
    optional_gpu_peers,
    relevance_and_squared_norm,
)
from leaml_plugin.benchmark.timing import Contender, Timer, compare, summary
from leaml_plugin.errors import LeamlError, unknown_name
from leaml_plugin.report.markdown import require_marks, write_between

OPS = ("relevance", "select", "sparse_adamw", "fusion", "weight_grad")
LARGEST = "qwen2.5-vl-7b"  # selection is so quick that it is measured at this model's size too
DTYPES = ("float32", "bfloat16", "float16")
GPU_LAYERS = 4  # of a 7B model: a billion weights, far more than the caches hold


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
    limit_by: dict[str, str] = field(default_factory=dict)  # the fastest way to do what bounds the op
    model: str = ""
    layers: int = 0
    parameters: int = 0
    pairs: int = 0
    machine: dict[str, Any] = field(default_factory=dict)


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
        return [c for c in contenders if c.name == "ours" or c.name in self.config.peers]

    def limit(self, needed: int, read_only: bool) -> Limit:
        return Limit(needed, self.device, read_only, self.config.threads)

    def measure(self, op: str, dtype: str, density: float | None, contenders: list[Contender], limit: Limit | None,
                needed: int | None, layers: Layers | None, state: str | None = None,
                same: dict[str, list[Contender]] | None = None, model: str = "") -> None:  # fmt: skip
        """A row: ``contenders`` and, where given, the stream ``limit`` scaled to ``needed`` bytes, and the ways of
        ``same`` to do the work without its own part."""
        chosen, by = self.wanted(contenders), {}
        for name, candidates in {**({"limit": limit.candidates} if limit else {}), **(same or {})}.items():
            contender, by[name] = fastest(name, candidates, self.timer)
            chosen.append(contender)
        times = compare(chosen, self.timer, self.config.pairs)
        values = summary(times, needed, limit.bytes if limit else 0)
        self.rows.append(
            Row(op=op, dtype=dtype, density=density, device=self.machine["device"],
                model=model or self.config.model,
                layers=layers.layers if layers else 0, parameters=layers.parameters if layers else 0,
                pairs=self.config.pairs, machine=self.machine, state=state, limit_by=by, **values)
        )  # fmt: skip
        print(line(self.rows[-1]), flush=True)
        self.write()

    def write(self) -> None:
        """All rows so far: a run that is cut off leaves what it has measured."""
        if self.config.json is not None:
            self.config.json.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.config.json, json.dumps(as_json(self.rows), indent=1) + "\n")

    def apart(self, ours: Contender, peers: Callable[[], list[Contender]], *names: str) -> None:
        """Into the last row: peers that take so long that a few pairs tell, beside ours and nothing else. They hold
        copies of weights, gradients and moments, so they are made only where wanted and dropped at once."""
        if self.config.peers and not set(names) & set(self.config.peers):
            return
        few = max(3, self.config.pairs // 3)
        merge(self.rows[-1], summary(compare(self.wanted([ours, *peers()]), self.timer, few), None, 0))
        if self.device.type == "cuda":
            import torch

            torch.cuda.empty_cache()

    def compiles(self, density: float, sparing: bool = False) -> bool:
        """Whether torch.compile is a peer: for each density it compiles anew, half a minute for four layers. On a GPU,
        where that is most of the time, at the densities that the bars are about; where no bar is about the op
        (``sparing``), at these on a CPU and at one on a GPU."""
        if not self.config.compile:
            return False
        if self.device.type == "cpu":
            return not sparing or density in tables.ASKED
        return density == tables.ASKED[-1] if sparing else density in tables.ASKED

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
        import torch

        from leaml_plugin import ops

        def then_norm() -> None:
            ops.neuron_relevance_(*lists, **options)
            torch.nn.utils.get_total_norm(layers.grads)

        contenders = [
            Contender("ours", lambda: ops.neuron_relevance_(*lists, **options)),
            Contender("eager", lambda: eager(*lists)),
        ]
        if op == "relevance":
            contenders.append(Contender("eager_with_norm", lambda: eager_relevance_and_norm(*lists)))
            contenders.append(Contender("ours_then_norm", then_norm))
        if self.config.compile:
            fast = self.compiled(eager)
            contenders.append(Contender("compile", lambda: fast(*lists)))
            if op == "relevance":
                both = self.compiled(relevance_and_squared_norm)
                contenders.append(Contender("compile_with_norm", lambda: both(*lists)))
        self.measure(op, dtype, None, contenders, self.limit(needed, True), needed, layers)

    def step_contenders(self, layers: Layers, compiles: bool) -> list[Contender]:
        """Our step of the selected neurons, then what one writes for it in PyTorch."""
        import torch

        from leaml_plugin import ops

        step = torch.ones((), device=layers.device)
        contenders = [
            Contender("ours", lambda: ops.sparse_adamw_(*layers.step_lists, **layers.options)),
            Contender("gather_fused_scatter", gather_fused_scatter(layers)),
            Contender("eager", lambda: eager_sparse_adamw(*layers.step_lists[:5], step, *HYPER)),
        ]
        if compiles:
            fast = self.compiled(eager_sparse_adamw)
            contenders.append(Contender("compile", lambda: fast(*layers.step_lists[:5], step, *HYPER)))
        return contenders

    def sparse_adamw(self, dtype: str, layers: Layers, density: float) -> None:
        contenders = self.step_contenders(layers, self.compiles(density))
        ours = contenders[0]
        # that loop has one thread: several threads move the same rows faster than it can
        alone = layers.device.type == "cpu" and self.config.threads == 1
        same = {"same_bytes": same_bytes(layers)} if alone else None
        needed = layers.step_bytes("fp32")
        self.measure(
            "sparse_adamw", dtype, density, contenders, self.limit(needed, False), needed, layers, "fp32", same
        )
        for kind in ("fused", "foreach"):
            self.apart(ours, lambda kind=kind: masked_dense(layers, kind), f"dense_{kind}_masked", f"dense_{kind}")
        if layers.device.type == "cuda":
            few = max(3, self.config.pairs // 3)
            for peer in optional_gpu_peers(layers):
                merge(self.rows[-1], summary(compare([ours, peer], self.timer, few), None, 0))
        print(line(self.rows[-1]), flush=True)
        self.columns(dtype, layers.turned(density), density)
        for state in STATES[1:] if not self.config.peers else ():
            self.other_state(dtype, layers, density, state)

    def columns(self, dtype: str, layers: Layers, density: float) -> None:
        """The step of input columns; its limit counts the cache lines that these columns lie in."""
        contenders = self.step_contenders(layers, self.compiles(density, sparing=True))
        needed = column_bytes(layers)
        self.measure(
            "sparse_adamw_columns", dtype, density, contenders, self.limit(needed, False), needed, layers, "fp32"
        )
        if density in tables.ASKED:
            self.apart(contenders[0], lambda: masked_dense(layers, "fused"), "dense_fused_masked", "dense_fused")
            print(line(self.rows[-1]), flush=True)

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
        self.measure("sparse_adamw", dtype, density, contenders, self.limit(needed, False), needed, layers, state)
        if "fusion" in self.config.ops:
            self.fusion(dtype, layers, density, state)
        layers.keep("fp32")

    def fusion_contenders(self, layers: Layers) -> list[Contender]:
        """Our fusion, its two parts one after the other, and the first of these."""
        from leaml_plugin import ops

        relevance = (layers.weights, layers.grads, layers.out)

        def parts() -> None:
            ops.neuron_relevance_(*relevance, slots=layers.slots)
            ops.sparse_adamw_(*layers.step_lists, **layers.options)

        def both() -> None:
            ops.relevance_sparse_adamw_(*layers.step_lists, layers.out, slots=layers.slots, **layers.options)

        return [
            Contender("ours", both),
            Contender("our_two_parts", parts),
            Contender("relevance_alone", lambda: ops.neuron_relevance_(*relevance, slots=layers.slots)),
        ]

    def fusion(self, dtype: str, layers: Layers, density: float, state: str = "fp32") -> None:
        size = layers.weights[0].element_size()
        # every weight and gradient once; of the selected what the step moves but for reading these two
        read_anyway = layers.selected * (size if state == "master" else 2 * size)
        needed = 2 * layers.parameters * size + layers.step_bytes(state) - read_anyway

        contenders = self.fusion_contenders(layers)
        if state == "fp32":  # PyTorch knows no other state of selected rows
            contenders += self.fusion_peers(layers, density)
        self.measure("fusion", dtype, density, contenders, self.limit(needed, True), needed, layers, state)
        if state == "fp32":
            name = "relevance_dense_fused_masked"
            self.apart(contenders[0], lambda: masked_dense(layers, "fused", relevance=True), name)
            print(line(self.rows[-1]), flush=True)

    def fusion_feed_forward(self, dtype: str, layers: Layers, density: float) -> None:
        """Neurons that are a row of gate, a row of up and a column of down, scored across the three and stepped."""
        import torch

        step = torch.ones((), device=layers.device)
        lists = (*layers.step_lists[:5], layers.out, step, *HYPER)
        contenders = self.fusion_contenders(layers)
        contenders.append(Contender("eager", lambda: eager_fusion_feed_forward(*lists)))
        if self.compiles(density, sparing=True):
            fast = self.compiled(eager_fusion_feed_forward)
            contenders.append(Contender("compile", lambda: fast(*lists)))
        needed = feed_forward_bytes(layers)
        self.measure("fusion_ffn", dtype, density, contenders, self.limit(needed, True), needed, layers, "fp32")

    def fusion_peers(self, layers: Layers, density: float) -> list[Contender]:
        """Relevance and the step as one does both in PyTorch."""
        import torch

        step = torch.ones((), device=layers.device)
        lists = (*layers.step_lists[:5], layers.out, step, *HYPER)
        gathered = gather_fused_scatter(layers)

        def relevance_then_gathered() -> None:
            eager_relevance(layers.weights, layers.grads, layers.out)
            gathered()

        peers = [
            Contender("eager", lambda: eager_fusion(*lists)),
            Contender("relevance_gather_fused_scatter", relevance_then_gathered),
        ]
        if self.compiles(density):
            fast = self.compiled(eager_fusion)
            peers.append(Contender("compile", lambda: fast(*lists)))
        return peers

    def select(self, model: str, density: float) -> None:
        """One score for every neuron of a model. The limit is reading them once, though they may lie in a cache."""
        import torch

        from leaml_plugin import ops

        count = MODELS[model][3]
        scores = [torch.rand(shape[0], device=self.device) for shape in layer_shapes(model) * count]
        flat = torch.cat(scores)
        k = ops.selected_count(density, flat.numel())
        contenders = [
            Contender("ours", lambda: ops.select_top(scores, density, scope="model")),
            Contender("topk", lambda: eager_select(scores, k)),
            Contender("sort", lambda: torch.sort(torch.cat(scores), descending=True, stable=True).indices[:k].sort()),
        ]
        if self.compiles(density, sparing=True):
            fast = self.compiled(eager_select)
            contenders.append(Contender("compile", lambda: fast(scores, k)))
        needed = 4 * flat.numel()
        self.measure("select", "float32", density, contenders, self.limit(needed, True), needed, None, model=model)

    def weight_grad(self, dtype: str, torch_dtype: Any, density: float) -> None:
        """Tokens of a short batch through the feed-forward projection. Not bytes but the product bounds this op: its
        limit is the same product with nothing to gather."""
        import torch

        from leaml_plugin import ops

        hidden, inner, _, _ = MODELS[self.config.model]
        tokens = 256 if self.device.type == "cpu" else 8192
        x = torch.randn(tokens, hidden, device=self.device).to(torch_dtype)
        grad = torch.randn(tokens, inner, device=self.device).to(torch_dtype)
        rows = random_rows(inner, density, torch.Generator().manual_seed(0), self.device)
        contenders = [
            Contender("ours", lambda: ops.selected_weight_grad(x, grad, rows)),
            Contender("whole_gradient", lambda: grad.t() @ x),
            Contender("whole_then_select", lambda: (grad.t() @ x).index_select(0, rows)),
        ]
        if self.config.compile:
            fast = self.compiled(eager_weight_grad)
            contenders.append(Contender("compile", lambda: fast(x, grad, rows)))
        same = {"same_product": same_product(x, grad, rows)}
        self.measure("weight_grad", dtype, density, contenders, None, None, None, same=same)

    def run(self) -> list[Row]:
        import torch

        config = self.config
        print(header(self.machine), flush=True)
        if "select" in config.ops:
            for model in dict.fromkeys((config.model, LARGEST)):
                for density in config.densities:
                    self.select(model, density)
        for dtype in config.dtypes:
            torch_dtype = getattr(torch, dtype)
            if "weight_grad" in config.ops:
                for density in config.densities:
                    self.weight_grad(dtype, torch_dtype, density)
            if not {"relevance", "sparse_adamw", "fusion"} & set(config.ops):
                continue
            layers = Layers(config.model, torch_dtype, self.device, self.layers_that_fit(torch_dtype.itemsize))
            if "relevance" in config.ops:
                self.relevance(dtype, layers)
            for density in config.densities:
                layers.select(density)
                if "sparse_adamw" in config.ops:
                    self.sparse_adamw(dtype, layers, density)
                if "fusion" in config.ops:
                    self.fusion(dtype, layers, density)
                    self.fusion_feed_forward(dtype, layers.feed_forward(density), density)
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
    name = f"{row.op} {row.model}" if row.op == "select" else row.op
    state = "" if row.state in (None, "fp32") else f" {row.state}"
    share = "" if row.limit_share is None else f"limit {row.limit_share:.2f}"
    share += "" if row.stream_share is None else f" (stream {row.stream_share:.2f})"
    peers = "  ".join(
        f"{name} {value:.2f} [{row.spread[name][0]:.2f}-{row.spread[name][1]:.2f}]" for name, value in row.ratio.items()
    )
    return f"{name + state:20} {row.dtype:9} {density:>4} {row.time_ms:9.2f} ms  {share:25} {peers}"


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
