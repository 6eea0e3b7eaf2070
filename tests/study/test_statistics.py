"""Intervals and paired tests against scipy, and against what they must not be fooled by."""

from __future__ import annotations

import math

import numpy as np
import pytest

from leaml_plugin.study.statistics import compare, mcnemar, pack_bits, t_interval, unpack_bits


def test_bits_survive_packing():
    marks = np.random.default_rng(0).random(1003) < 0.4
    text = pack_bits(marks)
    assert len(text) < 180
    assert (unpack_bits(text, 1003) == marks).all()


@pytest.mark.parametrize("n", [2, 3, 5, 10, 31])
def test_t_interval_is_scipys(n):
    stats = pytest.importorskip("scipy.stats", reason="scipy comes with scikit-learn, which the tests install")
    values = np.random.default_rng(n).random(n).tolist()
    low, high = stats.t.interval(0.95, n - 1, loc=np.mean(values), scale=stats.sem(values))
    assert t_interval(values) == pytest.approx((low, high), abs=1e-3)


def test_one_seed_has_no_interval():
    assert t_interval([0.5]) is None


def test_mcnemar_is_the_exact_binomial():
    stats = pytest.importorskip("scipy.stats", reason="scipy comes with scikit-learn, which the tests install")
    rng = np.random.default_rng(0)
    a, b = rng.random(200) < 0.6, rng.random(200) < 0.5
    only = int((a & ~b).sum()), int((b & ~a).sum())
    assert mcnemar(a, b) == pytest.approx(stats.binomtest(only[0], sum(only)).pvalue)
    assert mcnemar(a, a) == 1.0
    many = np.ones(2000, bool)
    assert mcnemar(many, ~many) < 1e-100 or math.isclose(mcnemar(many, ~many), 0.0)


def test_comparison_pairs_questions_and_draws_pictures_together():
    rng = np.random.default_rng(1)
    easy = rng.random(300)
    pictures = np.repeat(np.arange(60), 5)
    a = [easy + rng.normal(0, 0.01, 300) > 0.4 for _ in range(4)]
    b = [easy + rng.normal(0, 0.01, 300) > 0.5 for _ in range(4)]
    found = compare(a, b, pictures)
    assert found.mean == pytest.approx(np.mean(a) - np.mean(b))
    assert found.over_pictures[0] < found.mean < found.over_pictures[1]
    assert found.over_seeds is not None and found.over_seeds[0] < found.mean < found.over_seeds[1]
    # all questions of a picture right or wrong together carry less evidence than independent ones
    clumped = [np.repeat(x[::5], 5) for x in a], [np.repeat(x[::5], 5) for x in b]
    wide = compare(*clumped, pictures)
    width = found.over_pictures[1] - found.over_pictures[0]
    assert wide.over_pictures[1] - wide.over_pictures[0] > 1.3 * width
    with pytest.raises(ValueError, match="cannot be paired"):
        compare(a, b[:2], pictures)
