"""``leaml bench``: the kernels, or a whole training step, against their named peers in the same run."""

from __future__ import annotations

import argparse
import importlib

EXAMPLES = """examples:
  leaml bench kernels
  leaml bench kernels --json kernels.json
  leaml bench step
"""

BENCHMARKS = {
    "kernels": ("leaml_plugin.benchmark.kernels", "every op against eager torch, torch.compile, fused AdamW, ..."),
    "step": ("leaml_plugin.benchmark.step", "a training step: selected neurons, LoRA, full fine-tuning"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="benchmark", required=True, metavar="<benchmark>")
    for name, (module, text) in BENCHMARKS.items():
        importlib.import_module(module).add_arguments(commands.add_parser(name, help=text))


def main(args: argparse.Namespace) -> int:
    return importlib.import_module(BENCHMARKS[args.benchmark][0]).main(args)
