"""The command line: ``leaml <command> ...``.

Each command lives in the module that does the work, as ``add_arguments(parser)`` and ``main(args) -> exit code``;
only the module of the command that was called is imported. A :class:`LeamlError` becomes one sentence on standard
error and exit code 2; results go to standard output.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import sys

from leaml_plugin import __version__
from leaml_plugin.errors import LeamlError, unknown_name

# command -> (module with add_arguments and main, one line of help)
COMMANDS = {
    "adapt": ("leaml_plugin.commands.adapt", "adapt a model to a visual domain from a few labels and many pictures"),
    "caption": ("leaml_plugin.commands.caption", "let a teacher describe unlabelled pictures (local model or server)"),
    "demo": ("leaml_plugin.commands.demo", "the whole of LEAML on the embedded endoscopy world, against baselines"),
    "report": ("leaml_plugin.report", "write the report page of a run again"),
    "doctor": ("leaml_plugin.commands.doctor", "versions, the extension and devices, for a bug report"),
    "eval": ("leaml_plugin.lmms.run", "evaluate a model on lmms-eval tasks; exit code 1 if that fails"),
    "tasks": ("leaml_plugin.lmms.tasks", "list the lmms-eval tasks of this package and where their data is"),
    "data": ("leaml_plugin.lmms.prepare", "labelled, unlabelled and test files from Kvasir-VQA or SPORTU"),
    "merge": ("leaml_plugin.commands.merge", "merge an adapter into its base model"),
    "diff": ("leaml_plugin.commands.diff", "the adapter that turns one model into another"),
    "export-lora": ("leaml_plugin.commands.export_lora", "write an adapter as an exactly equal LoRA"),
    "world": ("leaml_plugin.commands.world", "write pictures, questions and captions of an embedded world"),
    "pretrain": ("leaml_plugin.worlds.pretrain", "pre-train the embedded base checkpoint"),
    "study": ("leaml_plugin.study", "compare methods over label budgets and seeds on the embedded worlds"),
    "gate": ("leaml_plugin.worlds.gate", "whether the embedded checkpoint can tell methods apart"),
    "bench": ("leaml_plugin.commands.bench", "time the kernels and the training step against their peers"),
}

RESUMABLE = ("adapt", "caption", "demo", "data", "study", "pretrain")

EXAMPLES = """examples:
  leaml adapt --model Qwen/Qwen2.5-VL-3B-Instruct --labeled train.jsonl \\
      --unlabeled images/ --captions captions.jsonl --output runs/endo
  leaml eval --model Qwen/Qwen2.5-VL-3B-Instruct --adapter runs/endo/adapter --tasks leaml_endoscopy
  leaml demo
  leaml doctor
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="leaml",
        description="Label-efficient adaptation of multimodal LLMs to visual domains they have never seen.",
        epilog="commands:\n"
        + "".join(f"  {name:<13} {text}\n" for name, (_, text) in COMMANDS.items())
        + "\n'leaml <command> --help' shows the options of a command.\n\n"
        + EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"leaml {__version__}")
    parser.add_argument("command", metavar="<command>", nargs="?", help="one of the commands below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def _serialisation_error() -> type[Exception]:
    """What safetensors raises, where it is loaded at all; it hides the system's error in its text."""
    return getattr(sys.modules.get("safetensors"), "SafetensorError", OSError)


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    try:
        if args.command not in COMMANDS:
            raise unknown_name("command", args.command, COMMANDS)
        module = importlib.import_module(COMMANDS[args.command][0])
        sub = argparse.ArgumentParser(
            prog=f"leaml {args.command}",
            description=COMMANDS[args.command][1].capitalize() + ".",
            epilog=getattr(module, "EXAMPLES", None),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(sub)
        return module.main(sub.parse_args(args.arguments))
    except LeamlError as error:
        print(f"leaml: {error}", file=sys.stderr)
        return error.exit_code
    except (OSError, _serialisation_error()) as error:
        full = (errno.ENOSPC, errno.EDQUOT)
        if getattr(error, "errno", None) not in full and not any(f"(os error {n})" in str(error) for n in full):
            raise
        name = f"{error.filename}: " if getattr(error, "filename", None) else ""
        print(f"leaml: {name}the disk is full; make room and repeat the command.", file=sys.stderr)
        return LeamlError.exit_code
    except KeyboardInterrupt:
        goes_on = "; the same command takes up where it stopped" if args.command in RESUMABLE else ""
        print(f"leaml: interrupted{goes_on}.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
