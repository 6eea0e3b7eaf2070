"""Plain-text tables: aligned columns for the terminal, intervals beside their values.

Covers: :func:`table` for any rows, :func:`summary` for what a run ends with.
Does not cover: the pages, which show the same rows (``leaml_plugin.report.comparison``).
"""

from __future__ import annotations

import math
import os
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from leaml_plugin.artifacts import RunDirectory
from leaml_plugin.report import words

Rows = Sequence[Mapping[str, Any]]


def columns(rows: Rows) -> list[str]:
    """The headings of all rows, in the order in which they first appear."""
    return list(dict.fromkeys(name for row in rows for name in row))


def signed(name: str) -> bool:
    """Whether a column holds differences: its heading says so."""
    return any(word in name.lower() for word in ("above", "below", "gain", "difference", "change"))


def cell(name: str, value: Any) -> str:
    """One value as text: estimates with their interval, floats as they are, None as a dash."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    e = words.estimate(value)
    if e is not None:
        head = words.points(e.value) if signed(name) else f"{100 * e.value:.1f}"
        return f"{head} ({words.interval(e, signed=signed(name))})" if words.has_interval(e) else head
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return words.number(value)
    return str(value)


def is_number(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def table(rows: Rows) -> str:
    """Rows as an aligned text table.

    Args:
        rows: mappings from heading to value. A value is text, a number, None, or an estimate
            (:class:`leaml_plugin.metrics.Estimate` or its JSON form), shown in per cent as ``43.1 (39.8 to 46.9)``;
            under a heading with "above", "gain" or "difference" in points with a sign.

    Returns:
        Lines joined by newlines, without one at the end; columns of numbers are aligned at the right, of estimates
        at their start. The empty string for no rows.
    """
    if not rows:
        return ""
    names = columns(rows)
    texts = [[_one_line(cell(name, row.get(name))) for name in names] for row in rows]
    right = [all(is_number(row.get(name)) for row in rows) for name in names]
    estimates = [all(row.get(n) is None or words.estimate(row.get(n)) is not None for row in rows) for n in names]
    for i, is_estimate in enumerate(estimates):
        if is_estimate:
            _align_values(texts, i)
    widths = [max(_width(name), *(_width(line[i]) for line in texts)) for i, name in enumerate(names)]

    def line(cells: Sequence[str]) -> str:
        parts = []
        for text, width, to_right in zip(cells, widths, right):
            space = " " * (width - _width(text))
            parts.append(space + text if to_right else text + space)
        return "  ".join(parts).rstrip()

    return "\n".join([line(names), "  ".join("-" * width for width in widths), *(line(cells) for cells in texts)])


def _align_values(texts: list[list[str]], i: int) -> None:
    """Pad the values before the interval, so that their decimal points stand under each other."""
    heads = [line[i].split(" ", 1)[0] for line in texts]
    widest = max(_width(head) for head in heads)
    for line, head in zip(texts, heads):
        line[i] = " " * (widest - _width(head)) + line[i]


def _one_line(text: str) -> str:
    """Control characters would move the cursor, or recolour the terminal."""
    return "".join(c if c.isprintable() else " " for c in text)


def _width(text: str) -> int:
    """Columns that a terminal gives to a text."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def summary(run: RunDirectory | str | os.PathLike[str]) -> str:
    """What a run ends with on the terminal: scores and the yield of pseudo-labels; empty where it has neither."""
    from leaml_plugin.report.facts import Facts

    facts = Facts(run)
    parts = []
    if facts.metrics:
        shown = [
            ("exact_match", "exact match"),
            ("set_f1", "set F1"),
            ("macro_f1", "macro F1"),
            ("blind_majority", "image-blind majority"),
            ("above_blind", "above it (points)"),
        ]
        parts.append(
            table(
                [
                    {"score": text, "per cent": cell(text, facts.metrics[name])}
                    for name, text in shown
                    if name in facts.metrics
                ]
            )
        )
    if facts.pairs:
        reasons = facts.reasons
        rows = [
            {
                "pseudo-QA": words.FAMILY_NAMES.get(name, name),
                "written": sum(counts.values()),
                "kept": counts[""],
                **{words.reason_name(reason): counts[reason] for reason in reasons},
            }
            for name, counts in facts.yields.items()
        ]
        if len(rows) > 1:
            rows.append({"pseudo-QA": "all", **{k: sum(r[k] for r in rows) for k in rows[0] if k != "pseudo-QA"}})
        parts.append(table(rows))
    if facts.skipped:
        parts.append(f"{facts.skipped} unlabelled pictures could not be used; {facts.run.skipped} tells why.")
    return "\n\n".join(parts)
