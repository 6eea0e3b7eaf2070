"""Splits go by picture, depend on names alone, nest with the label budget, and refuse what cannot be split."""

from __future__ import annotations

import random

import pytest

from leaml_plugin import splits
from leaml_plugin.errors import LeamlError

NAMES = [f"picture-{i}" for i in range(2000)]


def test_parts_are_disjoint_and_cover_everything():
    split = splits.make_split(NAMES, label_fraction=0.05)
    assert split.test | split.pool == set(NAMES)
    assert not split.test & split.pool
    assert split.labelled <= split.pool
    assert split.labelled | split.unlabelled == split.pool


def test_order_repetition_and_subset_change_nothing():
    shuffled = NAMES * 3
    random.Random(1).shuffle(shuffled)
    assert splits.make_split(shuffled) == splits.make_split(NAMES)
    part = splits.make_split(NAMES[:500])
    assert part.test == splits.make_split(NAMES).test & set(NAMES[:500])


def test_membership_is_pinned():
    """The benchmark's definition: these values may never change, on no machine."""
    assert splits.bucket("cl8k2u1pm1dw7083203g1b7yv") == 0.5199583972319886
    assert [name for name in NAMES[:20] if splits.is_test(name)] == ["picture-5", "picture-13", "picture-18"]


def test_sizes_are_near_the_fractions():
    split = splits.make_split(NAMES, label_fraction=0.01)
    assert 0.17 < len(split.test) / len(NAMES) < 0.23  # four standard deviations
    assert len(split.labelled) == round(0.01 * len(split.pool))


def test_budgets_nest():
    small, large = (splits.make_split(NAMES, label_fraction=f).labelled for f in (0.01, 0.1))
    assert small < large


def test_at_least_one_label():
    assert len(splits.make_split(NAMES[:5], label_fraction=1e-6).labelled) == 1


@pytest.mark.parametrize("fraction", [0, -0.1, 1.1, float("nan")])
def test_impossible_fractions_are_refused(fraction):
    with pytest.raises(LeamlError, match="label fraction"):
        splits.make_split(NAMES, label_fraction=fraction)


def test_nothing_to_train_on_is_refused():
    only_test = [name for name in NAMES if splits.is_test(name)][:3]
    with pytest.raises(LeamlError, match="too small"):
        splits.make_split(only_test)


@pytest.mark.parametrize(
    ("clip", "scene"),
    [
        ("soccer_260_2", "soccer_260"),
        ("soccer_260", "soccer_260"),
        ("Basketball_85_1", "basketball_85"),
        ("american_football_222_0", "american_football_222"),
        ("american_football_49", "american_football_49"),
        ("ice", "ice"),
    ],
)
def test_views_of_one_scene_stay_together(clip, scene):
    assert splits.scene(clip) == scene
