"""``leaml demo``: the whole of LEAML on the embedded endoscopy world, against the baselines, through lmms-eval.

Every step is what a user does with real data: pictures and questions in Kvasir-VQA's schema, ``leaml data`` for the
label budget, ``leaml adapt`` for each method, lmms-eval's task ``leaml_endoscopy`` for the scores. Each step is kept in
the output directory; a repeated call finds everything in place.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leaml_plugin.artifacts import RunDirectory, read_json, write_json
from leaml_plugin.errors import LeamlError

EXAMPLES = """examples:
  leaml demo
  leaml demo --output runs/demo --pictures 2000 --label-fraction 0.01 --seed 1
"""

TASK = "leaml_endoscopy"


@dataclass(frozen=True)
class DemoConfig:
    """What the demo runs.

    Attributes:
        pictures: of the world; a fifth of them is held out for the test by a hash of the picture's name.
        label_fraction: share of the training pictures that carry labels.
        steps: optimizer steps of every trained method; LEAML's generator takes as many again.
        questions: test questions; 0: all.
        seed: of the world and of every method.
    """

    pictures: int = 1000
    label_fraction: float = 0.02
    steps: int = 200
    questions: int = 800
    seed: int = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default = DemoConfig()
    add = parser.add_argument
    add("--output", default="runs/demo", help="directory of the demo (default runs/demo)")
    add("--pictures", type=int, default=default.pictures, help=f"pictures of the world (default {default.pictures})")
    add("--label-fraction", type=float, default=default.label_fraction,
        help=f"share of the training pictures that is labelled (default {default.label_fraction})")  # fmt: skip
    add("--steps", type=int, default=default.steps, help=f"optimizer steps a method (default {default.steps})")
    add("--questions", type=int, default=default.questions, help=f"test questions (default {default.questions})")
    add("--seed", type=int, default=default.seed, help="of the world and the methods (default 0)")


def main(args: argparse.Namespace) -> int:
    from leaml_plugin import report

    config = DemoConfig(args.pictures, args.label_fraction, args.steps, args.questions, args.seed)
    result = run(config, Path(args.output))
    print(report.table(result["rows"]))
    print()
    print(result["worth"])
    print(f"report: {result['report']}")
    return 0


def run(config: DemoConfig, output: Path) -> dict[str, Any]:
    """Run what is not there yet; returns the table's rows, a sentence on their worth and the report's path."""
    from transformers.utils import logging

    from leaml_plugin import models, report, worlds
    from leaml_plugin.pipeline import adapt

    logging.disable_progress_bar()  # a bar for each load of a model of two million parameters tells nothing
    checkpoint = worlds.checkpoint_path()
    if not (checkpoint / "config.json").exists():
        raise LeamlError(f"{checkpoint} holds no checkpoint; make one with 'leaml pretrain'.")
    root = RunDirectory.open(output, dataclasses.asdict(config), {"model": models.fingerprint(checkpoint)})
    kvasir, files = _data(config, root)

    rows, samples = [], {}
    for name, settings in methods(config).items():
        where: dict[str, Path] = {}
        if settings is not None:
            print(f"== {name}", flush=True)
            result = adapt(
                model=str(checkpoint),
                labeled=str(files / "train.jsonl"),
                output=str(root.child(_slug(name))),
                prompts=str(worlds.prompts_path()),
                dtype="float32",
                **_built(settings, files),
            )
            where = {"adapter": result.adapter} if result.adapter else {"model": result.model}
        scores = _evaluate(root, name, {"model": checkpoint, **where}, kvasir, config)
        rows.append(_row(name, scores))
        samples[name] = scores["samples"]
    rows.insert(1, _blind_row(rows[0]))
    worth = _worth(rows, config)
    runs = {name: root.child(_slug(name)) for name, settings in methods(config).items() if settings is not None}
    page = report.write_comparison(root.report, rows, runs, worth, samples=samples)
    write_json(root.summary, {"rows": rows, "worth": worth})
    return {"rows": rows, "worth": worth, "report": page}
