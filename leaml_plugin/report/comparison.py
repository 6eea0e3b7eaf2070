"""The page that compares methods on one test set: table, plot, what the numbers are worth, sample questions.

Covers: any rows that :func:`leaml_plugin.report.table` takes, so that terminal and page show the same.
Does not cover: evaluating; rows and answers are given, or read from the runs' evaluate stages.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from leaml_plugin.artifacts import RunDirectory
from leaml_plugin.errors import LeamlError
from leaml_plugin.metrics import exact_match
from leaml_plugin.records import QA
from leaml_plugin.report import figures, gallery, text, words
from leaml_plugin.report.facts import Facts
from leaml_plugin.report.page import files_of, write_page

Runs = Mapping[str, "RunDirectory | str | os.PathLike[str]"]


def write_comparison(
    path: str | os.PathLike[str],
    rows: text.Rows,
    runs: Runs,
    notes: str | Sequence[str],
    *,
    title: str = "Methods compared",
    reference: str | None = None,
    questions: Iterable[QA] = (),
    answers: Mapping[str, Mapping[str, str]] | None = None,
    samples: int = 24,
) -> Path:
    """Write a page that compares methods and return its path. Equal arguments give equal bytes.

    Args:
        path: of the page; it is written atomically.
        rows: one a method; the first column names it. Estimates (value, low, high) are shown with their intervals,
            and those of the first column that holds any are plotted.
        runs: method -> run directory, for links to the runs' own reports (where they exist already) and, if
            ``answers`` is None, for the answers of their evaluate stages.
        notes: sentences on what the numbers are worth, a paragraph each.
        reference: the method whose value is drawn as a line, usually the image-blind majority.
        questions: where the sample questions come from; if empty, the inputs of the first run that has some.
        answers: method -> question id -> what the method answered.
        samples: how many questions are shown; drawn by a hash of their id, never by the result.

    Raises:
        LeamlError: no rows; ``reference`` is not a method; a run that is none.
    """
    path = Path(path)
    if not rows:
        raise LeamlError(f"{path}: there is no method to compare.")
    names = text.columns(rows)
    methods = [str(row.get(names[0], "")) for row in rows]
    if reference is not None and reference not in methods:
        raise LeamlError(f"{path}: the reference {reference!r} is none of the methods ({', '.join(methods)}).")
    facts = {method: Facts(run) for method, run in runs.items()}
    questions = list(questions) or next((list(f.questions.values()) for f in facts.values() if f.questions), [])
    if answers is None:
        # an answer counts for the same question only: two files may use one id for different questions
        asked = {(qa.id, qa.question, qa.answer) for qa in questions}
        own = {m: [p for p in f.predictions if (p.id, p.question, p.answer) in asked] for m, f in facts.items()}
        answers = {m: {p.id: p.prediction for p in said} for m, said in own.items() if said}
    context = {
        "title": title,
        "files": "",
        "names": names,
        "rows": [[_cell(name, row.get(name)) for name in names] for row in rows],
        "numeric": [all(text.is_number(row.get(name)) for row in rows) for name in names],
        "chart": chart(rows, names, reference),
        "reference": reference,
        "notes": [notes] if isinstance(notes, str) else list(notes),
        "links": links(path, facts),
        "samples": sample(questions, answers, samples),
        "questions": len(questions),
    }
    write_page(path, "comparison.html", context)
    gallery.sweep(files_of(path), ())
    return path


def _cell(name: str, value: Any) -> dict[str, Any]:
    e = words.estimate(value)
    return {"estimate": e, "signed": text.signed(name), "text": "" if e else text.cell(name, value)}


def chart(rows: text.Rows, names: Sequence[str], reference: str | None) -> dict[str, Any] | None:
    """The plot of the first column that holds estimates, the reference as a line."""
    for name in names:
        found = [(str(row.get(names[0], "")), words.estimate(row.get(name))) for row in rows]
        shown = [(method, e) for method, e in found if e is not None]
        if not shown:
            continue
        line = next(((method, e.value) for method, e in shown if method == reference), None)
        return {"name": name, "svg": figures.intervals(shown, title=f"{name} by method", reference=line)}
    return None


def links(path: Path, facts: Mapping[str, Facts]) -> list[tuple[str, str]]:
    """(method, relative address) of the reports that exist."""
    out = []
    for method, f in facts.items():
        if f.run.report.is_file():
            relative = Path(os.path.relpath(f.run.report.resolve(), path.resolve().parent)).as_posix()
            out.append((method, quote(relative)))
    return out


def sample(questions: Sequence[QA], answers: Mapping[str, Mapping[str, str]], most: int) -> list[dict[str, Any]]:
    """Questions with every method's answer, as many of each family as of any other where there are enough."""
    if not answers:
        return []
    by_family: dict[str, list[QA]] = {}
    for qa in sorted(questions, key=lambda qa: hashlib.sha256(qa.id.encode("utf-8", "surrogatepass")).digest()):
        if any(qa.id in said for said in answers.values()):
            by_family.setdefault(words.family_of(qa.question), []).append(qa)
    drawn: list[QA] = []
    for round_ in range(most):
        for name in words.FAMILY_NAMES:
            if len(drawn) < most and round_ < len(by_family.get(name, ())):
                drawn.append(by_family[name][round_])
    gallery.thumbnail.cache_clear()  # a file may have changed since the last report
    return [
        {
            "question": qa.question,
            "label": qa.answer,
            "thumb": gallery.thumbnail(qa.images),
            "answers": [
                (method, gallery.cut(said[qa.id]), exact_match(said[qa.id], qa.answer))
                for method, said in answers.items()
                if qa.id in said
            ],
        }
        for qa in drawn
    ]
