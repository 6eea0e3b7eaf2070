"""``leaml bench``: kernels, a training step, generation against their named peers in the same run; and memory."""

from __future__ import annotations

import argparse
import importlib

EXAMPLES = """examples:
  leaml bench kernels
  leaml bench kernels --json kernels.json
  leaml bench step
  leaml bench generate --json generate.json
  leaml bench memory --pictures 1000 10000
"""

BENCHMARKS = {
    "kernels": ("leaml_plugin.benchmark.kernels", "every op against eager torch, torch.compile, fused AdamW, ..."),
    "generate": ("leaml_plugin.benchmark.generate", "pseudo-QA generation: ours, a loop over pictures, plain batches"),
    "memory": ("leaml_plugin.benchmark.memory", "peak memory of the data path by the number of unlabelled pictures"),
    "step": ("leaml_plugin.benchmark.step", "a training step: selected neurons, LoRA, full fine-tuning"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="benchmark", required=True, metavar="<benchmark>")
    for name, (module, text) in BENCHMARKS.items():
        importlib.import_module(module).add_arguments(commands.add_parser(name, help=text))


def main(args: argparse.Namespace) -> int:
    return importlib.import_module(BENCHMARKS[args.benchmark][0]).main(args)
