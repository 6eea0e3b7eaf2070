"""Stage 4, filtering: which pseudo-QA pairs may teach the VQA model, and why the others may not.

Every dropped pair keeps the reason. The filters, in this order; a pair gets the first that applies:

============== =======================================================================================
malformed      no question and answer could be read from what the generator wrote
too_long       question or answer is longer than anything the labels show, by ``length_slack``
unanswerable   the answer says that there is no answer ("cannot be determined", "unknown", ...)
unlikely       mean log-probability of the text under the generator is below ``min_logprob``
inconsistent   the samples of a picture answer this question differently, and this answer has not the majority
duplicate      the same question and answer were kept for this picture already
============== =======================================================================================
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from leaml_plugin.artifacts import StageDirectory, read_json, read_records, write_json, write_records
from leaml_plugin.errors import LeamlError
from leaml_plugin.metrics import normalise, normalise_question
from leaml_plugin.records import QA, PseudoQA

KEPT, DROPPED, COUNTS = "kept.jsonl", "dropped.jsonl", "counts.json"
REASONS = ("malformed", "too_long", "unanswerable", "unlikely", "inconsistent", "duplicate")

_UNANSWERABLE = re.compile(
    r"\b(?:can ?not|can't|could not|unable to|impossible to) (?:be )?(?:determined?|tell|say|answer|know|see|identify)"
    r"|\b(?:unknown|unanswerable|unclear|uncertain|not (?:visible|clear|sure|enough)|no answer)\b"
    r"|\bi (?:don't|do not) know\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class FilterConfig:
    """Which pairs are dropped.

    Attributes:
        length_slack: a question or answer may be this many times as long (in characters) as the longest labelled one.
        min_logprob: nats per token; pairs below are dropped. None keeps all.
        agreement: least share of a picture's samples with the same question that must give the same answer.
        known_questions: keep only questions that the labels ask too.
    """

    length_slack: float = 2.0
    min_logprob: float | None = None
    agreement: float = 0.5
    known_questions: bool = False

    def __post_init__(self):
        if self.length_slack <= 0:
            raise LeamlError(f"filter: length_slack is {self.length_slack}; it must be positive.")
        if not 0 <= self.agreement <= 1:
            raise LeamlError(f"filter: agreement is {self.agreement}; it must lie in [0, 1].")


def run(
    config: FilterConfig, stage: StageDirectory, *, shards: Sequence[Path], labels: Sequence[QA]
) -> tuple[Path, dict[str, int]]:
    """Sort the pairs of ``shards`` into kept and dropped; returns the kept file and the counts by reason."""
    if not stage.done:
        kept, dropped = apply(config, (pair for path in shards for pair in read_records(path, PseudoQA)), labels)
        counts = Counter(pair.reason for pair in dropped)
        write_records(stage.file(KEPT), kept)
        write_records(stage.file(DROPPED), dropped)
        write_json(stage.file(COUNTS), {"kept": len(kept), **{r: counts[r] for r in (*REASONS, "unknown_question")}})
        stage.finish()
    return stage.file(KEPT), read_json(stage.file(COUNTS))


def apply(
    config: FilterConfig, pairs: Iterable[PseudoQA], labels: Sequence[QA]
) -> tuple[list[PseudoQA], list[PseudoQA]]:
    """Kept and dropped pairs, each in input order; a dropped pair carries its reason."""
    question_limit = config.length_slack * max((len(qa.question) for qa in labels), default=0)
    answer_limit = config.length_slack * max((len(qa.answer) for qa in labels), default=0)
    known = {normalise_question(qa.question) for qa in labels}

    def own_reason(pair: PseudoQA) -> str:
        if not pair.question or not normalise(pair.answer):
            return "malformed"
        if len(pair.question) > question_limit or len(pair.answer) > answer_limit:
            return "too_long"
        if _UNANSWERABLE.search(pair.answer):
            return "unanswerable"
        if config.min_logprob is not None and pair.logprob < config.min_logprob:
            return "unlikely"
        if config.known_questions and normalise_question(pair.question) not in known:
            return "unknown_question"
        return ""

    judged = [replace(pair, reason=own_reason(pair)) for pair in pairs]
    votes: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for pair in judged:
        if not pair.reason:
            votes[pair.picture_id, normalise_question(pair.question)][normalise(pair.answer)] += 1

    kept, dropped, seen = [], [], set()
    for pair in judged:
        if not pair.reason:
            question, answer = normalise_question(pair.question), normalise(pair.answer)
            answers = votes[pair.picture_id, question]
            best = min(answers, key=lambda a: (-answers[a], a))
            if len(answers) > 1 and (answer != best or answers[best] < config.agreement * answers.total()):
                pair = replace(pair, reason="inconsistent")
            elif (pair.picture_id, question, answer) in seen:
                pair = replace(pair, reason="duplicate")
            else:
                seen.add((pair.picture_id, question, answer))
        (dropped if pair.reason else kept).append(pair)
    return kept, dropped
