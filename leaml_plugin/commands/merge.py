"""``leaml merge``: an adapter and its base as one ordinary model."""

from __future__ import annotations

import argparse

EXAMPLES = """examples:
  leaml merge --base Qwen/Qwen2.5-VL-3B-Instruct --adapter runs/endo/adapter --output endo-model
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", required=True, help="directory or Hub id of the base model")
    parser.add_argument(
        "--adapter", required=True, help="directory of the adapter (LEAML's, or any of PEFT that merges)"
    )
    parser.add_argument("--output", required=True, help="directory to write; must be empty or not there")
    parser.add_argument("--no-check", action="store_true", help="do not compare the logits of both forms")


def main(args: argparse.Namespace) -> int:
    from leaml_plugin.tuner import merge

    difference = merge(args.base, args.adapter, args.output, check=not args.no_check)
    if difference is not None:
        print(f"largest difference of logits, base + adapter against merged: {difference:.3g}")
    print(f"model: {args.output}")
    return 0
