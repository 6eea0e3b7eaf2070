"""``leaml adapt``: options to an :class:`~leaml_plugin.pipeline.AdaptConfig`, and the result in a few lines."""

from __future__ import annotations

import argparse
from typing import Any

from leaml_plugin import config

EXAMPLES = """examples:
  leaml adapt --model Qwen/Qwen2.5-VL-3B-Instruct --labeled train.jsonl \\
      --unlabeled images/ --captions captions.jsonl --output runs/endo
  leaml adapt --model llava-hf/llava-onevision-qwen2-0.5b-ov-hf --labeled train.jsonl \\
      --method labels --mode lora --output runs/baseline
  leaml adapt --config endo.json --set relevance.density=0.05 --set finetune.train.steps=500
  torchrun --nproc-per-node 8 -m leaml_plugin.cli adapt ...    (pseudo-labels on 8 GPUs)
every setting:  leaml adapt --show-settings
"""

# option -> settings that it fills
_OPTIONS: dict[str, tuple[str, ...]] = {
    "model": ("model",),
    "labeled": ("labeled",),
    "unlabeled": ("unlabeled",),
    "captions": ("captions",),
    "teacher": ("caption.teacher",),
    "teacher_model": ("caption.model",),
    "output": ("output",),
    "evaluation": ("evaluation",),
    "image_root": ("image_root",),
    "method": ("method",),
    "prompts": ("prompts",),
    "dtype": ("dtype",),
    "device": ("device",),
    "max_length": ("max_length",),
    "mode": ("finetune.mode",),
    "density": ("relevance.density",),
    "criterion": ("relevance.criterion",),
    "granularity": ("relevance.granularity",),
    "caption_weight": ("generator.caption_weight",),
    "samples": ("generate.samples",),
    "mix": ("generate.mix",),
    "rounds": ("rounds",),
    "steps": ("generator.train.steps", "finetune.train.steps"),
    "lr": ("generator.train.lr", "finetune.train.lr"),
    "batch_size": ("generator.train.batch_size", "finetune.train.batch_size"),
    "micro_batch": ("generator.train.micro_batch", "finetune.train.micro_batch"),
    "seed": ("relevance.seed", "generator.train.seed", "generate.seed", "finetune.train.seed"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", help="directory or Hub id of an image-text-to-text model")
    add("--labeled", help="labelled questions: JSONL, conversations, messages, or a Hugging Face dataset")
    add("--unlabeled", help="pictures without labels: a directory, a file that lists them, or a dataset")
    add("--captions", help="the teacher's captions of the unlabelled pictures (JSONL with image and caption)")
    add("--teacher", help="who captions the pictures without caption: http://host:port/v1, or model:PATH")
    add("--teacher-model", help="the teacher's name on its server (default: the only one there)")
    add("--output", help="run directory; the same command takes up an unfinished run")
    add("--evaluation", help="labelled questions on which the result is scored")
    add("--image-root", help="folder that relative picture paths start from (default: that of the file)")
    add("--method", help='"leaml" (default), or "labels": plain fine-tuning on the labels')
    add("--mode", help='what the VQA model trains: "selected" neurons (default), "lora" or "full"')
    add("--density", type=float, help="share of the neurons that is selected (default 0.1)")
    add("--criterion", help="relevance: taylor (default), taylor_abs, fisher or grad_norm")
    add("--granularity", help="a neuron is a row of a Linear (row, default) or a whole FFN neuron (ffn)")
    add("--caption-weight", type=float, help="weight of caption distillation (default 1)")
    add("--samples", type=int, help="pseudo-QA drawn a picture (default 4)")
    add("--mix", help='families of questions to steer to: "labels", "uniform", or weights: "how many=2, is there=1"')
    add("--rounds", type=int, help="rounds of self-training (default 1); ends earlier where a round gains nothing")
    add("--steps", type=int, help="optimizer steps of generator and fine-tuning (default 300)")
    add("--lr", type=float, help="learning rate of both (default 1e-4)")
    add("--batch-size", type=int, help="samples a step (default 16)")
    add("--micro-batch", type=int, help="samples a forward pass (default: the whole batch)")
    add("--seed", type=int, help="of everything random (default 0)")
    add("--dtype", help='weights: "auto" (default), float32, bfloat16 or float16')
    add("--device", help='"auto" (default), cpu, cuda, cuda:1, ...')
    add("--max-length", type=int, help="longest sample in tokens; longer ones are an error that names them")
    add("--prompts", help="directory with prompt files that replace the built-in ones")
    add("--trust-remote-code", action="store_true", help="run code that comes with the model")
    add("--config", help="JSON or TOML file with settings; options on the command line win over it")
    add("--set", action="append", default=[], metavar="NAME=VALUE", help="any setting, by its full name; repeatable")
    add("--rank", type=int, help="which of several processes of this run (from 0); torchrun sets it (docs/scale.md)")
    add("--world-size", type=int, help="how many processes there are")
    add("--show-settings", action="store_true", help="print every setting with its default and stop")


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Nested settings: file first, then options, then ``--set``."""
    return config.from_arguments(args, _OPTIONS)


def main(args: argparse.Namespace) -> int:
    from leaml_plugin import report
    from leaml_plugin.artifacts import canonical_json
    from leaml_plugin.pipeline import AdaptConfig, adapt
    from leaml_plugin.ranks import Rank
    from leaml_plugin.training import config_dict

    if args.show_settings:
        defaults = AdaptConfig(model="...", labeled="...", output="...", unlabeled="...")
        print(canonical_json(config_dict(defaults)), end="")
        return 0
    rank = Rank.here(args.rank, args.world_size)
    result = adapt(config.build(AdaptConfig, settings(args)), rank=rank)
    if not rank.leads:
        print(f"rank {rank.number} of {rank.count}: nothing is left to share; rank 0 finishes {result.output}")
        return 0
    path = report.write_report(result.output)
    print(report.summary(result.output))
    for kind, where in result.weights.items():
        print(f"{kind}: {where}")
    print(f"report: {path}")
    return 0
