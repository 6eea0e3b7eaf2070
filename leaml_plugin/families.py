"""Question families learnt from the labels, and which of them each sample of a picture is to write about.

A family is a beginning of questions ("how many", "is there"): any language has them, and a beginning can be forced on
a generator. Covers learning them, telling a question's family, a target mix over them, and dealing a picture's samples
to them. Does not cover forcing (``Turn.prefixes``) or the six fixed kinds of question that reports are grouped by
(``metrics.family``).
"""

from __future__ import annotations

import hashlib
import math
import random
import unicodedata
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from leaml_plugin.errors import LeamlError
from leaml_plugin.metrics import normalise_question

LABELS, UNIFORM, OTHER = "labels", "uniform", ""
WORDS = 4  # of a beginning, at most: enough to tell what is asked, and the object is left to the picture


@dataclass(frozen=True)
class Family:
    """Questions with the same beginning.

    Attributes:
        name: the beginning, normalised; empty for the questions that belong to no other family.
        beginning: as the labels spell it most often.
        share: of the labelled questions.
    """

    name: str
    beginning: str
    share: float


class Families:
    """The families of a set of labelled questions."""

    def __init__(self, families: Sequence[Family]):
        self._families = {family.name: family for family in families}

    @classmethod
    def learn(cls, questions: Iterable[str], most: int = 12, least: float = 0.02) -> Families:
        """Split the questions word by word, the largest family first.

        Args:
            most: families at most.
            least: share of the questions that a family needs; rarer beginnings stay with the shorter one they go on
                from, in the end with :data:`OTHER`.
        """
        rows = [(tuple(normalise_question(q).split()), _words(q)) for q in questions]
        if not rows:
            raise LeamlError("question families are learnt from the labels, and there are none.")
        enough = max(1, math.ceil(least * len(rows)))
        leaves: dict[tuple[str, ...], list[int]] = {(): list(range(len(rows)))}
        final: set[tuple[str, ...]] = set()
        while open_ := [name for name in leaves if name not in final]:
            name = max(open_, key=lambda n: (len(leaves[n]), n))
            depth = len(name)
            groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
            for i in leaves[name]:
                words = rows[i][0]
                # the last word stays free, so that a family is never one question
                longer = depth < min(WORDS, len(words) - 1)
                groups[words[: depth + 1] if longer else name].append(i)
            large = {n: some for n, some in groups.items() if n != name and len(some) >= enough}
            rest = [i for n, some in groups.items() if n not in large for i in some]
            if not large or len(leaves) - 1 + len(large) + bool(rest) > most:
                final.add(name)
                continue
            del leaves[name]
            leaves.update(large)
            if rest:
                leaves[name] = sorted(rest)
                final.add(name)
        out = []
        for name, some in leaves.items():
            spellings = Counter(" ".join(rows[i][1][: len(name)]) for i in some)
            beginning = min(spellings, key=lambda s: (-spellings[s], s))
            out.append(Family(" ".join(name), beginning, len(some) / len(rows)))
        return cls(sorted(out, key=lambda f: (-f.share, f.name)))

    def __iter__(self):
        return iter(self._families.values())

    def __len__(self) -> int:
        return len(self._families)

    def of(self, question: str) -> str:
        """The name of the family with the longest beginning that ``question`` has, :data:`OTHER` if there is none."""
        words = normalise_question(question).split()
        for length in range(len(words), 0, -1):
            name = " ".join(words[:length])
            if name in self._families:
                return name
        return OTHER

    def mix(self, target: str) -> dict[str, float]:
        """Beginning to force -> share of the samples; an empty beginning leaves the generator free.

        Args:
            target: "labels" (the families' shares of the labels), "uniform", or weights: ``how many=2, is there=1``.
                A beginning that is no learnt family is taken as it is written.

        Raises:
            LeamlError: none of the three forms.
        """
        if target == LABELS:
            return {family.beginning: family.share for family in self}
        if target == UNIFORM:
            named = [family for family in self if family.name] or list(self)
            return {family.beginning: 1 / len(named) for family in named}
        weights: dict[str, float] = {}
        for part in target.split(","):
            beginning, equals, weight = part.rpartition("=")
            value = _number(weight)
            if not equals or not beginning.strip() or not 0 < value < math.inf:
                raise LeamlError(
                    f"generate.mix is {target!r}; it must be {LABELS!r}, {UNIFORM!r}, or beginnings of questions with "
                    'positive weights, such as "how many=2, is there=1".'
                )
            known = self._families.get(normalise_question(beginning))
            weights[known.beginning if known else " ".join(beginning.split())] = value
        total = sum(weights.values())
        return {beginning: weight / total for beginning, weight in weights.items()}


@dataclass(frozen=True)
class Mix:
    """Families and the share of the samples that each beginning is to get."""

    families: Families
    target: Mapping[str, float]

    def to_json(self) -> dict[str, list[dict[str, Any]]]:
        """What a report needs: each family's share of the labels, and of the samples asked for."""
        learnt = [
            {"name": f.name, "labels": f.share, "target": self.target.get(f.beginning, 0.0)} for f in self.families
        ]
        given = self.target.keys() - {f.beginning for f in self.families}
        own = [{"name": normalise_question(b), "labels": 0.0, "target": self.target[b]} for b in sorted(given)]
        return {"families": learnt + own}


def deal(mix: Mapping[str, float], picture_id: str, samples: int, seed: int) -> tuple[str, ...]:
    """Which beginning each sample of a picture has: a function of its arguments, whatever other pictures there are.

    Samples are spread over the mix as evenly as whole samples allow (systematic sampling from a random start, the
    families in an order of the picture's own), so that a few pictures come close to the mix already.
    """
    digest = hashlib.blake2b(f"{seed}\0family\0{picture_id}".encode(), digest_size=8).digest()
    rng = random.Random(int.from_bytes(digest, "little"))
    names = sorted(mix)
    rng.shuffle(names)
    bounds = list(accumulate(mix[name] for name in names))
    start = rng.random()
    points = [(start + i) / samples * bounds[-1] for i in range(samples)]
    dealt = [names[min(bisect_right(bounds, point), len(names) - 1)] for point in points]
    rng.shuffle(dealt)  # the first sample is no more likely to be of one family than the last
    return tuple(dealt)


def _words(question: str) -> list[str]:
    """The question's words as they are spelt, one for each of the normalised."""
    return unicodedata.normalize("NFKC", question).split()


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
