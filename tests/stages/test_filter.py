"""Each filter drops what it should, keeps the rest, and every dropped pair carries one reason."""

import dataclasses
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leaml_plugin import tables
from leaml_plugin.artifacts import StageDirectory, read_records, write_records
from leaml_plugin.errors import LeamlError
from leaml_plugin.records import QA, ImageRef, PseudoQA
from leaml_plugin.stages import filter
from leaml_plugin.stages.filter import FilterConfig

LABELS = [QA("1", (), "What colour is the polyp?", "pink"), QA("2", (), "Is there text?", "no")]


def pair(question, answer, picture="p1", sample=0, logprob=-0.5):
    return PseudoQA(picture, (ImageRef("/p.png"),), sample, f"{question}|{answer}", question, answer, logprob)


def judge(pairs, labels=LABELS, **options):
    return filter.apply(FilterConfig(**{"round_trip": False, **options}), pairs, labels)


def reasons(pairs, **options):
    kept, dropped = judge(pairs, **options)
    assert all(not p.reason for p in kept)
    assert all(p.reason for p in dropped)
    assert len(kept) + len(dropped) == len(pairs)
    return [p.question for p in kept], [p.reason for p in dropped]


def test_malformed_and_empty_answers():
    assert reasons([pair("", ""), pair("Is there text?", " ."), pair("Is there text?", "no")]) == (
        ["Is there text?"],
        ["malformed", "malformed"],
    )


def test_too_long_against_the_longest_label():
    assert reasons([pair("What " * 40, "no"), pair("Is it?", "pink " * 10)])[1] == ["too_long"] * 2
    assert reasons([pair("What " * 40, "no")], length_slack=100.0)[1] == []


@pytest.mark.parametrize("answer", ["unknown", "not sure", "no answer"])
def test_unanswerable(answer):
    assert reasons([pair("Is there text?", answer)], length_slack=10.0)[1] == ["unanswerable"]
    assert reasons([pair("Is there text?", "cannot be determined")], length_slack=10.0)[1] == ["unanswerable"]
    assert reasons([pair("Is there text?", "not relevant")], length_slack=10.0)[1] == []


def test_what_the_labels_answer_is_an_answer():
    labels = [*LABELS, QA("3", (), "Is the cecum there?", "not visible")]
    kept, dropped = judge([pair("Is the cecum there?", "not visible")], labels)
    assert (len(kept), dropped) == (1, [])


def test_unlikely_and_unknown_question():
    pairs = [pair("Is there text?", "no", logprob=-3.0), pair("Is it red?", "no")]
    assert reasons(pairs, min_logprob=-1.0)[1] == ["unlikely"]
    assert reasons(pairs, known_questions=True)[1] == ["unknown_question"]


def test_disagreement_keeps_the_majority_and_ties_go_by_name():
    answers = ["no", "no", "yes"]
    pairs = [pair("Is there text?", a, sample=i) for i, a in enumerate(answers)]
    kept, dropped = judge(pairs)
    assert [p.answer for p in kept] == ["no"]
    assert sorted(p.reason for p in dropped) == ["duplicate", "inconsistent"]
    # a majority below the agreement asked for drops every answer to the question
    assert reasons(pairs, agreement=0.9)[1] == ["inconsistent"] * 3
    # other pictures do not vote
    assert reasons([pair("Is there text?", "no", "a"), pair("Is there text?", "yes", "b")])[1] == []


def test_duplicates_are_told_by_normalised_text():
    pairs = [pair("Is there text?", "no"), pair("is there  TEXT?", "No.", sample=1), pair("Is there text?", "no", "b")]
    kept, dropped = judge(pairs)
    assert [p.id for p in kept] == ["p1#0", "b#0"]
    assert [(p.id, p.reason) for p in dropped] == [("p1#1", "duplicate")]


def test_second_answers():
    agree = dataclasses.replace(pair("Is there text?", "no"), checks={"round_trip": " No.", "blind": "yes"})
    differ = dataclasses.replace(pair("Is it red?", "no"), checks={"round_trip": "yes", "blind": "no"})
    assert reasons([agree, differ], round_trip=True) == (["Is there text?"], ["round_trip"])
    assert reasons([agree, differ], blind=True) == (["Is there text?"], ["blind"])
    assert reasons([agree, differ])[1] == []
    with pytest.raises(LeamlError, match=r"set verify\.blind=true"):
        reasons([pair("Is there text?", "no")], blind=True)


def test_an_answer_that_the_caption_contradicts():
    """The caption alone gives another answer, and one that nothing alone does not give."""
    said = {"agrees": ("no", "yes"), "contradicts": ("yes", "no"), "silent": ("yes", "Yes."), "neither": ("2", "3")}
    pairs = [
        dataclasses.replace(pair("Is there text?", "no", name), checks={"caption": told, "blind": nothing})
        for name, (told, nothing) in said.items()
    ]
    without = dataclasses.replace(pair("Is there text?", "no", "no caption"), checks={"blind": "yes"})
    kept, dropped = judge([*pairs, without], caption=True)
    assert [p.picture_id for p in kept] == ["agrees", "silent", "no caption"]
    assert [p.reason for p in dropped] == ["contradicts_caption"] * 2
    assert judge(pairs)[1] == []
    with pytest.raises(LeamlError, match=r"set verify\.caption=true"):
        reasons([pair("Is there text?", "no")], caption=True)


def test_every_filter_can_be_turned_off():
    pairs = [pair("Is there text?", a, sample=i) for i, a in enumerate(["no", "no", "yes", "unknown"])]
    off = {"length_slack": 99.0, "unanswerable": False, "agreement": 0.0, "duplicate": False, "near_duplicate": 2.0}
    assert reasons(pairs, **off)[1] == []
    assert reasons(pairs, **off | {"unanswerable": True})[1] == ["unanswerable"]
    assert reasons(pairs, **off | {"duplicate": True})[1] == ["duplicate"]
    assert reasons(pairs, **off | {"agreement": 0.1})[1] == ["inconsistent"] * 2
    # what is a duplicate is no near duplicate of itself
    assert reasons(pairs, **off | {"near_duplicate": 0.9})[1] == []


def test_a_pair_that_comes_with_a_reason_keeps_it_and_votes_for_nothing():
    pairs = [pair("Is there text?", "no", sample=i) for i in range(3)]
    pairs[:2] = [dataclasses.replace(p, answer="yes", reason="unreadable") for p in pairs[:2]]
    kept, dropped = judge(pairs)
    assert [p.answer for p in kept] == ["no"] and [p.reason for p in dropped] == ["unreadable"] * 2
    with pytest.raises(LeamlError, match="unknown reason 'odd'"):
        judge([dataclasses.replace(pairs[0], reason="odd")])


def test_near_duplicates_have_nearly_the_same_words_and_the_same_answer():
    base, close = "What colour is the polyp in the picture?", "What colour is the polyp in this picture?"
    assert reasons([pair(base, "pink"), pair(close, "pink")], near_duplicate=0.7)[1] == ["near_duplicate"]
    assert reasons([pair(base, "pink"), pair(close, "red")], near_duplicate=0.7)[1] == []
    assert reasons([pair(base, "pink"), pair(close, "pink", "b")], near_duplicate=0.7)[1] == []
    assert reasons([pair(base, "pink"), pair(close, "pink")], near_duplicate=2.0)[1] == []


def test_an_answer_beyond_its_share_leaves_least_likely_first():
    pairs = [pair("Is there text?", "no", str(i), logprob=-i) for i in range(8)]
    pairs += [pair("Is there text?", "yes", f"y{i}") for i in range(2)]
    kept, dropped = judge(pairs, [QA("1", (), "Is there text?", "yes")], answer_share=0.5)
    assert [p.picture_id for p in kept] == ["0", "1", "y0", "y1"]
    assert {p.reason for p in dropped} == {"overrepresented"}
    # the share that the labels show is always allowed: here "no" is every label
    assert reasons(pairs, answer_share=0.5)[1] == []


def test_answers_are_balanced_over_a_question_or_over_its_family():
    labels = [QA("1", (), "Is there text?", "no"), QA("2", (), "Is there blood?", "yes")]
    pairs = [pair(f"Is there thing {i}?", "no", str(i), logprob=-i) for i in range(6)]
    pairs += [pair("Is there pus?", "yes", "y"), pair("How many?", "2", "z")]
    assert judge(pairs, labels, answer_share=0.5)[1] == []  # every question is asked once
    kept, dropped = judge(pairs, labels, answer_share=0.5, balance="family")
    assert [p.picture_id for p in kept] == ["0", "y", "z"] and {p.reason for p in dropped} == {"overrepresented"}
    with pytest.raises(LeamlError, match="did you mean 'family'"):
        FilterConfig(balance="famly")


def test_the_likeliest_share_of_what_is_left():
    pairs = [pair("Is there text?", "no", str(i), logprob=-i) for i in range(5)] + [pair("", "")]
    kept, dropped = judge(pairs, keep_share=0.4)
    assert [p.picture_id for p in kept] == ["0", "1"]
    assert [p.reason for p in dropped] == ["unlikely"] * 3 + ["malformed"]


def test_run_writes_kept_dropped_and_counts_and_reads_them_again(tmp_path):
    source = tmp_path / "part-000000.jsonl"
    write_records(source, [pair("Is there text?", "no"), pair("", ""), pair("Is there text?", "no", sample=1)])
    stage = StageDirectory(tmp_path / "filter", "key")
    path, counts = filter.run(FilterConfig(round_trip=False), stage, shards=[source], labels=LABELS)
    assert counts["kept"] == 1
    assert {k: v for k, v in counts.items() if v} == {"kept": 1, "malformed": 1, "duplicate": 1}
    assert [p.as_qa().answer for p in read_records(path, PseudoQA)] == ["no"]
    assert {json.loads(line)["reason"] for line in stage.file(filter.DROPPED).open()} == {"malformed", "duplicate"}
    source.unlink()  # a finished stage reads nothing but its own files
    assert filter.run(FilterConfig(round_trip=False), stage, shards=[source], labels=LABELS) == (path, counts)


def test_bad_settings():
    with pytest.raises(LeamlError, match="agreement is 2"):
        FilterConfig(agreement=2)
    with pytest.raises(LeamlError, match="length_slack"):
        FilterConfig(length_slack=0)


@given(
    rows=st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("xyz"), st.integers(0, 5)), max_size=30),
    labels=st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("xy")), max_size=4),
    share=st.sampled_from([0.2, 0.5, 0.9]),
)
@settings(max_examples=200, deadline=None)
def test_shares_of_answers_against_counting_by_hand(rows, labels, share):
    pairs = [pair(q, a, str(i), logprob=-score) for i, (q, a, score) in enumerate(rows)]
    known = [QA(str(i), (), q, a) for i, (q, a) in enumerate(labels)]
    kept, _ = judge(pairs, known or LABELS, answer_share=share, length_slack=99.0)
    want = []
    for question in {q for q, _, _ in rows}:
        here = [p for p in pairs if p.question == question]
        answers = {p.answer for p in here}
        for answer in answers:
            own = sorted((p for p in here if p.answer == answer), key=lambda p: (-p.logprob, pairs.index(p)))
            asked = [a for q, a in labels if q == question]
            allowed = max(share, asked.count(answer) / len(asked) if asked else 0.0)
            others = len(here) - len(own)
            most = len(own) if len(answers) == 1 or allowed >= 1 else max(1, int(allowed / (1 - allowed) * others))
            want += own[:most]
    assert [p.id for p in kept] == [p.id for p in pairs if p in want]


@given(
    data=st.data(),
    kinds=st.sampled_from([(1, 1), (1, 60), (60, 2), (4, 4)]),
    run=st.sampled_from([3, 11]),
    balance=st.sampled_from(filter.BALANCES),
)
@settings(max_examples=100, deadline=None)
def test_comparing_in_parts_on_disk_is_comparing_at_once(data, kinds, run, balance):
    """One question or many, one answer or many, ties and what is no number: the parts decide nothing."""
    scores = st.sampled_from([0.0, -0.5, -1.0, -1.25, -7.0, -math.inf, math.nan])
    rows = data.draw(st.lists(st.tuples(*(st.integers(0, n - 1) for n in kinds), scores), max_size=80))
    pairs = [pair(f"what is thing {q} of it?", f"a{a}", str(i // 2), i % 2, s) for i, (q, a, s) in enumerate(rows)]
    labels = [QA("1", (), "what is thing 0 of it?", "a0"), QA("2", (), "what is thing 1 of it?" * 9, "a1" * 9)]
    config = FilterConfig(round_trip=False, agreement=0.0, answer_share=0.4, keep_share=0.7, balance=balance)
    whole = filter.judge(config, pairs, labels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "RUN", run)
        patch.setattr(filter, "_ROWS", run - 1)
        assert filter.judge(config, pairs, labels).tolist() == whole.tolist()
