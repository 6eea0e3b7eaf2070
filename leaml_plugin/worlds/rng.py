"""A counter-based random source in 64-bit integer arithmetic: the same numbers on every machine and numpy version.

Covers draws for scenes and noise planes for textures. Does not cover training, which uses torch's generators.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def _mix(z: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014)."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


class Rng:
    """Draws that depend on nothing but ``key`` (integers and strings) and the number of draws before."""

    def __init__(self, *key: int | str):
        state = 0
        for part in key:
            values = part.encode() if isinstance(part, str) else (part & 0xFFFFFFFF, (part >> 32) & 0xFFFFFFFF)
            for value in values:
                state = _mix((state + _GOLDEN + value) & _MASK)
            state = _mix(state ^ 0xA5A5)
        self._state = state

    def next(self) -> int:
        self._state = (self._state + _GOLDEN) & _MASK
        return _mix(self._state)

    def below(self, n: int) -> int:
        """An integer in ``[0, n)``; the bias is below ``n / 2**53``."""
        return ((self.next() >> 11) * n) >> 53

    def between(self, low: int, high: int) -> int:
        """An integer in ``[low, high]``."""
        return low + self.below(high - low + 1)

    def chance(self, percent: int) -> bool:
        return self.below(100) < percent

    def choice(self, items: Sequence[T]) -> T:
        return items[self.below(len(items))]

    def weighted(self, items: Sequence[T], weights: Sequence[int]) -> T:
        draw = self.below(sum(weights))
        for item, weight in zip(items, weights, strict=True):
            if draw < weight:
                return item
            draw -= weight
        raise ValueError("weights must be non-negative and sum to more than 0")

    def shuffled(self, items: Sequence[T]) -> list[T]:
        out = list(items)
        for i in range(len(out) - 1, 0, -1):
            j = self.below(i + 1)
            out[i], out[j] = out[j], out[i]
        return out

    def sample(self, items: Sequence[T], k: int) -> list[T]:
        return self.shuffled(items)[:k]

    def plane(self, height: int, width: int) -> np.ndarray:
        """Independent bytes, ``int32 [height, width]``."""
        with np.errstate(over="ignore"):
            z = np.arange(1, height * width + 1, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(self.next())
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            z = z ^ (z >> np.uint64(31))
        return (z >> np.uint64(56)).astype(np.int32).reshape(height, width)
