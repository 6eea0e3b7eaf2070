"""``leaml bench generate``: pseudo-QA as the pipeline writes it, against the two loops one would write without it.

Covers: pictures from files to decoded texts, one greedy text a picture or several samples, pictures alone ("even", all
prompts equally long) or mixed with clips of several frames ("ragged"), on the embedded checkpoint or any other. The
peers are ``for picture: model.generate(...)`` and ``model.generate`` over batches in the order of the files, both with
the checkpoint's own processor and transformers alone. All sample with the same seeded draws, so they write the same
texts; how many are equal is counted (another batch shape may round otherwise).
Does not cover: servers, and what the filter thinks of the texts.

A repetition runs the contenders once each, in rotated order; a ratio is ``peer time / our time`` of a repetition. With
one thread on the CPU the time is the process's CPU time, which a busy neighbour does not lengthen and which counts the
thread that prepares pictures beside the model in full, though it would overlap on a free machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leaml_plugin.benchmark.kernels import machine
from leaml_plugin.benchmark.timing import middle
from leaml_plugin.errors import LeamlError, unknown_name

if TYPE_CHECKING:
    from leaml_plugin.data import Collator, Turn
    from leaml_plugin.inference import Sampling
    from leaml_plugin.models import Loaded

OURS, LOOP, BATCHES = "leaml", "for picture: generate", "batched generate"
WORKLOADS = ("even", "ragged")
# Random weights with the embedded checkpoint's tokenizer: width, layers, side of a picture in pixels. What a picture
# costs a real model is its hundreds of tokens; the embedded one has nine.
SIZES = {"wide": (320, 6, 448)}


@dataclass(frozen=True)
class Config:
    """Options of the benchmark; ``model``: a directory, a Hub id, one of :data:`SIZES`, or empty: the embedded one."""

    model: str = ""
    pictures: int = 48
    samples: Sequence[int] = (1, 4)
    workloads: Sequence[str] = WORKLOADS
    batch_size: int = 16
    new_tokens: int = 24
    pairs: int = 5
    threads: int = 1
    device: str = "auto"
    json: Path | None = None

    def validate(self) -> None:
        """Raises LeamlError for an unknown workload or numbers out of range."""
        for workload in self.workloads:
            if workload not in WORKLOADS:
                raise unknown_name("workload", workload, WORKLOADS)
        for name in ("pictures", "batch_size", "new_tokens", "threads"):
            if getattr(self, name) < 1:
                raise LeamlError(f"bench generate: {name} is {getattr(self, name)}; it must be at least 1.")
        if self.pairs < 3:
            raise LeamlError(f"--pairs: a median needs at least 3, got {self.pairs}.")
        if min(self.samples, default=0) < 1:
            raise LeamlError(f"--samples: wanted numbers from 1, got {list(self.samples)}.")


@dataclass
class Row:
    """One workload: seconds and texts a second of ours, ``ratio[peer]`` = peer's time / our time, with its spread."""

    model: str
    workload: str
    samples: int
    pictures: int
    batch_size: int
    new_tokens: int
    seconds: float
    texts_per_second: float
    ratio: dict[str, float]
    spread: dict[str, tuple[float, float]]
    equal_texts: dict[str, float]
    pairs: int
    clock: str
    machine: dict[str, Any] = field(default_factory=dict)


def draw(workload: str, count: int, folder: Path) -> list[tuple[str, ...]]:
    """Write pictures of the embedded worlds as PNG files; the files of each picture or clip."""
    from leaml_plugin.worlds.files import png
    from leaml_plugin.worlds.scenes import render

    out = []
    for number in range(count):
        world = "sports" if workload == "ragged" and number % 2 else "endoscopy"
        names = []
        for i, frame in enumerate(render(world, number, 7).frames):
            path = folder / f"{workload}-{number}-{i}.png"
            path.write_bytes(png(frame))
            names.append(str(path))
        out.append(tuple(names))
    return out


def random_model(size: str, folder: Path) -> None:
    """A Qwen2.5-VL with random weights and its processor, saved."""
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    from leaml_plugin.worlds.processor import build_config, build_processor

    width, layers, side = SIZES[size]
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(build_config(width=width, layers=layers))
    with torch.no_grad():
        model.lm_head.weight.mul_(30)  # sharper than random: as a trained one, it has its likely tokens
    model.save_pretrained(folder)
    processor = build_processor()
    processor.image_processor.size = {"shortest_edge": side * side, "longest_edge": side * side}
    processor.save_pretrained(folder)


class Bench:
    """The three ways to write ``samples`` texts for each of ``turns``, each a list of texts in order."""

    def __init__(self, config: Config, loaded: Loaded, collator: Collator, turns: Sequence[Turn], samples: int):
        from leaml_plugin.inference import Sampling

        self.config, self.loaded, self.collator, self.turns, self.samples = config, loaded, collator, turns, samples
        self.sampling: Sampling | None = Sampling(temperature=1.0, top_p=0.95, seed=3) if samples > 1 else None

    def ours(self) -> list[str]:
        from leaml_plugin.inference import generate

        return [
            out.text
            for out in generate(
                self.loaded,
                self.turns,
                collator=self.collator,
                batch_size=self.config.batch_size,
                max_new_tokens=self.config.new_tokens,
                sampling=self.sampling,
                num_samples=self.samples,
                return_logprobs=True,  # the filter wants them
                progress=False,
            )
        ]

    def loop(self) -> list[str]:
        return [text for turn in self.turns for text in self._plain([turn])]

    def batches(self) -> list[str]:
        size = max(1, self.config.batch_size // self.samples)
        return [t for i in range(0, len(self.turns), size) for t in self._plain(self.turns[i : i + size])]

    def _plain(self, turns: Sequence[Turn]) -> list[str]:
        """What one writes with transformers: open, template, processor, ``generate``, decode."""
        import torch
        from PIL import Image
        from transformers import GenerationConfig, LogitsProcessorList

        from leaml_plugin.inference import _Chooser, _key, _stop_ids

        processor, model = self.loaded.processor, self.loaded.model
        stop = _stop_ids(self.loaded, self.collator)
        rows = [(turn, sample) for turn in turns for sample in range(self.samples)]
        batch = self.loaded.to_device(
            processor(
                text=[self._prompt(turn) for turn in turns],
                images=[[Image.open(ref.uri).convert("RGB") for ref in turn.images] for turn in turns],
                return_tensors="pt",
                padding=True,
                padding_side="left",
            )
        )
        length = batch["input_ids"].shape[1]
        chosen = LogitsProcessorList()
        if self.sampling is not None:  # the same draws as ours, in place of torch's own sampling
            keys = [_key(self.sampling.seed, turn.id, sample) for turn, sample in rows]
            chosen.append(_Chooser(length, self.sampling, keys, stop, False))
        several = {"do_sample": True, "num_return_sequences": self.samples, "top_k": 0} if self.samples > 1 else {}
        settings = GenerationConfig(
            max_new_tokens=self.config.new_tokens, eos_token_id=stop, pad_token_id=self.collator.pad_id, **several
        )
        with torch.inference_mode():
            out = model.generate(**batch, generation_config=settings, logits_processor=chosen)  # type: ignore[operator]
        texts = []
        for ids in out[:, length:].tolist():
            end = next((n + 1 for n, i in enumerate(ids) if i in stop), None)
            texts.append(processor.decode(ids[:end], skip_special_tokens=True).strip())
        return texts

    def _prompt(self, turn: Turn) -> str:
        content = [*({"type": "image"} for _ in turn.images), {"type": "text", "text": turn.prompt}]
        messages = [{"role": "user", "content": content}]
        if self.collator.prompts.system:
            system = [{"type": "text", "text": self.collator.prompts.system}]
            messages.insert(0, {"role": "system", "content": system})
        return self.loaded.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def run(config: Config) -> list[Row]:
    """Measure every workload; print and, where asked for, write one row each."""
    import torch

    from leaml_plugin import models
    from leaml_plugin.data import Collator, Prompts
    from leaml_plugin.records import ImageRef, Picture
    from leaml_plugin.worlds.files import checkpoint_path, prompts_path

    config.validate()
    torch.set_num_threads(config.threads)
    if config.model in SIZES:
        with tempfile.TemporaryDirectory(prefix="leaml-bench-") as folder:
            random_model(config.model, Path(folder))
            loaded = models.load(folder, device=config.device)
    else:
        loaded = models.load(config.model or checkpoint_path(), device=config.device)
    prompts = Prompts.load(None if config.model and config.model not in SIZES else prompts_path())
    collator = Collator(loaded.processor, prompts)
    cpu_time = loaded.device.type == "cpu" and config.threads == 1
    clock = time.process_time if cpu_time else time.perf_counter
    info = {**machine(loaded.device, config.threads), "cores": os.cpu_count(), "load_average": list(os.getloadavg())}
    del info["clock"]
    print(f"{config.model or 'the embedded checkpoint'}, batch {config.batch_size}; {info['device']}", flush=True)
    rows = []
    with tempfile.TemporaryDirectory(prefix="leaml-bench-") as folder:
        for workload in config.workloads:
            files = draw(workload, config.pictures, Path(folder))
            pictures = [Picture(f"{workload}{n}", tuple(map(ImageRef, names))) for n, names in enumerate(files)]
            turns = [prompts.generate(picture) for picture in pictures]
            for samples in config.samples:
                bench = Bench(config, loaded, collator, turns, samples)
                rows.append(_compare(bench, workload, clock, "process CPU time" if cpu_time else "wall", info))
                print(line(rows[-1]), flush=True)
                if config.json is not None:  # after every row: the run may be long
                    config.json.parent.mkdir(parents=True, exist_ok=True)
                    config.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return rows


def _compare(bench: Bench, workload: str, clock: Callable[[], float], name: str, info: dict[str, Any]) -> Row:
    ways: dict[str, Callable[[], list[str]]] = {OURS: bench.ours, LOOP: bench.loop, BATCHES: bench.batches}
    texts = {way: write() for way, write in ways.items()}  # the first time warms up
    times: list[dict[str, float]] = []
    for number in range(bench.config.pairs):
        shift = number % len(ways)
        taken = {}
        for way in [*list(ways)[shift:], *list(ways)[:shift]]:
            began = clock()
            ways[way]()
            _wait(bench.loaded.device)
            taken[way] = clock() - began
        times.append(taken)
    ratios = {way: middle([t[way] / t[OURS] for t in times]) for way in (LOOP, BATCHES)}
    seconds = statistics.median(t[OURS] for t in times)
    same = {way: [a == b for a, b in zip(texts[way], texts[OURS], strict=True)] for way in ratios}
    return Row(
        model=bench.config.model or "embedded",
        workload=workload,
        samples=bench.samples,
        pictures=len(bench.turns),
        batch_size=bench.config.batch_size,
        new_tokens=bench.config.new_tokens,
        seconds=round(seconds, 3),
        texts_per_second=round(len(bench.turns) * bench.samples / seconds, 2),
        ratio={way: ratio for way, (ratio, _) in ratios.items()},
        spread={way: spread for way, (_, spread) in ratios.items()},
        equal_texts={way: round(statistics.mean(values), 4) for way, values in same.items()},
        pairs=bench.config.pairs,
        clock=name,
        machine=info,
    )


def _wait(device: Any) -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def line(row: Row) -> str:
    """One row for a person."""
    peers = "  ".join(
        f"{way} {row.ratio[way]:.2f}x ({row.spread[way][0]:.2f}-{row.spread[way][1]:.2f}, "
        f"{row.equal_texts[way]:.1%} equal)"
        for way in row.ratio
    )
    return f"{row.workload:7} {row.samples} sample(s)  {row.texts_per_second:7.1f} texts/s  {peers}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``leaml bench generate``."""
    default = Config()
    parser.add_argument(
        "--model", default="", help='directory, Hub id, or "wide": random weights, 196 tokens a picture'
    )
    parser.add_argument("--pictures", type=int, default=default.pictures)
    parser.add_argument("--samples", nargs="+", type=int, default=list(default.samples), help="texts a picture")
    parser.add_argument("--workloads", nargs="+", default=list(default.workloads), help=", ".join(WORKLOADS))
    parser.add_argument("--batch-size", type=int, default=default.batch_size)
    parser.add_argument("--new-tokens", type=int, default=default.new_tokens)
    parser.add_argument("--pairs", type=int, default=default.pairs, help="repetitions (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=default.threads)
    parser.add_argument("--device", default=default.device)
    parser.add_argument("--json", type=Path, help="write the rows here")


def main(args: argparse.Namespace) -> int:
    """``leaml bench generate``; exit code 0."""
    names = Config.__dataclass_fields__
    run(Config(**{name: getattr(args, name) for name in names}))
    return 0
