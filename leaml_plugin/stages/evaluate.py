"""Evaluation inside the pipeline: exact match against the image-blind majority, with intervals by picture.

For results to compare with others use lmms-eval's tasks (``leaml eval``); this stage scores a labelled file of the
user's own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from leaml_plugin.artifacts import StageDirectory, read_json, write_json, write_records
from leaml_plugin.errors import LeamlError
from leaml_plugin.metrics import (
    BlindMajority,
    clustered_macro_f1,
    clustered_mean,
    exact_match,
    normalise_question,
    set_f1,
)
from leaml_plugin.records import QA, Prediction

if TYPE_CHECKING:
    from leaml_plugin.data import Collator, Prompts
    from leaml_plugin.models import Loaded

PREDICTIONS, METRICS = "predictions.jsonl", "metrics.json"


@dataclass(frozen=True)
class EvaluateConfig:
    """How answers are generated: greedily, ``batch_size`` at once, at most ``max_new_tokens`` tokens."""

    batch_size: int = 32
    max_new_tokens: int = 32

    def __post_init__(self):
        for name in ("batch_size", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise LeamlError(f"evaluate: {name} is {getattr(self, name)}; it must be at least 1.")


def run(
    config: EvaluateConfig,
    stage: StageDirectory,
    *,
    load: Callable[[], Loaded],
    collator: Callable[[Loaded], Collator],
    prompts: Prompts,
    questions: Sequence[QA],
    labels: Sequence[QA],
) -> dict[str, Any]:
    """Answer ``questions`` and score them; ``labels`` teach the image-blind majority. Returns the metrics."""
    if stage.done:
        return read_json(stage.file(METRICS))
    from leaml_plugin.inference import generate

    loaded = load()
    turns = [dataclasses.replace(prompts.vqa(qa), target=None) for qa in questions]
    answers = {
        out.id: out.text
        for out in generate(
            loaded,
            turns,
            collator=collator(loaded),
            batch_size=config.batch_size,
            max_new_tokens=config.max_new_tokens,
        )
    }
    predictions = [
        Prediction(qa.id, qa.question, qa.answer, answers[qa.id], exact_match(answers[qa.id], qa.answer), qa.meta)
        for qa in questions
    ]
    metrics = summarise(questions, predictions, labels)
    write_records(stage.file(PREDICTIONS), predictions)
    write_json(stage.file(METRICS), metrics)
    stage.finish()
    return metrics


def summarise(questions: Sequence[QA], predictions: Sequence[Prediction], labels: Sequence[QA]) -> dict[str, Any]:
    """Exact match, set F1, macro F1 and the image-blind majority, each with a 95 % interval clustered by picture."""
    pictures = [qa.images[0].uri if qa.images else qa.id for qa in questions]
    references = [qa.answer for qa in questions]
    texts = [p.prediction for p in predictions]
    templates = [normalise_question(qa.question) for qa in questions]
    blind = BlindMajority((qa.question, qa.answer) for qa in labels)
    blind_hits = [float(exact_match(blind.answer(qa.question), qa.answer)) for qa in questions]
    hits = [float(p.correct) for p in predictions]
    estimates = {
        "exact_match": clustered_mean(hits, pictures),
        "set_f1": clustered_mean([set_f1(t, r) for t, r in zip(texts, references)], pictures),
        "macro_f1": clustered_macro_f1(templates, references, texts, pictures),
        "blind_majority": clustered_mean(blind_hits, pictures),
        "above_blind": clustered_mean([h - b for h, b in zip(hits, blind_hits)], pictures),
    }
    out: dict[str, Any] = {
        name: {key: None if value != value else value for key, value in dataclasses.asdict(estimate).items()}
        for name, estimate in estimates.items()  # NaN bounds, where there is one picture only, are null in JSON
    }
    by_template: dict[str, list[float]] = {}
    for template, hit in zip(templates, hits):
        by_template.setdefault(template, []).append(hit)
    out["by_template"] = {t: {"exact_match": sum(h) / len(h), "n": len(h)} for t, h in sorted(by_template.items())}
    return out
