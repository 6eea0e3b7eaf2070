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

Memory: the texts of one picture's pairs at a time, and one byte a pair. What is compared over the whole run is sorted
in temporary files (``leaml_plugin.tables``), 32 to 100 bytes a pair.
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
from leaml_plugin.tables import Table, added_up, columns, in_order

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

_ROWS = 1 << 14  # pairs that are compared at once
_GROUP = np.dtype([("question", np.int64), ("answer", np.int64), ("pairs", np.int64)])
_QUESTION = np.dtype([("question", np.int64), ("pairs", np.int64), ("answers", np.int64)])

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
    codes = bytearray()
    compare = config.answer_share < 1
    group_of = normalise_question
    if compare and config.balance == "family":
        group_of = Families.learn(qa.question for qa in labels).of
    left = _Left() if compare or config.keep_share < 1 else None
    for _, group in itertools.groupby(pairs, key=lambda pair: pair.picture_id):
        some = list(group)
        for pair, code in zip(some, _judge_picture(config, some, known)):
            if left is not None and not code:
                texts = (group_of(pair.question), normalise(pair.answer)) if compare else ()
                left.add(len(codes), pair.logprob, *map(_hash, texts))
            codes.append(code)
    out = np.frombuffer(codes, dtype=np.uint8)  # of a bytearray, hence writable
    if compare:
        labelled = [(_hash(group_of(qa.question)), _hash(normalise(qa.answer))) for qa in labels]
        for beyond in _overrepresented(config.answer_share, left.rows(), labelled):
            out[beyond] = _CODES["overrepresented"]
    if config.keep_share < 1:
        start, kept = 0, math.ceil(config.keep_share * int((out == 0).sum()))
        rows = (block[out[block["pair"]] == 0] for block in left.rows())
        for block in in_order(rows, ("unlikeliness", "pair")):
            out[block["pair"][max(0, kept - start) :]] = _CODES["unlikely"]
            start += len(block)
    return out


class _Left:
    """The pairs that are compared over the whole run, in a file: hashes of question and answer, and how unlikely."""

    def __init__(self) -> None:
        self._columns = {"question": array("q"), "answer": array("q"), "unlikeliness": array("d"), "pair": array("q")}
        self._table: Table | None = None

    def add(self, pair: int, logprob: float, question: int = 0, answer: int = 0) -> None:
        for column, value in zip(self._columns.values(), (question, answer, -logprob, pair)):
            column.append(value)
        if len(self._columns["pair"]) >= _ROWS:
            self._flush()

    def _flush(self) -> None:
        rows = columns(**{name: np.array(column) for name, column in self._columns.items()})
        self._columns = {name: array(column.typecode) for name, column in self._columns.items()}
        if self._table is None:
            self._table = Table(rows.dtype)
        self._table.append(rows)

    def rows(self) -> Iterator[np.ndarray]:
        """Blocks with the columns ``question``, ``answer``, ``unlikeliness``, ``pair`` (its number)."""
        if self._table is None or self._columns["pair"]:
            self._flush()
        assert self._table is not None
        return self._table.blocks(_ROWS)


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
    share: float, rows: Iterable[np.ndarray], labels: Sequence[tuple[int, int]]
) -> Iterator[np.ndarray]:
    """Numbers of the pairs beyond their answer's share of a question, the least likely first; in blocks.

    Args:
        rows: blocks of pairs with the columns of :class:`_Left`.
        labels: hashes of question and answer of each label.
    """
    known: dict[int, Counter[int]] = defaultdict(Counter)
    for question, answer in labels:
        known[question][answer] += 1
    pairs = Table(np.dtype([("pair", np.int64)]))  # by question and answer, the likeliest first

    def ones() -> Iterator[np.ndarray]:
        for block in in_order(rows, ("question", "answer", "unlikeliness", "pair")):
            pairs.append(columns(pair=block["pair"]))
            yield columns(question=block["question"], answer=block["answer"], pairs=np.ones(len(block), np.int64))

    groups, questions = Table(_GROUP), Table(_QUESTION)  # with one question and answer; with one question
    for block in added_up(ones(), ("question", "answer")):
        groups.append(block)
    answered = (
        columns(question=block["question"], pairs=block["pairs"], answers=np.ones(len(block), np.int64))
        for block in groups.blocks(_ROWS)
    )
    for block in added_up(answered, ("question",)):
        questions.append(block)

    first, start, last = 0, 0, None  # the question and the pair that a block begins with, the question before
    for block in groups.blocks(_ROWS):
        new = np.r_[last is not None and block["question"][0] != last, block["question"][1:] != block["question"][:-1]]
        owner = np.cumsum(new)
        last = block["question"][-1]
        of = questions.read(first, first + int(owner[-1]) + 1)[owner]
        first += int(owner[-1])
        sizes = block["pairs"]
        starts = start + np.cumsum(sizes) - sizes
        start += int(sizes.sum())
        allowed = np.full(len(block), share)
        for group in np.flatnonzero(np.isin(block["question"], list(known))):
            counter = known[int(block["question"][group])]
            allowed[group] = max(share, counter[int(block["answer"][group])] / counter.total())
        free = (of["answers"] == 1) | (allowed >= 1)  # the only answer to a question competes with none
        allowed = np.where(free, 0.0, allowed)
        most = np.maximum(1, np.floor(allowed / (1 - allowed) * (of["pairs"] - sizes))).astype(np.int64)
        for group in np.flatnonzero(~free & (sizes > most)).tolist():
            begin, end = int(starts[group] + most[group]), int(starts[group] + sizes[group])
            for at in range(begin, end, _ROWS):
                yield pairs.read(at, min(at + _ROWS, end))["pair"]
