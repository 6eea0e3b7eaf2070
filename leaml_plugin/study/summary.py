"""What the results say: rows per method, paired comparisons by question, the terminal's table and the page's.

Covers results of one checkpoint at a time: results of different checkpoints are never in one table, and results of
one method under several settings are never averaged. Does not cover the plot (``plot``).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from leaml_plugin.report.markdown import markdown_table
from leaml_plugin.study.protocol import METHODS, ORDER, budget_of
from leaml_plugin.study.statistics import Difference, compare, t_interval, unpack_bits

Result = Mapping[str, Any]
#: Methods that have LEAML's labels and captions, or less, and no part of LEAML: what it has to beat.
BASELINES = ("blind", "zero-shot", "full", "full-longer", "full-vision", "lora", "attention", "joint", "joint-lora")
MAIN = "leaml"


@dataclass(frozen=True)
class Row:
    """One method on one world with one budget. Accuracies and shares are in [0, 1], forgetting in points."""

    world: str
    method: str
    labels: float
    results: Sequence[Result]

    @property
    def seeds(self) -> list[int]:
        return [r["seed"] for r in self.results]

    @property
    def accuracies(self) -> list[float]:
        return [r["accuracy"] for r in self.results]

    @property
    def accuracy(self) -> float:
        return sum(self.accuracies) / len(self.results)

    @property
    def ci95(self) -> tuple[float, float] | None:
        """Over seeds; the interval by picture where all seeds are one (zero-shot) or there is one seed."""
        if len(set(self.accuracies)) == 1:
            return tuple(self.results[0]["interval"])  # type: ignore[return-value]
        return t_interval(self.accuracies)

    @property
    def blind_majority(self) -> float:
        """The better of the two image-blind predictors: learnt from the labels (mean over seeds), and the oracle."""
        learnt = sum(r["blind"]["labels"] for r in self.results) / len(self.results)
        return max(learnt, self.results[0]["blind"]["oracle"])

    @property
    def forgetting(self) -> float | None:
        """Points of general question answering lost, mean over seeds."""
        lost = [r["forgetting"]["qa_points"] for r in self.results if r["forgetting"]]
        return sum(lost) / len(lost) if lost else None

    @property
    def caption_loss(self) -> float | None:
        """How much the general caption loss rose (nats a token), mean over seeds."""
        rise = [r["forgetting"]["caption_loss"] for r in self.results if r["forgetting"]]
        return sum(rise) / len(rise) if rise else None

    @property
    def pseudo(self) -> float | None:
        """Share of right pseudo-answers among those that can be checked, mean over seeds."""
        found = [r["pseudo"]["accuracy"] for r in self.results if r.get("pseudo")]
        found = [v for v in found if v is not None]
        return sum(found) / len(found) if found else None

    def marks(self) -> dict[int, np.ndarray]:
        """Right or wrong per question, by seed."""
        return {r["seed"]: unpack_bits(r["questions"]["correct"], r["questions"]["count"]) for r in self.results}

    def to_json(self) -> dict[str, Any]:
        ci = self.ci95
        return {
            "world": self.world,
            "method": self.method,
            "labels": self.labels,
            "seeds": self.seeds,
            "accuracy": self.accuracy,
            "ci95": list(ci) if ci else None,
            "blind_majority": self.blind_majority,
            "forgetting": self.forgetting,
            "caption_loss_rise": self.caption_loss,
            "pseudo_accuracy": self.pseudo,
            "label_questions": self.results[0]["label_questions"],
            "checkpoint": self.results[0]["checkpoint"],
            "setting": self.results[0]["setting"],
        }


def rows(results: Sequence[Result]) -> list[Row]:
    """Results grouped by world, budget, method and setting, in the study's order."""
    groups: dict[tuple, list[Result]] = defaultdict(list)
    for r in results:
        groups[r["world"], r["labels"], ORDER.index(r["method"]), r["setting"], r["questions"]["hash"]].append(r)
    return [
        Row(world, ORDER[method], labels, sorted(some, key=lambda r: r["seed"]))
        for (world, labels, method, *_), some in sorted(groups.items())
    ]


@dataclass(frozen=True)
class Comparison:
    """LEAML against one other method on a world and budget."""

    world: str
    labels: float
    other: str
    difference: Difference

    def to_json(self) -> dict[str, Any]:
        d = self.difference
        return {
            "world": self.world, "labels": self.labels, "method": MAIN, "other": self.other, "difference": d.mean,
            "ci95_seeds": list(d.over_seeds) if d.over_seeds else None, "ci95_pictures": list(d.over_pictures),
            "mcnemar_p": d.p, "seeds": d.seeds,
        }  # fmt: skip


def comparisons(table: Sequence[Row]) -> list[Comparison]:
    """LEAML against every other method of its world and budget, on the seeds that both have."""
    out = []
    for row in table:
        if row.method != MAIN:
            continue
        for other in table:
            if other.method == MAIN or not _beside(other, row):
                continue
            if other.results[0]["questions"]["hash"] != row.results[0]["questions"]["hash"]:
                continue
            ours, theirs = row.marks(), other.marks()
            if other.method == "zero-shot":  # has no seed
                theirs = dict.fromkeys(ours, next(iter(theirs.values())))
            seeds = sorted(ours.keys() & theirs.keys())
            if seeds:
                pictures = row.results[0]["questions"]["pictures"]
                difference = compare([ours[s] for s in seeds], [theirs[s] for s in seeds], pictures)
                out.append(Comparison(row.world, row.labels, other.method, difference))
    return out


def _beside(other: Row, row: Row) -> bool:
    """Whether two rows belong side by side: same world, same budget or a method that has none."""
    return other.world == row.world and other.labels == budget_of(other.method, row.labels)


def best_baseline(table: Sequence[Row], world: str, labels: float) -> Row | None:
    """The most accurate method that has no part of LEAML: the one that LEAML has to beat."""
    candidates = [
        r for r in table if r.world == world and r.labels == budget_of(r.method, labels) and r.method in BASELINES
    ]
    return max(candidates, key=lambda r: r.accuracy, default=None)


def summary(results: Sequence[Result]) -> dict[str, Any]:
    """What ``--json`` writes: ``rows`` and ``comparisons``."""
    table = rows(results)
    return {"rows": [r.to_json() for r in table], "comparisons": [c.to_json() for c in comparisons(table)]}


# -- for people ------------------------------------------------------------------------------------------------------


def _points(value: float | None, sign: bool = False) -> str:
    if value is None:
        return ""
    return f"{100 * value:+.1f}" if sign else f"{100 * value:.1f}"


def _range(ci: tuple[float, float] | None, sign: bool = False) -> str:
    return f"{_points(ci[0], sign)} to {_points(ci[1], sign)}" if ci else ""


HEADER = (
    "world", "labels", "method", "seeds", "accuracy", "95 % interval", "blind", "forgetting", "pseudo-answers",
)  # fmt: skip
COMPARED = ("world", "labels", "LEAML minus", "points", "over seeds", "over seeds and pictures", "McNemar p", "seeds")


def cells(table: Sequence[Row]) -> list[list[str]]:
    return [
        [
            r.world, f"{100 * r.labels:g} %", METHODS[r.method].title, str(len(r.seeds)), _points(r.accuracy),
            _range(r.ci95), _points(r.blind_majority), "" if r.forgetting is None else f"{r.forgetting:.1f}",
            _points(r.pseudo),
        ]
        for r in table
    ]  # fmt: skip


def compared_cells(found: Sequence[Comparison]) -> list[list[str]]:
    return [
        [
            c.world, f"{100 * c.labels:g} %", METHODS[c.other].title, _points(c.difference.mean, True),
            _range(c.difference.over_seeds, True), _range(c.difference.over_pictures, True), f"{c.difference.p:.2g}",
            str(c.difference.seeds),
        ]
        for c in found
    ]  # fmt: skip


def text_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Columns padded with blanks; numbers to the right."""
    widths = [max(len(row[i]) for row in (header, *lines)) for i in range(len(header))]

    def line(row: Sequence[str], head: bool = False) -> str:
        parts = [
            cell.rjust(width) if not head and cell[:1] in "0123456789+-" else cell.ljust(width)
            for cell, width in zip(row, widths)
        ]
        return "  ".join(parts).rstrip()

    return "\n".join([line(header, True), line(["-" * w for w in widths], True), *(line(row) for row in lines)])


def page(results: Sequence[Result], plot: str = "") -> str:
    """The results as Markdown, from nothing but the result files."""
    table = rows(results)
    parts = []
    for world in dict.fromkeys(r.world for r in table):
        own = [r for r in table if r.world == world]
        some = own[0].results[0]
        parts.append(f"### {world}\n")
        parts.append(
            f"Checkpoint `{some['checkpoint'][:12]}`, {some['questions']['count']} test questions on "
            f"{len(set(some['questions']['pictures']))} pictures that no method has seen. Accuracy in per cent, exact "
            "match; interval over seeds (Student's t), where there is no seed by picture (bootstrap). Blind: the "
            "better of the image-blind majority learnt from the labels and the oracle one. Forgetting: points of "
            "general question answering lost. Pseudo-answers: share that is right, for diagnosis only.\n"
        )
        parts.append(markdown_table(HEADER[1:], [row[1:] for row in cells(own)]) + "\n")
        found = comparisons(own)
        if found:
            parts.append(markdown_table(COMPARED[1:], [row[1:] for row in compared_cells(found)]) + "\n")
        parts += [_verdict(own, labels) for labels in sorted({r.labels for r in own if r.method == MAIN})]
    if plot:
        parts.append(f"![Accuracy against the number of labels, per template, and pseudo-answers]({plot})\n")
    return "\n".join(part for part in parts if part)


def _verdict(own: Sequence[Row], labels: float) -> str:
    """The goals of the study in figures: gain over the best baseline, share of all labels, forgetting."""
    main = next((r for r in own if r.method == MAIN and r.labels == labels), None)
    base = best_baseline(own, own[0].world, labels)
    if main is None or base is None:
        return ""
    difference = next(c.difference for c in comparisons([main, base]))
    interval = difference.over_seeds or difference.over_pictures
    upper = next((r for r in own if r.method == "all-labels"), None)
    gain_met = difference.mean >= 0.10
    lines = [
        f"With {100 * labels:g} % of the labels LEAML is {_points(difference.mean, True)} points "
        f"({_range(interval, True)}) over the best baseline, {METHODS[base.method].title} "
        f"(goal: +10.0, {'met' if gain_met else 'missed'})."
    ]
    if upper is not None:
        share = main.accuracy / upper.accuracy
        lines.append(
            f"It reaches {_points(share)} % of all labels (goal: 90 %, {'met' if share >= 0.9 else 'missed'})."
        )
    if main.forgetting is not None:
        met = main.forgetting <= 1.0
        lines.append(f"It forgets {main.forgetting:.1f} points (goal: at most 1, {'met' if met else 'missed'}).")
    return " ".join(lines) + "\n"
