"""What happened, for a person: the page of a run, the page that compares runs, tables for the terminal.

Covers: ``write_report`` (one run), ``write_comparison`` (several methods on one test set), ``table`` and ``summary``
(plain text), and the command ``leaml report``.
Does not cover: computing results. Everything shown is read from artifacts; torch is never imported.

Names resolve lazily, so that the command line may import this package for its help.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from leaml_plugin.lazy import attributes

if TYPE_CHECKING:
    from leaml_plugin.report.comparison import write_comparison
    from leaml_plugin.report.page import write_report
    from leaml_plugin.report.text import summary, table

_EXPORTS = {
    "write_report": "leaml_plugin.report.page",
    "write_comparison": "leaml_plugin.report.comparison",
    "table": "leaml_plugin.report.text",
    "summary": "leaml_plugin.report.text",
}

__all__ = ["add_arguments", "main", *_EXPORTS]

EXAMPLES = """examples:
  leaml report runs/endo                           # writes runs/endo/report.html
  leaml report runs/endo --title "Endoscopy, 1 %"
  leaml report runs/endo --pictures 500            # a sample of the pictures; all counts stay those of the whole run
"""

__getattr__ = attributes(__name__, _EXPORTS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="run directory, finished or not")
    parser.add_argument("--title", help="heading of the page (default: the model and the method)")
    parser.add_argument("--pictures", type=int, default=10_000, help="most pictures to show (default 10000)")


def main(args: argparse.Namespace) -> int:
    from leaml_plugin.report.page import write_report
    from leaml_plugin.report.text import summary

    path = write_report(args.run, title=args.title, pictures=args.pictures)
    text = summary(args.run)
    print(f"{text}\n\n{path}" if text else path)
    return 0
