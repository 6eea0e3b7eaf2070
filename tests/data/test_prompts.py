"""Prompts: files, versions, placeholders, and reading generated pairs back."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leaml_plugin.data.prompts import Prompts
from leaml_plugin.errors import LeamlError
from leaml_plugin.records import QA, ImageRef, Picture

IMAGES = (ImageRef("/pictures/a.png"),)
words = st.lists(st.from_regex(r"[A-Za-z0-9<>;%{}äß°]+", fullmatch=True), min_size=1, max_size=6).map(" ".join)


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    return Prompts.load()


def qa(question: str = "Is there a polyp?", answer: str = "Yes") -> QA:
    return QA("q1", IMAGES, question, answer, source="train.jsonl line 1")


def test_turns_carry_what_the_record_says(prompts):
    turn = prompts.vqa(qa())
    assert turn.prompt.startswith("Is there a polyp?\n") and turn.target == "Yes"
    assert turn.images == IMAGES and turn.where == "train.jsonl line 1"
    assert prompts.generate(Picture("p", IMAGES)).target is None
    assert prompts.caption(Picture("p", IMAGES)).target is None
    assert prompts.caption(Picture("p", IMAGES, "a red tube")).target == "a red tube"


def test_generation_is_asked_with_the_prompt_it_was_trained_with(prompts):
    assert prompts.generate(Picture("p", IMAGES)).prompt == prompts.generate_target(qa()).prompt


def test_a_placeholder_in_a_question_is_text(prompts):
    assert prompts.generate_target(qa("What is {answer}?", "{question}")).target == (
        "Question: What is {answer}?\nAnswer: {question}"
    )


@given(question=words, answer=words)
@settings(max_examples=200, deadline=None)
def test_what_is_written_reads_back(question, answer):
    prompts = Prompts.load()
    assert prompts.parse_generated(prompts.generate_target(qa(question, answer)).target) == (question, answer)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("Question: How many?\nAnswer: 3", ("How many?", "3")),
        ("question:How many?answer:3", ("How many?", "3")),
        ("Sure!\n\nQuestion: How\nmany?\n\nAnswer: 3\n\nI hope this helps.", ("How many?", "3")),
        ("Question: A?\nAnswer: b\nQuestion: C?\nAnswer: d", ("A?", "b")),
        ("Question: A?\nAnswer:", None),
        ("Question:\nAnswer: b", None),
        ("A polyp.", None),
        ("", None),
    ],
)
def test_parse_generated(prompts, text, want):
    assert prompts.parse_generated(text) == want


def test_a_user_directory_replaces_single_texts_and_changes_the_version(tmp_path, prompts):
    (tmp_path / "vqa.txt").write_bytes("\ufeffFrage: {question}\r\nKurz!\n".encode())
    own = Prompts.load(tmp_path)
    assert own.vqa(qa("Wo?")).prompt == "Frage: Wo?\nKurz!"
    assert own.caption_text == prompts.caption_text
    assert own.version != prompts.version and own.version.startswith(tmp_path.name)
    assert Prompts.from_json(own.to_json()) == own


def test_another_pair_form_reads_back(tmp_path):
    (tmp_path / "pair.txt").write_text("Q {question} || A {answer} <end>")
    own = Prompts.load(tmp_path)
    assert own.parse_generated("Q where? || A left <end> more") == ("where?", "left")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("vqa.txt", "Answer this.", "vqa.txt must contain {question}, but has none"),
        ("vqa.txt", "{question} {colour}", "has {colour} and {question}"),
        ("pair.txt", "{answer} {question}", "{question} before {answer}"),
        ("vqas.txt", "{question}", "did you mean 'vqa'?"),
        ("caption.txt", "\n", "caption.txt is empty"),
    ],
)
def test_a_bad_prompt_file_is_one_sentence(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(LeamlError) as error:
        Prompts.load(tmp_path)
    assert words in str(error.value)


def test_a_missing_or_empty_prompt_directory_is_one_sentence(tmp_path):
    with pytest.raises(LeamlError, match="no such prompt directory"):
        Prompts.load(tmp_path / "none")
    with pytest.raises(LeamlError, match="no prompt file"):
        Prompts.load(tmp_path)


def test_a_question_about_the_caption_shows_no_picture(prompts):
    turn = prompts.vqa_of_caption(qa(), "A red\ntube.")
    assert (turn.images, turn.target) == ((), None)
    assert "A red tube." in turn.prompt and turn.prompt.endswith(prompts.vqa(qa()).prompt)


def test_a_beginning_is_the_beginning_of_what_is_trained_on(prompts):
    beginning = prompts.begin_generated("Is there")
    assert prompts.generate_target(qa("Is there a polyp?")).target.startswith(beginning)
    assert prompts.parse_generated(beginning + " blood?\nAnswer: no") == ("Is there blood?", "no")
    assert prompts.begin_generated(" ") == ""
    turn = dataclasses.replace(prompts.generate(Picture("p", IMAGES)), prefixes=("a", "b"))
    assert [turn.prefix(i) for i in range(3)] == ["a", "b", "a"]
    assert prompts.generate(Picture("p", IMAGES)).prefix(0) == ""
