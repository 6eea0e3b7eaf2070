"""Question families: learnt from the labels, dealt to the samples by a seed, whatever the order of the pictures."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leaml_plugin.errors import LeamlError
from leaml_plugin.families import OTHER, WORDS, Families, deal
from leaml_plugin.metrics import normalise_question

ASKED = [
    *["How many polyps are there?", "How many  instruments are there?"] * 3,
    *["Is there text?", "is there a polyp?", "Is this easy to detect?", "Is this finding new?"] * 2,
    "Where?",
]


def test_families_are_the_beginnings_that_labels_share():
    families = {f.name: f for f in Families.learn(ASKED, least=0.1)}
    assert set(families) == {
        "how many polyps are", "how many instruments are", "is there", "is there a", "is this easy to",
        "is this finding", "",
    }  # fmt: skip
    assert families["is there"].beginning == "Is there" and families["is there"].share == pytest.approx(2 / 15)
    assert families[""].share == pytest.approx(1 / 15)  # "Where?" alone is not 10 %
    assert {f.name for f in Families.learn(ASKED, most=3, least=0.1)} == {"how many", "is", ""}


@given(
    st.lists(st.text("abc ?", min_size=1, max_size=12).filter(str.strip), min_size=1, max_size=40), st.integers(1, 9)
)
@settings(max_examples=200, deadline=None)
def test_every_label_has_a_family_and_shares_are_of_all(questions, most):
    families = Families.learn(questions, most=most, least=0.1)
    assert 1 <= len(families) <= most
    assert sum(f.share for f in families) == pytest.approx(1)
    for family in families:
        assert len(family.name.split()) <= WORDS and normalise_question(family.beginning) == family.name
        assert family.share > 0
    own = {families.of(q) for q in questions}
    assert own <= {f.name for f in families} | {OTHER}


def test_a_question_belongs_to_the_longest_beginning():
    families = Families.learn(ASKED, least=0.1)
    assert families.of("IS THERE  blood?") == "is there" and families.of("Is there a fold?") == "is there a"
    assert families.of("Is it?") == families.of("Isthere?") == OTHER


def test_the_mix_is_the_labels_uniform_or_given():
    families = Families.learn(ASKED, most=3, least=0.1)
    assert families.mix("labels") == pytest.approx({"How many": 6 / 15, "Is": 8 / 15, "": 1 / 15})
    assert families.mix("uniform") == {"How many": 0.5, "Is": 0.5}
    # a learnt family by any spelling, another beginning as it is written
    assert families.mix("IS=3, Which  organ=1") == {"Is": 0.75, "Which organ": 0.25}
    for bad in ("label", "is", "is=0", "is=-1", "is=x", "=1", "is=inf", ""):
        with pytest.raises(LeamlError, match=r"generate\.mix"):
            families.mix(bad)
    with pytest.raises(LeamlError, match="there are none"):
        Families.learn([])


def test_samples_follow_the_mix_whatever_the_order():
    mix = {"a": 0.5, "b": 0.3, "c": 0.2}
    dealt = {str(i): deal(mix, str(i), 4, seed=1) for i in range(2000)}
    counts = Counter(name for names in dealt.values() for name in names)
    assert {name: n / 8000 for name, n in counts.items()} == pytest.approx(mix, abs=0.02)
    # as even as whole samples allow: 4 samples hold the half two times
    assert all(names.count("a") == 2 for names in dealt.values())
    assert all(names.count("b") in (1, 2) and names.count("c") in (0, 1) for names in dealt.values())
    assert all(deal(dict(reversed(mix.items())), name, 4, seed=1) == names for name, names in dealt.items())
    assert any(deal(mix, name, 4, seed=2) != names for name, names in dealt.items())
    assert deal({"": 1.0}, "p", 3, seed=0) == ("", "", "")
