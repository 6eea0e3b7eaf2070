"""``leaml world``: write an embedded synthetic world as files."""

from __future__ import annotations

import argparse

EXAMPLES = """examples:
  leaml world endoscopy --pictures 500 --output data/endoscopy                   # pictures and JSONL
  leaml world endoscopy --pictures 500 --schema kvasir --output data/kvasir      # Kvasir-VQA's schema
  leaml world sports --pictures 200 --schema sportu --output data/sportu         # SPORTU's schema
  leaml world endoscopy --output data/told --teacher runs/teacher/checkpoint     # captions by our larger teacher
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("world", help="general, endoscopy, sports or garden")
    parser.add_argument("--output", required=True, help="directory to write")
    parser.add_argument("--pictures", type=int, default=100, help="how many pictures (default 100)")
    parser.add_argument("--start", type=int, default=0, help="index of the first picture (default 0)")
    parser.add_argument("--seed", type=int, default=0, help="of the world (default 0)")
    parser.add_argument("--teacher", metavar="DIR", help="checkpoint of ours that writes the captions, such as "
                        "runs/teacher/checkpoint of 'make teacher' (default: the world's noisy generator)")  # fmt: skip
    parser.add_argument("--schema", default="plain", help="plain (default), kvasir or sportu")


def main(args: argparse.Namespace) -> int:
    from leaml_plugin.errors import unknown_name
    from leaml_plugin.worlds import WORLDS, export

    if args.world not in WORLDS:
        raise unknown_name("world", args.world, WORLDS)
    exported = export(
        args.world, args.output, pictures=args.pictures, seed=args.seed, start=args.start, schema=args.schema,
        teacher=args.teacher,
    )  # fmt: skip
    print(exported)
    return 0
