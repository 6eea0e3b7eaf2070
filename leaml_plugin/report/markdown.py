"""Tables that a command writes into a page of the documentation, so that no number in it is typed by hand.

Covers: Markdown tables, and the part of a page between two marks. Does not cover HTML (``report.page``).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from leaml_plugin.artifacts import write_text
from leaml_plugin.errors import LeamlError

MARKS = ("<!-- results:begin -->", "<!-- results:end -->")


def markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(
        [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}", *(f"| {' | '.join(line)} |" for line in lines)]
    )


def require_marks(page: Path) -> None:
    """Raises LeamlError where the page or its marks are missing; to be asked before any work."""
    if not (page.is_file() and all(mark in page.read_text(encoding="utf-8") for mark in MARKS)):
        raise LeamlError(f"{page}: has no line {MARKS[0]} and {MARKS[1]}, between which the tables would go.")


def write_between(page: Path, body: str) -> None:
    """Put ``body`` between the marks of a page, atomically."""
    before, rest = page.read_text(encoding="utf-8").split(MARKS[0], 1)
    write_text(page, f"{before}{MARKS[0]}\n\n{body}\n{MARKS[1]}{rest.split(MARKS[1], 1)[1]}")
