"""Stage 4, filtering: which pseudo-QA pairs may teach the VQA model, and why the others may not.

Every dropped pair keeps the reason. The filters, in this order; a pair gets the first that applies:

===================  =================================================================================================
unreadable           the picture could not be opened when the pair was to be written or verified
malformed            no question and answer could be read from what the generator wrote
too_long             question or answer is longer than anything the labels show, by ``length_slack``
unanswerable         the answer says that there is no answer ("cannot be determined", "unknown", ...)
unlikely             mean log-probability of the text under the generator is below ``min_logprob``,
                     or not among the likeliest ``keep_share`` of what the other filters leave
unknown_question     no label asks this question (``known_questions``)
round_trip           asked again, the generator answers otherwise (``round_trip``)
blind                asked without the picture, the generator gives the same answer (``blind``)
contradicts_caption  told the teacher's caption in place of the picture, the generator gives another answer, and one
                     that it does not give when it is told nothing: the caption speaks of this, and otherwise
                     (``caption``)
inconsistent         the samples of a picture answer this question differently, and this answer has not the majority
duplicate            the same question and answer were kept for this picture already
near_duplicate       a question of nearly the same words with the same answer was kept for this picture
overrepresented      the answer has more than its share among the answers to the question, or to its family of
                     questions (``answer_share``, ``balance``)
===================  =================================================================================================

Answers count as equal after normalisation (``leaml_plugin.metrics``). docs/pseudo-labels.md says what each filter
removed and saved where the truth is known.

Memory: the texts of one picture's pairs at a time, and 30 bytes a pair for what is compared over the whole run.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from leaml_plugin.artifacts import StageDirectory, atomic_path, read_json, read_records, write_json
from leaml_plugin.errors import LeamlError, unknown_name
from leaml_plugin.families import Families
from leaml_plugin.metrics import normalise, normalise_question
from leaml_plugin.records import QA, PseudoQA, to_json

ROUND_TRIP, BLIND, CAPTION = "round_trip", "blind", "caption"  # the names of the verify stage's second answers
KEPT, DROPPED, COUNTS = "kept.jsonl", "dropped.jsonl", "counts.json"
REASONS = (
    "unreadable",
    "malformed",
    "too_long",
    "unanswerable",
    "unlikely",
    "unknown_question",
    "round_trip",
    "blind",
    "contradicts_caption",
    "inconsistent",
    "duplicate",
    "near_duplicate",
    "overrepresented",
)
BALANCES = ("question", "family")
_CODES = {"": 0, **{reason: code for code, reason in enumerate(REASONS, 1)}}
_NAMES = ("", *REASONS)

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
        unanswerable: drop answers that say that there is no answer, where the labels do not answer so.
        min_logprob: nats per token; pairs below are dropped. None keeps all.
        keep_share: share of the pairs that all other filters leave which is kept, the likeliest first. Unlike
            ``min_logprob`` it needs no knowledge of the model.
        agreement: least share of a picture's samples with the same question that must give the same answer; where
            they differ the most frequent answer is kept. 0 does not compare them.
        known_questions: keep only questions that the labels ask too.
        round_trip: drop pairs whose question the generator answers otherwise when asked again (``verify.round_trip``).
        blind: drop pairs whose question it answers the same without the picture (``verify.blind``).
        caption: drop pairs whose answer the teacher's caption contradicts (``verify.caption``). A pair about a picture
            without a caption is kept.
        duplicate: drop a question and answer that were kept for the same picture already.
        near_duplicate: least Jaccard index of the words of two questions that are the same question; above 1 is off.
        answer_share: largest share of the kept pairs of one question that may have the same answer, the least likely
            ones leave first; 1 keeps all. An answer may always have the share that it has among the labels.
        balance: what ``answer_share`` counts over: the pairs of one "question", or of one "family" of questions that
            begin alike (``leaml_plugin.families``), which suits labels that hardly ask a question twice.
    """

    length_slack: float = 2.0
    unanswerable: bool = True
    min_logprob: float | None = None
    keep_share: float = 1.0
    agreement: float = 0.5
    known_questions: bool = False
    round_trip: bool = True
    blind: bool = False
    caption: bool = False
    duplicate: bool = True
    near_duplicate: float = 0.9
    answer_share: float = 1.0
    balance: str = "question"

    def __post_init__(self):
        if self.length_slack <= 0:
            raise LeamlError(f"filter: length_slack is {self.length_slack}; it must be positive.")
        if not 0 <= self.agreement <= 1:
            raise LeamlError(f"filter: agreement is {self.agreement}; it must lie in [0, 1].")
        for name in ("answer_share", "keep_share"):
            if not 0 < getattr(self, name) <= 1:
                raise LeamlError(f"filter: {name} is {getattr(self, name)}; it must be above 0 and at most 1.")
        if self.balance not in BALANCES:
            raise unknown_name("choice of what answers are balanced over", self.balance, BALANCES)
        if self.near_duplicate <= 0:
            raise LeamlError(f"filter: near_duplicate is {self.near_duplicate}; it must be positive.")


def run(
    config: FilterConfig, stage: StageDirectory, *, shards: Sequence[Path], labels: Sequence[QA]
) -> tuple[Path, dict[str, int]]:
    """Sort the pairs of ``shards`` into kept and dropped; returns the kept file and the counts by reason.

    The shards are read twice: once to judge, once to write.
    """
    if not stage.done:

        def pairs() -> Iterator[PseudoQA]:
            return (pair for path in shards for pair in read_records(path, PseudoQA))

        codes = judge(config, pairs(), labels)
        with (
            atomic_path(stage.file(KEPT)) as kept,
            atomic_path(stage.file(DROPPED)) as dropped,
            contextlib.ExitStack() as files,
        ):
            kept_file, dropped_file = (files.enter_context(open(p, "w", encoding="utf-8")) for p in (kept, dropped))
            for pair, code in zip(pairs(), codes, strict=True):
                line = json.dumps(to_json(replace(pair, reason=_NAMES[code])), ensure_ascii=False, sort_keys=True)
                (dropped_file if code else kept_file).write(line + "\n")
        counts = np.bincount(codes, minlength=len(_NAMES)).tolist()
        write_json(stage.file(COUNTS), {name or "kept": n for name, n in zip(_NAMES, counts)})
        stage.finish()
    return stage.file(KEPT), read_json(stage.file(COUNTS))


def apply(
    config: FilterConfig, pairs: Sequence[PseudoQA], labels: Sequence[QA]
) -> tuple[list[PseudoQA], list[PseudoQA]]:
    """Kept and dropped pairs, each in input order; a dropped pair carries its reason."""
    judged = [replace(pair, reason=_NAMES[code]) for pair, code in zip(pairs, judge(config, pairs, labels))]
    return [p for p in judged if not p.reason], [p for p in judged if p.reason]


def judge(config: FilterConfig, pairs: Iterable[PseudoQA], labels: Sequence[QA]) -> np.ndarray:
    """For each pair, in order, 0 where it is kept, else the position of its reason in :data:`REASONS`, from 1.

    The pairs of a picture stand together, as the stages write them.

    Returns:
        uint8 ``[pairs]``.
    """
    known = _Known.of(config, labels)
    codes, logprobs = bytearray(), array("d")
    questions, answers = array("q"), array("q")
    compare = config.answer_share < 1
    group_of = normalise_question
    if compare and config.balance == "family":
        group_of = Families.learn(qa.question for qa in labels).of
    for _, group in itertools.groupby(pairs, key=lambda pair: pair.picture_id):
        some = list(group)
        for pair, code in zip(some, _judge_picture(config, some, known)):
            codes.append(code)
            logprobs.append(pair.logprob)
            if compare:
                questions.append(_hash(group_of(pair.question)))
                answers.append(_hash(normalise(pair.answer)))
    out = np.frombuffer(codes, dtype=np.uint8)  # of a bytearray, hence writable
    scores = np.frombuffer(logprobs, dtype=np.float64)
    if compare:
        where = np.flatnonzero(out == 0)
        q, a = (np.frombuffer(h, dtype=np.int64)[where] for h in (questions, answers))
        labelled = [(_hash(group_of(qa.question)), _hash(normalise(qa.answer))) for qa in labels]
        out[where[_overrepresented(config.answer_share, q, a, scores[where], labelled)]] = _CODES["overrepresented"]
    if config.keep_share < 1:
        where = np.flatnonzero(out == 0)
        order = where[np.argsort(-scores[where], kind="stable")]
        out[order[math.ceil(config.keep_share * len(order)) :]] = _CODES["unlikely"]
    return out


@dataclass(frozen=True)
class _Known:
    """What the labels say: the longest texts, the questions, the answers."""

    question_limit: float
    answer_limit: float
    questions: frozenset[str]
    answers: frozenset[str]

    @classmethod
    def of(cls, config: FilterConfig, labels: Sequence[QA]) -> _Known:
        return cls(
            config.length_slack * max((len(qa.question) for qa in labels), default=0),
            config.length_slack * max((len(qa.answer) for qa in labels), default=0),
            frozenset(normalise_question(qa.question) for qa in labels),
            frozenset(normalise(qa.answer) for qa in labels),
        )


def _judge_picture(config: FilterConfig, pairs: Sequence[PseudoQA], known: _Known) -> list[int]:
    """The codes of one picture's pairs by every filter that looks at one picture alone."""
    reasons = [pair.reason or _own_reason(config, pair, known) for pair in pairs]
    votes: dict[str, Counter[str]] = defaultdict(Counter)
    for pair, reason in zip(pairs, reasons):
        if not reason:
            votes[normalise_question(pair.question)][normalise(pair.answer)] += 1
    seen: set[tuple[str, str]] = set()
    words: dict[str, list[frozenset[str]]] = defaultdict(list)
    for i, pair in enumerate(pairs):
        if reasons[i]:
            continue
        question, answer = normalise_question(pair.question), normalise(pair.answer)
        answers = votes[question]
        best = min(answers, key=lambda a: (-answers[a], a))
        here = frozenset(re.findall(r"\w+", question))
        if config.agreement > 0 and (answer != best or answers[best] < config.agreement * answers.total()):
            reasons[i] = "inconsistent"
        elif config.duplicate and (question, answer) in seen:
            reasons[i] = "duplicate"
        elif (question, answer) not in seen and any(
            _jaccard(here, there) >= config.near_duplicate for there in words[answer]
        ):
            reasons[i] = "near_duplicate"
        else:
            seen.add((question, answer))
            words[answer].append(here)
    for reason in reasons:
        if reason not in _CODES:
            raise LeamlError(f"a pair came to the filter with the unknown reason {reason!r}; generate the pairs again.")
    return [_CODES[reason] for reason in reasons]


def _own_reason(config: FilterConfig, pair: PseudoQA, known: _Known) -> str:
    """The first filter that drops a pair for what it is itself, or nothing."""
    if not pair.question or not normalise(pair.answer):
        return "malformed"
    if len(pair.question) > known.question_limit or len(pair.answer) > known.answer_limit:
        return "too_long"
    # "not visible" is an answer where the labels use it
    if config.unanswerable and _UNANSWERABLE.search(pair.answer) and normalise(pair.answer) not in known.answers:
        return "unanswerable"
    if config.min_logprob is not None and pair.logprob < config.min_logprob:
        return "unlikely"
    if config.known_questions and normalise_question(pair.question) not in known.questions:
        return "unknown_question"
    if config.round_trip and not _same(pair, ROUND_TRIP):
        return "round_trip"
    if config.blind and _same(pair, BLIND):
        return "blind"
    if config.caption and _contradicted(pair):
        return "contradicts_caption"
    return ""


def _second(pair: PseudoQA, name: str, setting: str) -> str:
    if name not in pair.checks:
        raise LeamlError(f"filter: {setting} needs the second answers of the verify stage; set verify.{setting}=true.")
    return normalise(pair.checks[name])


def _same(pair: PseudoQA, name: str) -> bool:
    return _second(pair, name, name) == normalise(pair.answer)


def _contradicted(pair: PseudoQA) -> bool:
    # the verify stage asks without anything wherever it is to ask with captions
    told_nothing = _second(pair, BLIND, CAPTION)
    if CAPTION not in pair.checks:  # the picture has no caption
        return False
    told = normalise(pair.checks[CAPTION])
    return told not in (normalise(pair.answer), told_nothing)


def _jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    return len(a & b) / len(a | b) if a or b else 1.0


def _hash(text: str) -> int:
    """64 bits that stand for a text; two of a million texts share them once in 30 million runs."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def _overrepresented(
    share: float, questions: np.ndarray, answers: np.ndarray, scores: np.ndarray, labels: Sequence[tuple[int, int]]
) -> np.ndarray:
    """Indices of the pairs beyond their answer's share of a question, the least likely first.

    Args:
        questions, answers: hashes, int64 ``[pairs]``.
        scores: float64 ``[pairs]``.
        labels: question and answer of each label, hashed likewise.
    """
    if not len(questions):
        return np.zeros(0, dtype=np.int64)
    known: dict[int, Counter[int]] = defaultdict(Counter)
    for question, answer in labels:
        known[question][answer] += 1
    order = np.lexsort((np.arange(len(scores)), -scores, answers, questions))
    q, a = questions[order], answers[order]
    new_question = np.r_[True, q[1:] != q[:-1]]
    starts = np.flatnonzero(new_question | np.r_[True, a[1:] != a[:-1]])  # of the groups with one question and answer
    sizes = np.diff(np.r_[starts, len(q)])
    owner = np.cumsum(new_question[starts]) - 1  # which question each group belongs to
    of_question = np.bincount(owner, weights=sizes)[owner]
    alone = np.bincount(owner)[owner] == 1  # the only answer to a question competes with none
    allowed = np.full(len(starts), share)
    for group in np.flatnonzero(np.isin(q[starts], list(known))):
        counter = known[int(q[starts[group]])]
        allowed[group] = max(share, counter[int(a[starts[group]])] / counter.total())
    free = alone | (allowed >= 1)
    allowed = np.where(free, 0.0, allowed)
    most = np.maximum(1, np.floor(allowed / (1 - allowed) * (of_question - sizes)))
    most = np.where(free, sizes, most)
    rank = np.arange(len(q)) - np.repeat(starts, sizes)
    return order[rank >= np.repeat(most, sizes)]
