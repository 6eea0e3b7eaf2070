"""Steered generation: each sample begins as its family does, whatever shard its picture lies in."""

from __future__ import annotations

from collections import Counter

import pytest

from leaml_plugin import inference
from leaml_plugin.artifacts import StageDirectory, read_json, read_records
from leaml_plugin.data import Prompts
from leaml_plugin.errors import LeamlError
from leaml_plugin.inference import Generated
from leaml_plugin.records import QA, ImageRef, Picture, PseudoQA
from leaml_plugin.stages import generate
from leaml_plugin.stages.generate import FAMILIES, GenerateConfig

LABELS = [QA(str(i), (), q, "no") for i, q in enumerate(["How many polyps?", "Is there text?", "Is there blood?"])]
PICTURES = [Picture(f"p{i}", (ImageRef(f"/{i}.png"),)) for i in range(30)]


@pytest.fixture
def run(monkeypatch, tmp_path):
    def write(loaded, turns, *, num_samples, **options):
        for turn in turns:
            for sample in range(num_samples):
                yield Generated(turn.id, sample, f"{turn.prefix(sample)} thing?\nAnswer: no")

    monkeypatch.setattr(inference, "generate", write)

    def start(name, pictures, **options):
        stage = StageDirectory(tmp_path / name, "key")
        tools = {"load": lambda: None, "collator": lambda loaded: None, "prompts": Prompts.load()}
        shards = generate.run(GenerateConfig(**options), stage, pictures=pictures, labels=LABELS, **tools)
        return stage, {pair.id: pair for path in shards for pair in read_records(path, PseudoQA)}

    return start


def test_any_shard_order_gives_the_same_questions(run):
    _, one = run("one", PICTURES, mix="labels")
    _, other = run("other", PICTURES[::-1], mix="labels", shard_size=7)
    assert one == other
    asked = Counter(pair.question for pair in one.values())
    assert asked == {"How many thing?": pytest.approx(40, abs=8), "Is there thing?": pytest.approx(80, abs=8)}
    assert run("seeded", PICTURES, mix="labels", seed=1)[1] != one


def test_the_mix_is_written_down_for_the_report(run):
    stage, _ = run("given", PICTURES[:1], mix="is there=3, Why on=1")
    assert read_json(stage.file(FAMILIES))["families"] == [
        {"name": "is there", "labels": pytest.approx(2 / 3), "target": 0.75},
        {"name": "how many", "labels": pytest.approx(1 / 3), "target": 0.0},
        {"name": "why on", "labels": 0.0, "target": 0.25},
    ]
    stage, pairs = run("free", PICTURES[:1])
    assert not stage.file(FAMILIES).exists()
    assert {pair.text for pair in pairs.values()} == {" thing?\nAnswer: no"}


def test_a_mix_that_is_none():
    with pytest.raises(LeamlError, match=r"generate\.mix is 'is there'"):
        generate.steering(GenerateConfig(mix="is there"), LABELS)
    with pytest.raises(LeamlError, match="families is 0"):
        GenerateConfig(families=0)
