"""Deterministic splits by picture (or by scene), never by row.

Covers: which pictures are tested, which may be trained on, and which of those carry labels under a label budget.
The same functions serve the lmms-eval tasks and ``leaml data``, so that the test pictures of the one can never be
training pictures of the other. Membership depends on a hash of the group's name alone: it is the same on every
machine, for every order of the rows, and for every subset of the data.
Does not cover: reading data sets, or choosing the pictures that are worth labelling.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from leaml_plugin.errors import LeamlError

#: The share of the groups that is tested. A part of the task's definition: changing it changes the benchmark.
TEST_FRACTION = 0.2
#: The label budget of the paper (arXiv 2510.03232): one per cent of the pictures.
LABEL_FRACTION = 0.01

_SCENE = re.compile(r"(.+?_\d+)_\d+")


def bucket(group: str, salt: str = "test") -> float:
    """A number in [0, 1) that depends on ``group`` and ``salt`` alone, uniform over groups."""
    digest = hashlib.sha256(f"leaml/{salt}/{group}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def is_test(group: str, fraction: float = TEST_FRACTION) -> bool:
    """Whether the pictures of ``group`` are test pictures."""
    return bucket(group) < fraction


def scene(clip: str) -> str:
    """The scene that a SPORTU clip belongs to: ``soccer_260_2`` and ``soccer_260_0`` are views of ``soccer_260``."""
    name = clip.strip().lower()
    match = _SCENE.fullmatch(name)
    return match.group(1) if match else name


@dataclass(frozen=True)
class Split:
    """Group names by role. ``labelled`` is a part of ``pool``; ``pool`` and ``test`` share nothing."""

    test: frozenset[str]
    pool: frozenset[str]
    labelled: frozenset[str]

    @property
    def unlabelled(self) -> frozenset[str]:
        return self.pool - self.labelled


def make_split(
    groups: Iterable[str], label_fraction: float = LABEL_FRACTION, test_fraction: float = TEST_FRACTION
) -> Split:
    """Split group names (repeats allowed) into test, training pool and the labelled part of the pool.

    ``label_fraction`` is the share of the pool's groups that carry labels, rounded, but at least one. Budgets are
    nested: what is labelled at 1 % is labelled at 5 % too. Raises :class:`LeamlError` for a fraction outside (0, 1]
    and for data of which nothing is left to train on.
    """
    if not 0 < label_fraction <= 1:
        raise LeamlError(f"the label fraction must lie in (0, 1], got {label_fraction}; 0.01 labels one per cent.")
    if not 0 < test_fraction < 1:
        raise LeamlError(f"the test fraction must lie in (0, 1), got {test_fraction}.")
    names = set(groups)
    test = frozenset(name for name in names if is_test(name, test_fraction))
    pool = sorted(names - test, key=lambda name: (bucket(name, "label"), name))
    if not pool:
        raise LeamlError(f"none of the {len(names)} pictures is left to train on: the data set is too small to split.")
    budget = max(1, round(label_fraction * len(pool)))
    return Split(test, frozenset(pool), frozenset(pool[:budget]))
