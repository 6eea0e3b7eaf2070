"""``leaml bench memory``: peak memory of the data path by the number of unlabelled pictures.

Covers: everything a run does with pictures and pairs, through the shipped pipeline: reading a directory of pictures and
a file of captions, fingerprints, the check, the copy of the inputs, generation, second answers, the filter, and the
batches that the caption distillation and the fine-tuning draw. Each number of pictures runs in a process of its own;
the peak is taken stage by stage.
Does not cover: models. The generator is a stand-in that writes its text at once, and nothing is trained.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leaml_plugin.errors import LeamlError

if TYPE_CHECKING:
    from leaml_plugin.data import Turn
    from leaml_plugin.inference import Generated
    from leaml_plugin.records import Picture

FOLDER, LINKS = 5000, 50_000  # pictures of a folder; names of one file, of which a file system has a limit
STEPS = 50  # batches that the training stages draw
WARM_UP = 300  # pictures of the run that comes first, more than a shard


@dataclass(frozen=True)
class Config:
    """Options of the benchmark."""

    pictures: Sequence[int] = (1000, 10_000, 100_000)
    samples: int = 2
    flat: bool = False
    work: Path | None = None
    json: Path | None = None

    def validate(self) -> None:
        """Raises LeamlError for numbers out of range."""
        if min(self.pictures, default=0) < 1 or self.samples < 1:
            raise LeamlError("bench memory: wanted at least one picture and one sample.")


@dataclass
class Row:
    """One number of pictures: MiB of resident memory after a run over a few, at the peak of each stage and of all."""

    pictures: int
    samples: int
    start_mib: float
    peak_mib: float
    stages_mib: dict[str, float]
    kept: int
    dropped: int
    seconds: float
    bytes_on_disk: int = 0
    machine: dict[str, Any] = field(default_factory=dict)


class Writer:
    """Stands in for ``leaml_plugin.inference``: questions and answers that depend on the turn alone, at once."""

    def generate(self, loaded: Any, turns: Iterable[Turn], *, num_samples: int = 1, **_: Any) -> Iterator[Generated]:
        from leaml_plugin.inference import Generated
        from leaml_plugin.sequences import text_key

        asks = num_samples > 1
        for turn in turns:
            for sample in range(num_samples):
                draw = text_key(f"{turn.id}/{sample}") if asks else text_key(turn.prompt)
                answer = f"{draw % 7} polyps in picture {turn.id[-6:]}" if asks else "none"
                text = f"Question: What is at place {draw % 50}?\nAnswer: {answer}" if asks else answer
                yield Generated(turn.id, sample, text, -1.0 - (draw % 1000) / 500)


def make_pictures(folder: Path, count: int, flat: bool) -> None:
    """``count`` names of a few small PNG files, in folders of :data:`FOLDER` or in one, and a caption for each."""
    from PIL import Image

    images = folder / "images"
    images.mkdir(parents=True)
    with open(folder / "captions.jsonl", "w", encoding="utf-8") as captions:
        for n in range(count):
            name = f"{n:07d}.png" if flat else f"{n // FOLDER:04d}/{n:07d}.png"
            path = images / name
            if n % FOLDER == 0:
                path.parent.mkdir(exist_ok=True)
            if n % LINKS == 0:
                original = path
                Image.new("RGB", (32, 32), (n % 255, 90, 60)).save(path)
            else:
                os.link(original, path)
            captions.write(
                json.dumps({"image": f"images/{name}", "caption": f"Ring {n} of a tube, lit from the left."}) + "\n"
            )
    row = {"image": f"images/{original.relative_to(images)}", "question": "What is at place 1?", "answer": "x" * 60}
    (folder / "train.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")


def simulate(folder: Path, samples: int) -> Iterator[tuple[str, Any]]:
    """Run the data path over ``folder``; yields (stage, its result) as each stage ends.

    Args:
        folder: what :func:`make_pictures` wrote; the run goes to ``run`` in it.
    """
    from leaml_plugin import inference, pipeline
    from leaml_plugin.sequences import Chosen, Mapped
    from leaml_plugin.training import Stream
    from leaml_plugin.worlds.files import checkpoint_path

    class Run(pipeline.Adaptation):
        def load(self, weights: Any = None) -> Any:
            return None

        def collator(self, loaded: Any) -> Any:
            return None

    config = pipeline.AdaptConfig(
        model=str(checkpoint_path()),
        labeled=str(folder / "train.jsonl"),
        unlabeled=str(folder / "images"),
        captions=str(folder / "captions.jsonl"),
        output=str(folder / "run"),
        generate=pipeline.generate.GenerateConfig(samples=samples),
        generator=pipeline.train_generator.GeneratorConfig(qa_task="both"),
        verify=pipeline.verify.VerifyConfig(round_trip=True),
        filter=pipeline.filter.FilterConfig(round_trip=False, keep_share=0.5, answer_share=0.9),
    )
    real, inference.generate = inference.generate, Writer().generate  # type: ignore[assignment]
    try:
        run = Run(config)
        yield "inputs", run.inputs.pictures
        drawn = _draw(Stream("captions", Mapped(_captioned(run.inputs.pictures, Chosen), run.prompts.caption), 16))
        yield "captions", drawn
        shards = run.generate({})
        yield "generate", shards
        shards = run.verify({}, shards)
        yield "verify", shards
        pairs = run.filter(shards)
        yield "filter", pairs
        yield "finetune", _draw(Stream("pseudo", Mapped(pairs, run.prompts.vqa), 8))
    finally:
        inference.generate = real


def _captioned(pictures: Sequence[Picture], chosen: Any) -> Any:
    return chosen(pictures, (n for n, picture in enumerate(pictures) if picture.caption))


def _draw(stream: Any) -> int:
    return sum(len(stream.take(step, 0)) for step in range(STEPS))


def measure(folder: Path, samples: int) -> Row:
    """Run the data path in this process; memory from the kernel's account of it.

    A run over a few pictures comes first: what is imported on the way would hide what the pictures take.
    """
    with _folder(folder) as few:
        make_pictures(few / "few", WARM_UP, False)
        for _ in simulate(few / "few", samples):
            pass
    start, began = _mib("VmRSS"), time.monotonic()
    peaks: dict[str, float] = {}
    kept = pictures = 0
    _reset_peak()
    for stage, result in simulate(folder, samples):
        peaks[stage] = _mib("VmHWM")
        if stage == "inputs":
            pictures = len(result)
        if stage == "filter":
            kept = len(result)
        del result
        _reset_peak()
    seconds = time.monotonic() - began
    size = sum(p.stat().st_size for p in (folder / "run").rglob("*") if p.is_file())
    dropped = pictures * samples - kept
    return Row(pictures, samples, start, max(peaks.values()), peaks, kept, dropped, round(seconds, 1), size)


def _mib(name: str) -> float:
    text = Path("/proc/self/status").read_text()
    return round(int(re.search(rf"{name}:\s+(\d+) kB", text)[1]) / 1024, 1)  # type: ignore[index]


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def run(config: Config) -> list[Row]:
    """Measure every number of pictures; print and, where asked for, write one row each."""
    import torch

    from leaml_plugin.benchmark.kernels import machine

    config.validate()
    if not Path("/proc/self/clear_refs").exists():
        raise LeamlError("bench memory: reads the peak memory from /proc, which this system has not; run it on Linux.")
    info = machine(torch.device("cpu"), torch.get_num_threads())
    rows = []
    for count in config.pictures:
        with _folder(config.work) as folder:
            make_pictures(folder, count, config.flat)
            command = [sys.executable, "-m", "leaml_plugin.benchmark.memory", str(folder), str(config.samples)]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode:
                raise LeamlError(f"bench memory: {count} pictures: {result.stderr.strip().splitlines()[-1:]}")
        rows.append(Row(**{**json.loads(result.stdout.splitlines()[-1]), "machine": info}))
        print(line(rows[-1]), flush=True)
    if config.json is not None:
        config.json.parent.mkdir(parents=True, exist_ok=True)
        config.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return rows


@contextmanager
def _folder(work: Path | None) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="leaml-bench-", dir=work) as name:
        yield Path(name)


def line(row: Row) -> str:
    """One row for a person."""
    stages = "  ".join(f"{stage} {mib:.0f}" for stage, mib in row.stages_mib.items())
    return (
        f"{row.pictures:8} pictures, {row.samples * row.pictures:8} pairs ({row.kept} kept): "
        f"peak {row.peak_mib:.0f} MiB (start {row.start_mib:.0f}; {stages}), {row.seconds:.0f} s"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``leaml bench memory``."""
    default = Config()
    parser.add_argument("--pictures", nargs="+", type=int, default=list(default.pictures), metavar="N")
    parser.add_argument("--samples", type=int, default=default.samples, help="pairs a picture")
    parser.add_argument("--flat", action="store_true", help="all pictures in one folder")
    parser.add_argument("--work", type=Path, help="where the pictures are made (default: the temporary directory)")
    parser.add_argument("--json", type=Path, help="write the rows here")


def main(args: argparse.Namespace) -> int:
    """``leaml bench memory``; exit code 0."""
    run(Config(**{name: getattr(args, name) for name in Config.__dataclass_fields__}))
    return 0


if __name__ == "__main__":
    print(json.dumps(asdict(measure(Path(sys.argv[1]), int(sys.argv[2])))))
