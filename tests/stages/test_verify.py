"""Verification asks each question once for each check, in the right words, and writes down who answered what."""

from __future__ import annotations

import pytest

from leaml_plugin import inference
from leaml_plugin.artifacts import StageDirectory, read_records, write_records
from leaml_plugin.data import Prompts
from leaml_plugin.errors import LeamlError
from leaml_plugin.inference import Generated
from leaml_plugin.records import ImageRef, PseudoQA
from leaml_plugin.stages import verify
from leaml_plugin.stages.verify import VerifyConfig


def pair(question, picture="p1", sample=0):
    return PseudoQA(picture, (ImageRef(f"/{picture}.png"),), sample, question, question, "no")


PAIRS = [pair("Is it red?"), pair("is it  RED?", sample=1), pair("", sample=2), pair("Is it red?", "p2")]


@pytest.fixture
def asked(monkeypatch):
    """The turns that the model is asked; it answers what it is shown."""
    turns = []

    def answer(loaded, some, **options):
        for turn in some:
            turns.append(turn)
            assert turn.target is None
            said = "caption" if "A red tube." in turn.prompt else "picture" if turn.images else "nothing"
            yield Generated(turn.id, 0, said)

    monkeypatch.setattr(inference, "generate", answer)
    return turns


def check(captions=None, **checks):
    return verify.check(VerifyConfig(**{"round_trip": False, **checks}), None, None, Prompts.load(), PAIRS, captions)


def test_a_question_of_several_samples_is_asked_once(asked):
    out = check(round_trip=True)
    assert len(asked) == 2 and all(turn.images for turn in asked)
    assert [pair.checks for pair in out] == [{"round_trip": "picture"}] * 2 + [{}, {"round_trip": "picture"}]
    assert [(p.question, p.sample) for p in out] == [(p.question, p.sample) for p in PAIRS]


def test_the_caption_stands_in_for_the_picture(asked):
    out = check({"p1": "A red tube.", "p3": "Other."}, caption=True)
    assert not any(turn.images for turn in asked)
    both = {"blind": "nothing", "caption": "caption"}
    assert [pair.checks for pair in out] == [both, both, {}, {"blind": "nothing"}]
    told = next(turn for turn in asked if "A red tube." in turn.prompt)
    assert "Is it red?" in told.prompt.split("A red tube.")[1]


def test_a_guess_from_the_caption_is_not_written_down(monkeypatch):
    asked = []

    def answer(loaded, turns, *, return_logprobs, **options):
        asked.append(return_logprobs)
        yield from (Generated(turn.id, 0, "x", logprob=-0.6 if "p1" in turn.id else -0.8) for turn in turns)

    monkeypatch.setattr(inference, "generate", answer)
    told = {"p1": "A red tube.", "p2": "A blue tube."}
    out = check(told, caption=True)  # half is exp(-0.69)
    assert [set(pair.checks) for pair in out] == [{"blind", "caption"}, {"blind", "caption"}, set(), {"blind"}]
    assert asked == [False, True]
    assert [len(pair.checks) for pair in check(told, caption=True, caption_confidence=0.0)] == [2, 2, 0, 2]
    with pytest.raises(LeamlError, match="caption_confidence is 1"):
        VerifyConfig(caption_confidence=1.0)


def test_run_gives_each_shard_its_captions(asked, tmp_path):
    shards = []
    for number, pairs in enumerate(([PAIRS[0]], [PAIRS[3]])):
        shards.append(tmp_path / f"part-{number:06d}.jsonl")
        write_records(shards[-1], pairs)
    captions = [{"p1": "A blue tube."}, {"p2": "A red tube."}]
    tools = {"load": lambda: None, "collator": lambda loaded: None, "prompts": Prompts.load(), "shards": shards}
    stage = StageDirectory(tmp_path / "verify", "key")
    out = verify.run(
        VerifyConfig(round_trip=False, caption=True), stage, captions=lambda shard: captions[shard], **tools
    )
    checks = [next(read_records(path, PseudoQA)).checks for path in out]
    assert [c["caption"] for c in checks] == ["nothing", "caption"]
    count = len(asked)
    assert (
        verify.run(VerifyConfig(round_trip=False, caption=True), stage, **tools) == out and len(asked) == count
    )  # finished
    assert verify.run(VerifyConfig(round_trip=False), StageDirectory(tmp_path / "off", "key"), **tools) == shards


def test_bad_settings():
    with pytest.raises(LeamlError, match="batch_size is 0"):
        VerifyConfig(batch_size=0)
