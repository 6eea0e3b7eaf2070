"""Stage 4, filtering: which pseudo-QA pairs may teach the VQA model, and why the others may not.

Every dropped pair keeps the reason. The filters, in this order; a pair gets the first that applies:

================  ====================================================================================================
malformed         no question and answer could be read from what the generator wrote
too_long          question or answer is longer than anything the labels show, by ``length_slack``
unanswerable      the answer says that there is no answer ("cannot be determined", "unknown", ...)
unlikely          mean log-probability of the text under the generator is below ``min_logprob``,
                  or not among the likeliest ``keep_share`` of what the other filters leave
unknown_question  no label asks this question (``known_questions``)
round_trip        asked again, the generator answers otherwise (``round_trip``)
blind             asked without the picture, the generator gives the same answer (``blind``)
inconsistent      the samples of a picture answer this question differently, and this answer has not the majority
duplicate         the same question and answer were kept for this picture already
near_duplicate    a question of nearly the same words with the same answer was kept for this picture
overrepresented   the answer has more than its share among the answers to the question (``answer_share``)
================  ====================================================================================================

Answers count as equal after normalisation (``leaml_plugin.metrics``).
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from leaml_plugin.artifacts import StageDirectory, read_json, read_records, write_json, write_records
from leaml_plugin.errors import LeamlError
from leaml_plugin.metrics import normalise, normalise_question
from leaml_plugin.records import QA, PseudoQA

ROUND_TRIP, BLIND = "round_trip", "blind"  # the names of the verify stage's second answers
KEPT, DROPPED, COUNTS = "kept.jsonl", "dropped.jsonl", "counts.json"
REASONS = (
    "malformed",
    "too_long",
    "unanswerable",
    "unlikely",
    "unknown_question",
    "round_trip",
    "blind",
    "inconsistent",
    "duplicate",
    "near_duplicate",
    "overrepresented",
)

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
        keep_share: share of the pairs that all other filters leave which is kept, the likeliest first. Unlike
            ``min_logprob`` it needs no knowledge of the model.
        agreement: least share of a picture's samples with the same question that must give the same answer.
        known_questions: keep only questions that the labels ask too.
        round_trip: drop pairs whose question the generator answers otherwise when asked again (``verify.round_trip``).
        blind: drop pairs whose question it answers the same without the picture (``verify.blind``).
        near_duplicate: least Jaccard index of the words of two questions that are the same question; above 1 is off.
        answer_share: largest share of the kept pairs of one question that may have the same answer, the least likely
            ones leave first; 1 keeps all. An answer may always have the share that it has among the labels.
    """

    length_slack: float = 2.0
    min_logprob: float | None = None
    keep_share: float = 1.0
    agreement: float = 0.5
    known_questions: bool = False
    round_trip: bool = False
    blind: bool = False
    near_duplicate: float = 0.9
    answer_share: float = 1.0

    def __post_init__(self):
        if self.length_slack <= 0:
            raise LeamlError(f"filter: length_slack is {self.length_slack}; it must be positive.")
        if not 0 <= self.agreement <= 1:
            raise LeamlError(f"filter: agreement is {self.agreement}; it must lie in [0, 1].")
        for name in ("answer_share", "keep_share"):
            if not 0 < getattr(self, name) <= 1:
                raise LeamlError(f"filter: {name} is {getattr(self, name)}; it must be above 0 and at most 1.")
        if self.near_duplicate <= 0:
            raise LeamlError(f"filter: near_duplicate is {self.near_duplicate}; it must be positive.")


def run(
    config: FilterConfig, stage: StageDirectory, *, shards: Sequence[Path], labels: Sequence[QA]
) -> tuple[Path, dict[str, int]]:
    """Sort the pairs of ``shards`` into kept and dropped; returns the kept file and the counts by reason."""
    if not stage.done:
        kept, dropped = apply(config, (pair for path in shards for pair in read_records(path, PseudoQA)), labels)
        counts = Counter(pair.reason for pair in dropped)
        write_records(stage.file(KEPT), kept)
        write_records(stage.file(DROPPED), dropped)
        write_json(stage.file(COUNTS), {"kept": len(kept), **{reason: counts[reason] for reason in REASONS}})
        stage.finish()
    return stage.file(KEPT), read_json(stage.file(COUNTS))


def apply(
    config: FilterConfig, pairs: Iterable[PseudoQA], labels: Sequence[QA]
) -> tuple[list[PseudoQA], list[PseudoQA]]:
    """Kept and dropped pairs, each in input order; a dropped pair carries its reason."""
    question_limit = config.length_slack * max((len(qa.question) for qa in labels), default=0)
    answer_limit = config.length_slack * max((len(qa.answer) for qa in labels), default=0)
    known = {normalise_question(qa.question) for qa in labels}
    answers_known = {normalise(qa.answer) for qa in labels}  # "not visible" is an answer where the labels use it

    def own_reason(pair: PseudoQA) -> str:
        if not pair.question or not normalise(pair.answer):
            return "malformed"
        if len(pair.question) > question_limit or len(pair.answer) > answer_limit:
            return "too_long"
        if _UNANSWERABLE.search(pair.answer) and normalise(pair.answer) not in answers_known:
            return "unanswerable"
        if config.min_logprob is not None and pair.logprob < config.min_logprob:
            return "unlikely"
        if config.known_questions and normalise_question(pair.question) not in known:
            return "unknown_question"
        if config.round_trip and not _same(pair, ROUND_TRIP):
            return "round_trip"
        if config.blind and _same(pair, BLIND):
            return "blind"
        return ""

    judged = [replace(pair, reason=own_reason(pair)) for pair in pairs]
    votes: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for pair in judged:
        if not pair.reason:
            votes[pair.picture_id, normalise_question(pair.question)][normalise(pair.answer)] += 1

    seen: set[tuple[str, str, str]] = set()
    words: dict[tuple[str, str], list[frozenset[str]]] = defaultdict(list)
    for i, pair in enumerate(judged):
        if pair.reason:
            continue
        question, answer = normalise_question(pair.question), normalise(pair.answer)
        answers = votes[pair.picture_id, question]
        best = min(answers, key=lambda a: (-answers[a], a))
        here = frozenset(re.findall(r"\w+", question))
        if len(answers) > 1 and (answer != best or answers[best] < config.agreement * answers.total()):
            judged[i] = replace(pair, reason="inconsistent")
        elif (pair.picture_id, question, answer) in seen:
            judged[i] = replace(pair, reason="duplicate")
        elif any(_jaccard(here, there) >= config.near_duplicate for there in words[pair.picture_id, answer]):
            judged[i] = replace(pair, reason="near_duplicate")
        else:
            seen.add((pair.picture_id, question, answer))
            words[pair.picture_id, answer].append(here)
    if config.answer_share < 1:
        for i in _overrepresented(config.answer_share, judged, labels):
            judged[i] = replace(judged[i], reason="overrepresented")
    if config.keep_share < 1:
        left = sorted((i for i, p in enumerate(judged) if not p.reason), key=lambda i: (-judged[i].logprob, i))
        for i in left[math.ceil(config.keep_share * len(left)) :]:
            judged[i] = replace(judged[i], reason="unlikely")
    return [p for p in judged if not p.reason], [p for p in judged if p.reason]


def _same(pair: PseudoQA, name: str) -> bool:
    if name not in pair.checks:
        raise LeamlError(f"filter: {name} needs the second answers of the verify stage; set verify.{name}=true.")
    return normalise(pair.checks[name]) == normalise(pair.answer)


def _jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    return len(a & b) / len(a | b) if a or b else 1.0


def _overrepresented(share: float, judged: Sequence[PseudoQA], labels: Sequence[QA]) -> list[int]:
    """Indices of the pairs beyond their answer's share of a question, the least likely first."""
    known: dict[str, Counter[str]] = defaultdict(Counter)
    for qa in labels:
        known[normalise_question(qa.question)][normalise(qa.answer)] += 1
    groups: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for i, pair in enumerate(judged):
        if not pair.reason:
            groups[normalise_question(pair.question)][normalise(pair.answer)].append(i)
    out = []
    for question, answers in groups.items():
        if len(answers) < 2:
            continue  # the only answer to a question competes with none
        for answer, indices in answers.items():
            allowed = max(share, known[question][answer] / max(known[question].total(), 1))
            if allowed >= 1:
                continue
            others = sum(len(v) for a, v in answers.items() if a != answer)
            most = max(1, int(allowed / (1 - allowed) * others))
            indices.sort(key=lambda i: (-judged[i].logprob, i))
            out += indices[most:]
    return out
