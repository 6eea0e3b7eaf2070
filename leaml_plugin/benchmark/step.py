"""``leaml bench step``: a whole training step of a multimodal model: full AdamW, LoRA, selective neurons by density.

Covers: time of forward, backward and optimizer step, in one process with the contenders interleaved; exact bytes of
gradients and optimizer states; peak memory, each contender in a process of its own. The model has Qwen2.5-VL's
architecture, random weights and a size that fits the machine.
Does not cover: quality of what is learnt, and single kernels (``kernels``).

LoRA gets the rank at which it trains as many weights as the selection of the density it is compared with.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from leaml_plugin.artifacts import write_text
from leaml_plugin.benchmark.kernels import machine
from leaml_plugin.benchmark.timing import Contender, Timer, compare, quantile, spread
from leaml_plugin.errors import LeamlError, unknown_name

# (hidden, feed-forward, layers, vision width, vision layers)
SIZES = {
    "tiny": (128, 352, 2, 64, 2),
    "small": (512, 1408, 6, 256, 4),
    "medium": (1024, 2816, 12, 512, 8),
    "qwen2.5-vl-3b": (2048, 11008, 36, 1280, 32),
}
VOCABULARY, IMAGE, START, END, PAD = 4096, 5, 3, 4, 0


@dataclass(frozen=True)
class Config:
    """Options of the benchmark."""

    size: str = "small"
    densities: Sequence[float] = (0.01, 0.05, 0.10, 0.20)
    batch: int = 4
    text: int = 96
    image: int = 112
    dtype: str = "float32"
    device: str = "auto"
    threads: int = 1
    pairs: int = 9
    memory: bool = True
    json: Path | None = None
    plot: Path | None = None
    only: str = ""

    def validate(self) -> None:
        """Raises LeamlError for an unknown size or numbers out of range."""
        if self.size not in SIZES:
            raise unknown_name("model size", self.size, SIZES)
        if self.image % 28:
            raise LeamlError(f"--image: wanted a multiple of 28 pixels, got {self.image}.")
        if not all(0.0 < d <= 1.0 for d in self.densities):
            raise LeamlError(f"--densities: wanted fractions above 0 and up to 1, got {list(self.densities)}.")


@dataclass
class Row:
    """One contender: milliseconds a step; a ratio is ``peer / this`` in the same repetition, ``ratio_to_`` its median
    and ``spread`` its 20th and 80th percentile (keys: ``full``, ``lora``)."""

    name: str
    size: str
    density: float | None
    time_ms: float
    trainable: int
    gradient_bytes: int
    state_bytes: int
    peak_bytes: int | None
    ratio_to_full: float | None
    ratio_to_lora: float | None
    machine: dict[str, Any]
    spread: dict[str, tuple[float, float]] = field(default_factory=dict)
    pairs: int = 0


def build_model(config: Config, device: Any) -> Any:
    """Qwen2.5-VL with random weights."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    hidden, inner, layers, vision, vision_layers = SIZES[config.size]
    heads = max(2, hidden // 64)
    head = hidden // heads
    sections = [head // 8, head // 2 - head // 8 - head // 4, head // 4]
    torch.manual_seed(0)
    settings = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCABULARY, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": max(1, heads // 4), "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "mrope_section": sections, "rope_theta": 10000.0},
            "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": PAD,
        },
        vision_config={
            "depth": vision_layers, "hidden_size": vision, "intermediate_size": 2 * vision,
            "num_heads": max(2, vision // 64), "out_hidden_size": hidden, "fullatt_block_indexes": [vision_layers - 1],
            "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112,
        },
        image_token_id=IMAGE, vision_start_token_id=START, vision_end_token_id=END, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device(device):  # random numbers for billions of weights are the device's work
        model = Qwen2_5_VLForConditionalGeneration(settings)
    return model.to(device, getattr(torch, config.dtype)).train()


def batch(config: Config, device: Any) -> dict[str, Any]:
    """Random pictures and tokens; the loss is on the text."""
    import torch

    side = config.image // 14
    tokens = side * side // 4
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(10, VOCABULARY, (config.batch, config.text), generator=generator)
    marks = torch.tensor([[START] + [IMAGE] * tokens + [END]]).expand(config.batch, -1)
    ids = torch.cat([marks, text], 1)
    labels = ids.clone()
    labels[:, : marks.shape[1]] = -100
    pixels = torch.randn(config.batch * side * side, 3 * 2 * 14 * 14, generator=generator)
    result = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "pixel_values": pixels.to(getattr(torch, config.dtype)),
        "image_grid_thw": torch.tensor([[1, side, side]] * config.batch),
        "mm_token_type_ids": (ids == IMAGE).int(),
    }
    return {name: value.to(device) for name, value in result.items()}


def state_bytes(optimizer: Any) -> int:
    """Exact bytes of all tensors an optimizer keeps (masters included)."""
    import torch

    return sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )


class Runner:
    """One way to train: a model of its own, its optimizer, and a step."""

    def __init__(self, name: str, config: Config, device: Any, density: float | None):
        self.name, self.density = name, density
        self.inputs = batch(config, device)
        self.model = build_model(config, device)
        self.params, self.optimizer = getattr(self, name.split("@")[0])(density)
        self.gradient_bytes = 0

    def targets(self) -> dict[str, Any]:
        from leaml_plugin.selection import linears

        return {n: m for n, m in linears(self.model).items() if "language_model" in n and "lm_head" not in n}

    def full(self, _: float | None) -> tuple[list[Any], Any]:
        import torch

        params = [p for p in self.model.parameters() if p.requires_grad]
        return params, torch.optim.AdamW(params, lr=1e-5, fused=True)

    def lora(self, density: float) -> tuple[list[Any], Any]:
        import torch
        from peft import LoraConfig, get_peft_model

        modules = self.targets()
        wanted = density * sum(m.weight.numel() for m in modules.values())
        per_rank = sum(sum(m.weight.shape) for m in modules.values())
        rank = max(1, round(wanted / per_rank))
        self.model = get_peft_model(
            self.model, LoraConfig(r=rank, lora_alpha=rank, target_modules=list(modules), lora_dropout=0.0)
        )
        params = [p for p in self.model.parameters() if p.requires_grad]
        return params, torch.optim.AdamW(params, lr=1e-5, fused=True)

    def selective(self, density: float) -> tuple[list[Any], Any]:
        import torch

        from leaml_plugin.optim import SparseAdamW
        from leaml_plugin.selection import NeuronScores, random_selection
        from leaml_plugin.selective import attach

        scores = NeuronScores({name: torch.zeros(m.weight.shape[0]) for name, m in self.targets().items()})
        params = list(attach(self.model, random_selection(scores, density)).parameters())
        return params, SparseAdamW(params, lr=1e-5)

    def step(self) -> None:
        self.model(**self.inputs).loss.backward()
        self.optimizer.step()
        self.gradient_bytes = sum(p.grad.numel() * p.grad.element_size() for p in self.params if p.grad is not None)
        self.optimizer.zero_grad(set_to_none=True)


def names(config: Config) -> list[tuple[str, float | None]]:
    result: list[tuple[str, float | None]] = [("full", None)]
    for density in config.densities:
        result += [(f"lora@{density:g}", density), (f"selective@{density:g}", density)]
    return result


def peak_memory(config: Config, name: str) -> int:
    """Peak bytes of three steps of one contender, in a fresh process; the interpreter's own share is in it."""
    command = [sys.executable, "-m", "leaml_plugin.benchmark.step", "--only", name]
    for option in ("size", "batch", "text", "image", "dtype", "device", "threads"):
        command += [f"--{option}", str(getattr(config, option))]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise LeamlError(
            f"bench step: measuring the memory of {name} failed: {result.stderr.strip().splitlines()[-1:]}"
        )
    return int(result.stdout.split()[-1])


def measure_only(config: Config, device: Any) -> int:
    """Three steps of ``config.only``; its peak in bytes."""
    import resource

    import torch

    density = float(config.only.split("@")[1]) if "@" in config.only else None
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    runner = Runner(config.only, config, device, density)
    for _ in range(3):
        runner.step()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # not ru_maxrss: Linux lets that begin at the peak of the process that started this one
    status = Path("/proc/self/status")
    if status.exists():
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(peak.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run(config: Config, sizes: Sequence[str] = ()) -> list[Row]:
    """Measure all contenders at ``config.size`` or at each of ``sizes``; print, write and draw where asked for."""
    rows: list[Row] = []
    each = [replace(config, size=size) for size in sizes] or [config]
    for one in each:
        one.validate()
    for one in each:
        for row in run_size(one):
            rows.append(row)
            if config.json is not None:  # a run that is cut off leaves what it has measured
                config.json.parent.mkdir(parents=True, exist_ok=True)
                write_text(config.json, json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    if config.plot is not None:
        plot(rows, config.plot)
    return rows


def run_size(config: Config) -> Iterator[Row]:
    """All contenders at one size; with ``config.only`` the peak memory of one is printed and nothing returned."""
    import torch

    device = torch.device(config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(config.threads)
    if config.only:
        print(measure_only(config, device))
        return
    info = machine(device, config.threads)
    print(f"Qwen2.5-VL architecture, {config.size}, {config.dtype}, batch {config.batch}; {info['device']}", flush=True)
    # before this process holds all contenders at once: a device may have room for no other then
    peaks = {name: peak_memory(config, name) for name, _ in names(config)} if config.memory else {}
    runners = [Runner(name, config, device, density) for name, density in names(config)]
    contenders = [Contender(r.name, r.step) for r in runners]
    times = compare(contenders, Timer(device, config.threads), config.pairs)
    for runner in runners:
        own = [t[runner.name] for t in times]
        ratios = {"full": [t["full"] / t[runner.name] for t in times]}
        if runner.name.startswith("selective"):
            ratios["lora"] = [t[f"lora@{runner.density:g}"] / t[runner.name] for t in times]
        middle = {peer: quantile(values, 0.5) for peer, values in ratios.items()}
        row = Row(
            name=runner.name,
            size=config.size,
            density=runner.density,
            time_ms=quantile(own, 0.5),
            trainable=sum(p.numel() for p in runner.params),
            gradient_bytes=runner.gradient_bytes,
            state_bytes=state_bytes(runner.optimizer),
            peak_bytes=peaks.get(runner.name),
            ratio_to_full=middle["full"],
            ratio_to_lora=middle.get("lora"),
            machine=info,
            spread={peer: spread(values) for peer, values in ratios.items()},
            pairs=config.pairs,
        )
        print(line(row), flush=True)
        yield row


def plot(rows: Sequence[Row], path: Path) -> None:
    """Time, peak memory and optimizer state of a step against density, one column a model size."""
    try:
        import matplotlib
    except ImportError as error:
        raise LeamlError("--plot needs matplotlib; install leaml_plugin[report].") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    sizes = list(dict.fromkeys(row.size for row in rows))
    measures = {
        "ms a step": lambda row: row.time_ms,
        "peak memory, MiB": lambda row: (row.peak_bytes or 0) / 2**20,
        "optimizer states, MiB": lambda row: row.state_bytes / 2**20,
    }
    figure, panels = pyplot.subplots(
        len(measures), len(sizes), figsize=(3.6 * len(sizes), 7.2), squeeze=False, sharex=True
    )
    for column, size in enumerate(sizes):
        own = [row for row in rows if row.size == size]
        full = next(row for row in own if row.name == "full")
        for panel, (title, value) in zip(panels[:, column], measures.items()):
            for kind, style in (("selective", "o-"), ("lora", "s--")):
                some = [row for row in own if row.name.startswith(kind)]
                label = {"selective": "leaml", "lora": "LoRA of equal size"}[kind]
                panel.plot([100 * (row.density or 0) for row in some], [value(row) for row in some], style, label=label)
            panel.axhline(value(full), color="k", ls=":", label="full AdamW")
            panel.set_ylim(bottom=0)
            if column == 0:
                panel.set_ylabel(title)
        panels[0][column].set_title(f"{size}, {full.trainable / 1e6:.0f} M weights", fontsize=9)
        panels[-1][column].set_xlabel("density, %")
    panels[0][-1].legend(fontsize=7)
    figure.suptitle(f"A training step, {rows[0].machine['device']}, {rows[0].machine['threads']} thread(s)", fontsize=9)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def line(row: Row) -> str:
    mega = 2**20
    peak = "" if row.peak_bytes is None else f"  peak {row.peak_bytes / mega:7.0f} MiB"
    spread = {peer: f" [{low:.2f}-{high:.2f}]" for peer, (low, high) in row.spread.items()}
    lora = "" if row.ratio_to_lora is None else f"  LoRA/this {row.ratio_to_lora:.2f}{spread['lora']}"
    return (
        f"{row.name:15} {row.time_ms:8.1f} ms  trainable {row.trainable / 1e6:7.2f} M  gradients "
        f"{row.gradient_bytes / mega:7.1f} MiB  states {row.state_bytes / mega:7.1f} MiB{peak}  "
        f"full/this {row.ratio_to_full:.2f}{spread['full']}{lora}"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``leaml bench step``."""
    default = Config()
    parser.add_argument(
        "--size", nargs="+", default=[default.size], help=f"model sizes, one after the other: {', '.join(SIZES)}"
    )
    parser.add_argument("--densities", nargs="+", type=float, default=list(default.densities), metavar="FRACTION")
    parser.add_argument("--batch", type=int, default=default.batch)
    parser.add_argument("--text", type=int, default=default.text, help="text tokens of an example")
    parser.add_argument("--image", type=int, default=default.image, help="picture side in pixels, a multiple of 28")
    parser.add_argument("--dtype", default=default.dtype, choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=default.pairs, help="repetitions (default: %(default)s)")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave out the peak memory")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--plot", type=Path, help="draw time, memory and states against density here (.svg, .png)")
    parser.add_argument("--only", default="", help=argparse.SUPPRESS)


def main(args: argparse.Namespace) -> int:
    """``leaml bench step``; exit code 0."""
    fields = (
        "densities", "batch", "text", "image", "dtype", "device", "threads", "pairs", "memory", "json", "plot", "only",
    )  # fmt: skip
    run(Config(size=args.size[0], **{name: getattr(args, name) for name in fields}), args.size)
    return 0


if __name__ == "__main__":
    _parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(_parser)
    raise SystemExit(main(_parser.parse_args()))
