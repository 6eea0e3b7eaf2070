"""Splits, labels and the image-blind baselines of a study's world."""

from __future__ import annotations

import pytest

from leaml_plugin.errors import LeamlError
from leaml_plugin.records import PseudoQA
from leaml_plugin.study.world import split_options


@pytest.mark.parametrize("name", ["endoscopy", "sports"])
def test_test_pictures_are_never_trained_on(study, name):
    world = study.world(name)
    everything = world.labels(1.0, 0)
    tested = {ref.uri for qa in world.test for ref in qa.images}
    assert not tested & {ref.uri for qa in everything.qas for ref in qa.images}
    assert not everything.unlabelled
    some = world.labels(0.25, 0)
    labelled = {ref.uri for qa in some.qas for ref in qa.images}
    assert not labelled & {ref.uri for p in some.unlabelled for ref in p.images}
    assert some.pictures == 3 and some.pictures + len(some.unlabelled) == 12
    assert all(p.caption for p in some.unlabelled)


def test_budgets_are_nested_and_seeds_differ(study):
    world = study.world("endoscopy")
    few, more = ({qa.id for qa in world.labels(share, 3).qas} for share in (0.25, 0.5))
    assert few < more
    assert few != {qa.id for qa in world.labels(0.25, 4).qas}
    with pytest.raises(LeamlError, match="label budget is 0"):
        world.labels(0, 0)


@pytest.mark.parametrize("name", ["endoscopy", "sports"])
def test_the_oracle_is_at_least_as_good_as_any_blind_answer(study, name):
    world = study.world(name)
    marks = world.blind(world.labels(1.0, 0).qas)
    assert len(marks) == len(world.test)
    assert 0 < world.oracle_blind < 1
    assert sum(world.blind(world.test)) / len(marks) <= world.oracle_blind + 1e-9


def test_pseudo_answers_are_held_against_the_truth(study):
    world = study.world("endoscopy")
    qas = world.labels(1.0, 0).qas[:4]

    def pair(qa, answer):
        return PseudoQA(qa.id.split("#")[0], qa.images, 0, "", qa.question, answer)

    right, wrong = [pair(qa, qa.answer) for qa in qas], [pair(qa, "a cat") for qa in qas]
    assert world.pseudo_accuracy(right)["accuracy"] == 1.0
    assert world.pseudo_accuracy([*right, *wrong])["accuracy"] == 0.5
    unknown = PseudoQA(right[0].picture_id, (), 0, "", "Is it raining?", "no")
    assert world.pseudo_accuracy([unknown])["checked"] == 0
    assert world.pseudo_accuracy([])["accuracy"] is None


def test_pseudo_choices_are_held_against_the_true_text(study):
    world = study.world("sports")
    qa = next(
        q for q in world.labels(1.0, 0).qas if len(q.meta["options"]) == 4 and "None" not in str(q.meta["options"])
    )
    truth = qa.answer
    assert truth == qa.meta["options"][qa.meta["letter"]]
    name, bare = qa.id.split("#")[0], qa.meta["question"]

    def hit(options, answer):
        return world.pseudo_accuracy([PseudoQA(name, (), 0, "", f"{bare} {options}", answer)])["accuracy"]

    assert hit(f"A. cricket B. {truth}", truth) == 1.0
    assert hit(f"A. cricket B. {truth}", "cricket") == 0.0
    assert hit("A. cricket B. None of the above", "None of the above") == 1.0
    assert hit(f"A. {truth} B. None of the above", "None of the above") == 0.0
    assert hit(f"A. {truth} B. None of the above", "Z") == 0.0


def test_diagnosis_puts_the_truth_in_place(study):
    world = study.world("endoscopy")
    qa = world.labels(1.0, 0).qas[0]
    name = qa.id.split("#")[0]
    right, wrong = (PseudoQA(name, qa.images, n, "", qa.question, text) for n, text in enumerate((qa.answer, "a cat")))
    unknown = PseudoQA(name, qa.images, 2, "", "Is it raining?", "no")
    pairs = [right, wrong, unknown]
    assert [(q.question, q.answer) for q in world.told("filter", pairs, [])] == [(qa.question, qa.answer)]
    assert [q.answer for q in world.told("answers", pairs, [])] == [qa.answer] * 2
    picture = next(p for p in world.labels(0.25, 0).unlabelled if p.id != name)
    told = world.told("questions", pairs, [picture])
    assert told and all(q.images == picture.images for q in told)


def test_diagnosis_answers_with_an_option_that_is_offered(study):
    world = study.world("sports")
    qa = next(q for q in world.labels(1.0, 0).qas if q.answer != "None of the above")
    name, bare = qa.id.split("#")[0], qa.meta["question"]

    def answers(options):
        pair = PseudoQA(name, qa.images, 0, "", f"{bare} {options}", "Z")
        return [q.answer for q in world.told("answers", [pair], [])]

    assert answers(f"A. Z B. {qa.answer}") == [qa.answer]
    assert answers("A. Z B. None of the above") == ["None of the above"]
    assert answers("A. Z B. Y") == []


def test_options_are_read_back_from_the_line():
    assert split_options("What? A. one B. two C. three") == ("What?", {"A": "one", "B": "two", "C": "three"})
    assert split_options("What is it?") == ("What is it?", {})
