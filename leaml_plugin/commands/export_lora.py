"""``leaml export-lora``: an adapter as an exactly equal LoRA, for tools that know no other kind."""

from __future__ import annotations

import argparse

EXAMPLES = """examples:
  leaml export-lora --adapter runs/endo/adapter --output endo-lora --base Qwen/Qwen2.5-VL-3B-Instruct
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter", required=True, help="directory of a LEAML adapter")
    parser.add_argument("--output", required=True, help="directory to write the LoRA to")
    parser.add_argument("--base", help="the base model; with it the logits of both adapters are compared")
    parser.add_argument("--uniform", action="store_true", help="one rank for all modules, padded with zeros")


def main(args: argparse.Namespace) -> int:
    from leaml_plugin.tuner import export_lora

    difference = export_lora(args.adapter, args.output, uniform=args.uniform, base=args.base)
    if difference is not None:
        print(f"largest difference of logits, adapter against LoRA: {difference:.3g}")
    print(f"LoRA: {args.output}")
    return 0
