"""Numbers with their uncertainty: intervals over seeds, paired tests by question, correctness packed into text.

Covers what a table of the study needs. Does not cover intervals of a single run, clustered by picture (``metrics``).
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# 97.5 % quantiles of Student's t for 1 to 30 degrees of freedom; beyond, the normal approximation is within 2 %
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def pack_bits(marks: Sequence[bool]) -> str:
    """True and false as base64 text, eight a byte."""
    return base64.b64encode(np.packbits(np.asarray(marks, dtype=bool)).tobytes()).decode()


def unpack_bits(text: str, count: int) -> np.ndarray:
    """The inverse of :func:`pack_bits`: ``bool [count]``."""
    return np.unpackbits(np.frombuffer(base64.b64decode(text), dtype=np.uint8), count=count).astype(bool)


def t_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of the mean over seeds (Student's t), or ``None`` for fewer than two values."""
    n = len(values)
    if n < 2:
        return None
    mean = sum(values) / n
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    half = (_T[n - 2] if n - 2 < len(_T) else 1.96) * deviation / math.sqrt(n)
    return mean - half, mean + half


def mcnemar(a: np.ndarray, b: np.ndarray) -> float:
    """The two-sided exact McNemar test: p-value that two answerers of the same questions are equally good.

    Exact binomial up to 1000 discordant questions, the continuity-corrected normal approximation beyond.
    """
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    n, k = only_a + only_b, min(only_a, only_b)
    if n == 0:
        return 1.0
    if n > 1000:
        z = max(0.0, abs(only_a - only_b) - 1) / math.sqrt(n)
        return math.erfc(z / math.sqrt(2))
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


@dataclass(frozen=True)
class Difference:
    """Accuracy of one method minus another's, on the same seeds and questions.

    ``over_seeds`` is the t-interval over the seeds' differences; ``over_pictures`` the percentile bootstrap over seeds
    and test pictures together; ``p`` is McNemar's, of the first seed's answers, ``seeds`` their number.
    """

    mean: float
    over_seeds: tuple[float, float] | None
    over_pictures: tuple[float, float]
    p: float
    seeds: int


def compare(
    a: Sequence[np.ndarray], b: Sequence[np.ndarray], pictures: Sequence[int], *, resamples: int = 2000, seed: int = 0
) -> Difference:
    """Compare two methods, ``a[i]`` and ``b[i]`` being the marks (``bool [questions]``) of the same seed.

    ``pictures[q]`` is the picture of question ``q``: questions of one picture are drawn together.
    """
    if len(a) != len(b) or not len(a):
        raise ValueError(f"{len(a)} and {len(b)} seeds cannot be paired")
    delta = np.stack([x.astype(float) - y.astype(float) for x, y in zip(a, b)])
    _, owner = np.unique(np.asarray(pictures), return_inverse=True)
    count = int(owner.max()) + 1
    sums = np.zeros((len(delta), count))
    for row, values in enumerate(delta):
        np.add.at(sums[row], owner, values)
    sizes = np.bincount(owner, minlength=count).astype(float)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(count, np.full(count, 1 / count), size=resamples).astype(float)
    seeds = rng.multinomial(len(delta), np.full(len(delta), 1 / len(delta)), size=resamples) / len(delta)
    means = ((drawn @ sums.T) * seeds).sum(1) / (drawn @ sizes)
    low, high = np.quantile(means, [0.025, 0.975])
    by_seed = delta.mean(1)
    return Difference(
        float(by_seed.mean()), t_interval(by_seed.tolist()), (float(low), float(high)), mcnemar(a[0], b[0]), len(delta)
    )
