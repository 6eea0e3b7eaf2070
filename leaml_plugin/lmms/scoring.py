"""Metrics in the form lmms-eval aggregates: what one scored row hands over, and what becomes of all rows.

Covers: the values each row contributes under a metric's key, and the aggregations (means, macro F1, 95 % intervals).
Does not cover: the scores themselves (:mod:`leaml_plugin.metrics`).

A row's value under a mean is ``{"score": ..., "cluster": ...}``, of which lmms-eval also prints a clustered standard
error; under an interval it is a pair, of which it prints none. A row that a metric does not concern hands over
``None``, so that every metric counts the same rows.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from leaml_plugin import metrics
from leaml_plugin.lmms import text

Row = Mapping[str, Any]


def scored(score: float, cluster: str) -> dict[str, Any]:
    return {"score": float(score), "cluster": cluster}


def short_answer(prediction: str, doc: Mapping[str, Any], *, cluster: str, template: str, blind: str) -> dict[str, Any]:
    """The values of one short-answer row, by metric; see ``docs/evaluation.md`` for what each metric means.

    ``doc`` has ``answer`` and ``family``; ``blind`` is what the image-blind majority answers.
    """
    answer = doc["answer"]
    right = float(metrics.exact_match(prediction, answer))
    blind_right = float(metrics.exact_match(blind, answer))
    overlap = metrics.set_f1(prediction, answer)
    labelled = {"template": template, "reference": answer, "prediction": prediction, "cluster": cluster}
    values: dict[str, Any] = {
        "exact_match": scored(right, cluster),
        "interval_exact": (right, cluster),
        "set_f1": scored(overlap, cluster),
        "interval_set": (overlap, cluster),
        "macro_f1": labelled,
        "interval_macro": labelled,
        "blind_majority": scored(blind_right, cluster),
        "above_blind": scored(right - blind_right, cluster),
        "interval_above": (right - blind_right, cluster),
    }
    for family in metrics.FAMILIES:
        values[f"family_{family}"] = scored(right, cluster) if family == doc["family"] else None
    return values


def choice(
    prediction: str,
    doc: Mapping[str, Any],
    *,
    options: Mapping[str, str],
    cluster: str,
    levels: Sequence[str],
    sports: Sequence[str],
) -> dict[str, Any]:
    """The values of one multiple-choice row, by metric. ``doc`` has ``answer``, ``blind``, ``level`` and ``sport``."""
    letter = metrics.choice_letter(prediction, options)
    right = float(letter == doc["answer"])
    blind_right = float(doc["blind"] == doc["answer"])
    values: dict[str, Any] = {
        "exact_match": scored(right, cluster),
        "interval_exact": (right, cluster),
        "blind_options": scored(blind_right, cluster),
        "above_blind": scored(right - blind_right, cluster),
        "interval_above": (right - blind_right, cluster),
        "chance": scored(1 / len(options), cluster),
        "no_letter": scored(letter is None, cluster),
        "top_letter_share": letter or "",
    }
    for level in levels:
        values[f"level_{level}"] = scored(right, cluster) if level == doc["level"] else None
    for sport in sports:
        values[f"sport_{sport}"] = scored(right, cluster) if sport == doc["sport"] else None
    return values


def letters(prediction: str, reference: str, *, cluster: str) -> dict[str, Any]:
    """The values of a row whose answer is a set of letters (``A, C``; ``AC``)."""
    got, wanted = _letters(prediction), _letters(reference)
    right = float(bool(wanted) and got == wanted)
    overlap = 2 * len(got & wanted) / (len(got) + len(wanted)) if got and wanted else 0.0
    return {
        "exact_match": scored(right, cluster),
        "interval_exact": (right, cluster),
        "set_f1": scored(overlap, cluster),
    }


_LETTER_RUN = re.compile(r"(?<![A-Za-z])[A-J](?:[\s,;/&+]*(?:and\s+)?[A-J])*(?![A-Za-z])")


def _letters(text: str) -> frozenset[str]:
    """The option letters of the first run of capitals in a text: ``A, C and D``, ``ACD``, ``Answer: (A)``."""
    found = _LETTER_RUN.search(text)
    return frozenset(re.findall(r"[A-J]", found.group())) if found else frozenset()


FREE_TEXT = ("bleu", "rouge1", "rouge2", "rougeL", "meteor", "meteor_stem")


def free_text(
    prediction: str, reference: str, *, cluster: str, complexity: int | None = None, blind: str | None = None
) -> dict[str, Any]:
    """The values of one free-text row: the texts themselves, since BLEU is a score of the whole.

    ``blind`` is what an image-blind predictor answers; each score of it stands beside the model's, as ``blind_*``, and
    ``above_blind`` is the difference in ROUGE-L.
    """
    pair = {"prediction": prediction, "reference": reference, "cluster": cluster}
    values: dict[str, Any] = dict.fromkeys(FREE_TEXT, pair)
    overlap = text.rouge([prediction], [reference], "rougeL")
    values["interval_longest"] = (overlap, cluster)
    if blind is not None:
        blind_pair = {**pair, "prediction": blind}
        values |= {f"blind_{name}": blind_pair for name in FREE_TEXT}
        above = overlap - text.rouge([blind], [reference], "rougeL")
        values["above_blind"] = scored(above, cluster)
        values["interval_above"] = (above, cluster)
    if complexity is not None:
        for level in (1, 2, 3):
            values[f"complexity_{level}"] = scored(overlap, cluster) if level == complexity else None
    return values


# --------------------------------------------------------------------------------------------------- aggregations


def mean(rows: Sequence[Row | None]) -> float | None:
    """The mean of the rows' scores; ``None`` (printed as N/A) where the metric concerns none of them."""
    kept = [row["score"] for row in rows if row is not None]
    # exactly rounded: the order of the rows, which differs with the number of processes, must not show
    return math.fsum(kept) / len(kept) if kept else None


def interval(rows: Sequence[tuple[float, str]]) -> list[float] | None:
    """``[low, high]``, the 95 % interval of the mean score clustered by picture; ``None`` below two pictures."""
    return _bounds(metrics.clustered_mean([score for score, _ in rows], [cluster for _, cluster in rows]))


def macro(rows: Sequence[Row]) -> float | None:
    """Macro F1 per template, averaged over templates."""
    return metrics.macro_f1(*_columns(rows, "template", "reference", "prediction")) if rows else None


def macro_interval(rows: Sequence[Row]) -> list[float] | None:
    return _bounds(metrics.clustered_macro_f1(*_columns(rows, "template", "reference", "prediction", "cluster")))


def top_share(rows: Sequence[str]) -> float | None:
    """How often the most frequent letter was chosen: near 1 is a model that always answers the same."""
    return Counter(rows).most_common(1)[0][1] / len(rows) if rows else None


def bleu(rows: Sequence[Row]) -> float:
    return text.bleu(*_columns(rows, "prediction", "reference"))


def rouge1(rows: Sequence[Row]) -> float:
    return text.rouge(*_columns(rows, "prediction", "reference"), "rouge1")


def rouge2(rows: Sequence[Row]) -> float:
    return text.rouge(*_columns(rows, "prediction", "reference"), "rouge2")


def rouge_l(rows: Sequence[Row]) -> float:
    return text.rouge(*_columns(rows, "prediction", "reference"), "rougeL")


def meteor(rows: Sequence[Row]) -> float | None:
    """``None`` where WordNet is not installed."""
    return text.meteor(*_columns(rows, "prediction", "reference"), synonyms=True)


def meteor_stem(rows: Sequence[Row]) -> float | None:
    return text.meteor(*_columns(rows, "prediction", "reference"), synonyms=False)


def _columns(rows: Sequence[Row], *names: str) -> list[list[Any]]:
    return [[row[name] for row in rows] for name in names]


def _bounds(estimate: metrics.Estimate) -> list[float] | None:
    return None if math.isnan(estimate.low) else [round(estimate.low, 4), round(estimate.high, 4)]
