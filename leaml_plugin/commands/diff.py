"""``leaml diff``: what distinguishes a tuned model from its base, as an adapter."""

from __future__ import annotations

import argparse

EXAMPLES = """examples:
  leaml diff --base Qwen/Qwen2.5-VL-3B-Instruct --tuned endo-model --output endo-adapter
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", required=True, help="directory or Hub id of the base model")
    parser.add_argument("--tuned", required=True, help="directory or Hub id of the tuned model")
    parser.add_argument("--output", required=True, help="directory to write the adapter to")
    parser.add_argument("--ignore-others", action="store_true", help="leave out what no adapter can hold (norms, ...)")
    parser.add_argument("--no-check", action="store_true", help="do not compare the logits of both forms")


def main(args: argparse.Namespace) -> int:
    from leaml_plugin.tuner import diff

    difference = diff(args.base, args.tuned, args.output, ignore_others=args.ignore_others, check=not args.no_check)
    if difference is not None:
        print(f"largest difference of logits, tuned against base + adapter: {difference:.3g}")
    print(f"adapter: {args.output}")
    return 0
