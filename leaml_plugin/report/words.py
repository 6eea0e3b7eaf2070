"""Numbers and names as a reader wants them: percentages, intervals, reasons, paths without the machine.

Covers: formatting shared by the pages and the terminal tables.
Does not cover: escaping; the templates escape everything that they are given.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from leaml_plugin.metrics import Estimate, family

#: Why a pair was dropped, as a clause that follows "dropped: ".
REASONS: Mapping[str, str] = {
    "unreadable": "the picture could not be opened",
    "malformed": "no question and answer could be read from what the generator wrote",
    "too_long": "the question or the answer is much longer than any label",
    "unanswerable": "the answer says that there is no answer",
    "unlikely": "the generator itself gave the text too low a probability",
    "inconsistent": "other samples of the same picture answer the same question differently",
    "duplicate": "the same question and answer were kept for this picture already",
    "unknown_question": "no label asks this question",
    "round_trip": "asked the same question again, the generator answers otherwise",
    "blind": "without the picture the generator gives the same answer",
    "contradicts_caption": "from the teacher's caption alone the generator gives another answer",
    "near_duplicate": "a question of nearly the same words with the same answer was kept for this picture",
    "overrepresented": "the answer has more than its share among the answers to this question",
}

FAMILY_NAMES: Mapping[str, str] = {
    "yesno": "yes or no",
    "count": "count",
    "choice": "open or choice",
    "color": "colour",
    "location": "location",
    "multilabel": "several answers",
    "": "no question",
}

#: What a second answer of the verify stage answers.
CHECKS: Mapping[str, str] = {
    "round_trip": "asked again:",
    "blind": "without the picture:",
    "caption": "from the caption alone:",
}

_THIN = "\u202f"  # narrow no-break space, between a number and its unit and between thousands
_PATH = re.compile(r"(?:^(?:[/~\\]|\.\.?[/\\]|[A-Za-z]:[/\\]|file:)|[/\\]\.\.[/\\])")


@lru_cache(maxsize=4096)
def family_of(question: str) -> str:
    """The family of a question, with ``""`` for a pair in which no question could be read."""
    return family(question) if question.strip() else ""


def reason_name(reason: str) -> str:
    """``too_long`` as ``too long``."""
    return reason.replace("_", " ")


def reason_text(reason: str) -> str:
    return REASONS.get(reason, f"the filter {reason_name(reason)!r} refused it")


def count(n: int) -> str:
    """``12345`` as ``12 345``, with a narrow no-break space."""
    return f"{n:,}".replace(",", _THIN)


def number(value: float) -> str:
    """Three significant digits without exponent where that is readable."""
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.2e}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def percent(value: float | None, digits: int = 1) -> str:
    """A share as percentage; a dash where there is none."""
    if value is None or math.isnan(value):
        return "–"
    return f"{100 * value:.{digits}f}{_THIN}%"


def points(value: float | None) -> str:
    """A difference of two shares in percentage points, with its sign."""
    if value is None or math.isnan(value):
        return "–"
    text = f"{100 * value:+.1f}".replace("-", "−")
    return "0.0" if text[1:] == "0.0" else text


def estimate(value: Any) -> Estimate | None:
    """An :class:`Estimate` from one, or from its JSON form (at least ``value``); None for anything else."""
    if isinstance(value, Estimate):
        return value
    if isinstance(value, Mapping) and "value" in value:
        known = {f.name: value[f.name] for f in dataclasses.fields(Estimate) if value.get(f.name) is not None}
        return Estimate(**{"low": math.nan, "high": math.nan, "n": 0, "clusters": 0, **known})
    return None


def has_interval(e: Estimate) -> bool:
    return not (math.isnan(e.low) or math.isnan(e.high))


def interval(e: Estimate, *, signed: bool = False) -> str:
    """``39.8 to 46.9``, or nothing where there is no interval."""
    if not has_interval(e):
        return ""
    form = points if signed else lambda v: f"{100 * v:.1f}".replace("-", "−")
    return f"{form(e.low)} to {form(e.high)}"


def without_machine(value: Any) -> Any:
    """A setting as it may be published: of a path on this machine only the last component, at any depth."""
    if isinstance(value, Mapping):
        return {key: without_machine(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_machine(v) for v in value]
    if isinstance(value, str) and _PATH.search(value):
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1] or "/"
    return value


def settings(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as dotted names and text."""
    rows: list[tuple[str, str]] = []
    for name, value in config.items():
        if isinstance(value, Mapping):
            rows += settings(value, f"{prefix}{name}.")
        else:
            shown = without_machine(value)
            text = ", ".join(map(str, shown)) if isinstance(shown, list) else str(shown)
            rows.append((prefix + name, text if text else "–"))
    return rows
