"""Scores for short visual answers, their intervals, and the image-blind baselines they have to beat.

Covers: normalisation with the documented spelling table, exact match, set F1, macro F1 per question template,
multiple-choice letters, intervals clustered by picture, and what a predictor reaches that never sees the picture.
Does not cover: BLEU, ROUGE and METEOR of the free-text tasks (``leaml_plugin.lmms.text``, over the libraries).

An answer is a set of items: Kvasir-VQA separates the items of 'check all that are present' by ';', and one in eight
of its answers has more than one. A single answer is a set of one, so one rule scores both.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

# ------------------------------------------------------------------------------------------------ normalisation

#: Words replaced wherever they stand in an item: misspellings found in Kvasir-VQA, British against American
#: spelling (both occur in its answers and in what models write), and written numbers.
WORD_SPELLING: Mapping[str, str] = {
    "instrumnet": "instrument",
    "instrumnets": "instruments",
    "rigth": "right",
    "centre": "center",
    "central": "center",
    "artefact": "artifact",
    "artefacts": "artifacts",
    "colour": "color",
    "grey": "gray",
    "esophagitis": "oesophagitis",
    "esophagus": "oesophagus",
    "hemorrhoids": "haemorrhoids",
    "hemorrhage": "haemorrhage",
    "barrett's": "barretts",
    "barrett": "barretts",
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}

#: Whole items replaced, after the words: sizes without their unit, and other names for one answer.
ITEM_SPELLING: Mapping[str, str] = {
    ">20": ">20mm",
    "<5": "<5mm",
    "5-10": "5-10mm",
    "11-20": "11-20mm",
    "z line": "z-line",
    "not applicable": "not relevant",
    "n/a": "not relevant",
    "nothing": "none",
    "no abnormality": "none",
}

_SEPARATOR = re.compile(r"[;,\n]|\s+and\s+")
_SIZE = re.compile(r"\s*([<>]?)\s*(\d+)(?:\s*(?:-|to)\s*(\d+))?\s*(?:mm|millimet(?:er|re)s?)")
_ARTICLE = re.compile(r"^(?:a|an|the)\s+")
_EDGE = " \t\r.:!?\"'`*()[]"


def _item(text: str) -> str:
    text = _ARTICLE.sub("", " ".join(text.strip(_EDGE).split()))
    text = " ".join(WORD_SPELLING.get(word, word) for word in text.split(" "))
    # hyphenated positions carry the same misspellings: 'lower-rigth'
    text = "-".join(WORD_SPELLING.get(part, part) for part in text.split("-")) if "-" in text else text
    size = _SIZE.fullmatch(text)
    if size:
        sign, low, high = size.groups()
        text = f"{sign}{low}{'-' + high if high else ''}mm"
    return ITEM_SPELLING.get(text, text)


def items(answer: object) -> frozenset[str]:
    """The normalised items of an answer: lower case, separated at ``; , and`` or a line break, spelt by the tables.

    Numbers count as their text (``2`` and ``"2"`` are one answer). Nothing but punctuation gives the empty set,
    which equals no reference.
    """
    text = unicodedata.normalize("NFKC", str(answer)).casefold()
    text = text.replace("\u2013", "-").replace("\u2014", "-").replace("\u2019", "'")
    return frozenset(filter(None, (_item(part) for part in _SEPARATOR.split(text))))


def normalise(answer: object) -> str:
    """An answer in its one canonical spelling: the sorted items joined by ``"; "``."""
    return "; ".join(sorted(items(answer)))


def normalise_question(question: str) -> str:
    """What identifies a question template: its text without case, spacing and the spelling noise of the data."""
    words = unicodedata.normalize("NFKC", question).casefold().split()
    return " ".join(WORD_SPELLING.get(word, word) for word in words if word)


# ----------------------------------------------------------------------------------------------- one answer each


def exact_match(prediction: object, reference: object) -> bool:
    """Whether the two answers have the same items, in any order."""
    wanted = items(reference)
    return bool(wanted) and items(prediction) == wanted


def set_f1(prediction: object, reference: object) -> float:
    """The F1 of the predicted items against the reference items; equals exact match for a single answer."""
    got, wanted = items(prediction), items(reference)
    if not got or not wanted:
        return 0.0
    return 2 * len(got & wanted) / (len(got) + len(wanted))


def choice_letter(prediction: str, options: Mapping[str, str]) -> str | None:
    """The option letter that a model's text chooses, or ``None`` where it chooses none or several.

    Read in this order: the text is a letter (``B``, ``(b)``, ``B.``); it begins with one (``B) Holding``); it says
    ``answer is B`` or ``answer: B``; it equals one option's text, after normalisation, with or without its letter.
    """
    text = prediction.strip()
    known = {letter.upper(): letter for letter in options}
    letters = "".join(known)
    for pattern in (rf"[\s(\[\"'*]*([{letters}])[\s.):\]\"'*]*", rf"[\s(\[\"'*]*([{letters}])[.):\]]\s*.+"):
        match = re.fullmatch(pattern, text, flags=re.IGNORECASE | re.DOTALL)
        if match:
            return known[match.group(1).upper()]
    said = re.findall(rf"\banswer(?:\s+is)?\s*[:=]?\s*[(\"'*]*([{letters}])\b", text, flags=re.IGNORECASE)
    if len({letter.upper() for letter in said}) == 1:
        return known[said[0].upper()]
    same = [k for k, option in options.items() if exact_match(text, option) or exact_match(text, f"{k} {option}")]
    return same[0] if len(same) == 1 else None


# ------------------------------------------------------------------------------------------------------ intervals


@dataclass(frozen=True)
class Estimate:
    """A score with its interval; ``low`` and ``high`` are NaN where there are fewer than two clusters."""

    value: float
    low: float
    high: float
    n: int
    clusters: int


def _cluster_index(clusters: Sequence[object]) -> tuple[np.ndarray, int]:
    # by name, not by appearance: several processes hand their rows over in another order than one does
    order = {name: i for i, name in enumerate(sorted(set(clusters), key=str))}
    return np.array([order[name] for name in clusters], dtype=np.intp), len(order)


def _resample(n_clusters: int, resamples: int, seed: int) -> np.ndarray:
    """How often each cluster is drawn, ``[resamples, n_clusters]``: the bootstrap draws pictures, not questions."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(n_clusters, np.full(n_clusters, 1 / n_clusters), size=resamples).astype(np.float64)


def _interval(values: np.ndarray, level: float) -> tuple[float, float]:
    tail = (1 - level) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def clustered_mean(
    scores: Sequence[float],
    clusters: Sequence[object],
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """The mean score with a percentile bootstrap interval over clusters (questions of one picture are not independent).

    Every score counts alike; a cluster enters with all its scores or not at all.
    """
    if len(scores) != len(clusters):
        raise ValueError(f"{len(scores)} scores but {len(clusters)} cluster names")
    if not scores:
        return Estimate(math.nan, math.nan, math.nan, 0, 0)
    index, count = _cluster_index(clusters)
    values = np.asarray(scores, dtype=np.float64)
    mean = math.fsum(scores) / len(scores)
    if count < 2:
        return Estimate(mean, math.nan, math.nan, len(values), count)
    sums = np.bincount(index, weights=values, minlength=count)
    sizes = np.bincount(index, minlength=count).astype(np.float64)
    draws = _resample(count, resamples, seed)
    return Estimate(mean, *_interval(draws @ sums / (draws @ sizes), level), len(values), count)


def _f1_counts(
    templates: Sequence[str], references: Sequence[object], predictions: Sequence[object]
) -> tuple[list[tuple[str, str]], list[tuple[int, int, int, int]]]:
    """The (template, answer item) classes, and events ``(row, class, is reference, is prediction)``."""
    wanted = [items(reference) for reference in references]
    known = {(template, item) for template, ref in zip(templates, wanted, strict=True) for item in ref}
    classes = {key: i for i, key in enumerate(sorted(known))}
    events = []
    for row, (template, reference, prediction) in enumerate(zip(templates, wanted, predictions, strict=True)):
        got = items(prediction)
        for item in sorted(reference | got):
            k = classes.get((template, item))
            # an item that no reference of the template holds is no class: it costs its row the recall, not more
            if k is not None:
                events.append((row, k, int(item in reference), int(item in got)))
    return list(classes), events


def _macro(hits: np.ndarray, wanted: np.ndarray, got: np.ndarray, owner: np.ndarray, n_templates: int) -> np.ndarray:
    """Macro F1 for each row of counts ``[draws, classes]``: over the classes of a template, then over templates."""
    total = wanted + got
    f1 = np.divide(2 * hits, total, out=np.zeros_like(total), where=total > 0)
    present = (wanted > 0).astype(np.float64)  # a class that a draw leaves out of the references is not averaged
    member = np.zeros((len(owner), n_templates))
    member[np.arange(len(owner)), owner] = 1.0
    sums, sizes = (f1 * present) @ member, present @ member
    per_template = np.divide(sums, sizes, out=np.zeros_like(sums), where=sizes > 0)
    return per_template.sum(1) / np.maximum((sizes > 0).sum(1), 1)


def macro_f1(templates: Sequence[str], references: Sequence[object], predictions: Sequence[object]) -> float:
    """F1 of every answer item that occurs in a template's references, averaged over items, then over templates.

    A frequent answer weighs no more than a rare one: 'always no' scores low where accuracy would flatter it. Within
    one template this is scikit-learn's ``f1_score(..., average="macro", labels=<reference items>)`` on indicators.
    """
    return clustered_macro_f1(templates, references, predictions, range(len(templates)), resamples=0).value


def clustered_macro_f1(
    templates: Sequence[str],
    references: Sequence[object],
    predictions: Sequence[object],
    clusters: Sequence[object],
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """:func:`macro_f1` with a percentile bootstrap interval over clusters."""
    if not len(templates):
        return Estimate(math.nan, math.nan, math.nan, 0, 0)
    index, count = _cluster_index(list(clusters))
    classes, events = _f1_counts(templates, references, predictions)
    if not classes:
        return Estimate(0.0, math.nan, math.nan, len(templates), count)
    names = {name: i for i, name in enumerate(dict.fromkeys(template for template, _ in classes))}
    owner = np.array([names[template] for template, _ in classes], dtype=np.intp)
    row, k, is_ref, is_pred = np.array(events, dtype=np.intp).T
    counts = np.zeros((3, count, len(classes)))
    for slot, weight in enumerate((is_ref * is_pred, is_ref, is_pred)):
        np.add.at(counts[slot], (index[row], k), weight)
    value = float(_macro(*(counts.sum(1, keepdims=True)), owner, len(names))[0])
    if resamples == 0 or count < 2:
        return Estimate(value, math.nan, math.nan, len(templates), count)
    draws = _resample(count, resamples, seed)
    values = _macro(draws @ counts[0], draws @ counts[1], draws @ counts[2], owner, len(names))
    return Estimate(value, *_interval(values, level), len(templates), count)


# ---------------------------------------------------------------------------------------- image-blind predictors


class BlindMajority:
    """Answers every question with the most frequent labelled answer to that question, the picture unseen.

    On Kvasir-VQA this reaches 62 to 65 % exact match from one per cent of the pictures, as much as the published
    fine-tuning baselines: a model's score means something only above it. Ties go to the alphabetically first answer;
    a question without labels gets the most frequent answer of all.
    """

    def __init__(self, labels: Iterable[tuple[str, object]]):
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        overall: Counter[str] = Counter()
        for question, answer in labels:
            text = normalise(answer)
            counts[normalise_question(question)][text] += 1
            overall[text] += 1
        self._best = {question: self._top(counter) for question, counter in counts.items()}
        self._fallback = self._top(overall) if overall else ""

    @staticmethod
    def _top(counter: Counter[str]) -> str:
        return min(counter, key=lambda answer: (-counter[answer], answer))

    def answer(self, question: str) -> str:
        return self._best.get(normalise_question(question), self._fallback)


class BlindText:
    """Answers an open question with a labelled answer, the picture unseen: the most typical one of its kind.

    Open answers hardly repeat, so that a majority is of one. Of the labelled answers to the same question (where there
    are none: to questions of the same ``kind``; else of all) it gives the one whose words agree best, on average, with
    the others'. Where answers do repeat that is the majority. At most ``most`` answers of a kind are compared, the
    first in the order given.
    """

    def __init__(self, labels: Iterable[tuple[str, str, str]], most: int = 200):
        """``labels``: question, its kind (anything that names one), answer."""
        self._groups: dict[tuple[str, str], list[str]] = defaultdict(list)
        for question, kind, answer in labels:
            for key in (("question", normalise_question(question)), ("kind", kind), ("all", "")):
                if len(self._groups[key]) < most:
                    self._groups[key].append(answer)
        self._best: dict[tuple[str, str], str] = {}

    def answer(self, question: str, kind: str) -> str | None:
        """None where there is no label at all."""
        for key in (("question", normalise_question(question)), ("kind", kind), ("all", "")):
            if key in self._groups:
                if key not in self._best:
                    self._best[key] = self._typical(self._groups[key])
                return self._best[key]
        return None

    @staticmethod
    def _typical(answers: list[str]) -> str:
        words = [Counter(re.findall(r"\w+", answer.lower())) for answer in answers]

        def agreement(i: int) -> float:
            sizes = (2 * (words[i] & other).total() / max(words[i].total() + other.total(), 1) for other in words)
            return math.fsum(sizes)

        return answers[min(range(len(answers)), key=lambda i: (-agreement(i), answers[i]))]


class BlindOptions:
    """Chooses among options by how often each was the right one in the labels, the picture unseen.

    The rate of an option under this very question, shrunk towards its rate under all questions, shrunk towards
    chance: ('None of the above' alone is 39 % of SPORTU's hard answers.) Ties go to the first option in the order
    of their normalised texts, so that shuffling the letters changes nothing.
    """

    def __init__(self, labels: Iterable[tuple[str, Mapping[str, str], str]], strength: float = 2.0):
        self._strength = strength
        self._offered: Counter[tuple[str, str]] = Counter()
        self._right: Counter[tuple[str, str]] = Counter()
        for question, options, letter in labels:
            for key, option in options.items():
                for scope in (normalise_question(question), ""):
                    self._offered[scope, normalise(option)] += 1
                    self._right[scope, normalise(option)] += key == letter

    def answer(self, question: str, options: Mapping[str, str]) -> str:
        """The letter of the likeliest option."""

        def rate(option: str) -> float:
            value = 1 / len(options)
            for scope in ("", normalise_question(question)):
                key = scope, option
                value = (self._right[key] + self._strength * value) / (self._offered[key] + self._strength)
            return value

        texts = {letter: normalise(option) for letter, option in options.items()}
        return min(texts, key=lambda letter: (-rate(texts[letter]), texts[letter], letter))


# ------------------------------------------------------------------------------------------------ question families

#: The families that results are reported by, in order.
FAMILIES = ("yesno", "count", "choice", "color", "location", "multilabel")


def family(question: str) -> str:
    """The family of a question template, by the wording that Kvasir-VQA's 19 templates (and their like) follow."""
    text = normalise_question(question)
    if "all that are present" in text or "all that apply" in text:
        return "multilabel"
    if text.startswith("how many"):
        return "count"
    if "color" in text:
        return "color"
    if text.startswith("where"):
        return "location"
    if re.match(r"(?:is|are|was|were|has|have|had|do|does|did|can|could|will)\b", text):
        return "yesno"
    return "choice"
