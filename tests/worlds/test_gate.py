"""The gate measures, prints its figures, and says no to a checkpoint that knows nothing."""

from __future__ import annotations

import argparse
import json

import pytest

from leaml_plugin.errors import LeamlError
from leaml_plugin.worlds import blind_majority, checkpoint_path, forgetting, gate, general_object_qa, pretrain

SHIPPED = (checkpoint_path() / "model.safetensors").exists()
needs_checkpoint = pytest.mark.skipif(not SHIPPED, reason="no checkpoint lies in leaml_plugin/worlds/checkpoint")


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    gate.add_arguments(parser)
    return parser.parse_args(words)


@pytest.fixture(scope="module")
def ignorant(tmp_path_factory):
    """A checkpoint with random weights."""
    directory = tmp_path_factory.mktemp("ignorant")
    recipe = pretrain.Recipe(width=32, layers=1, vision_width=32, vision_layers=1)
    pretrain.write_checkpoint(pretrain.Run(recipe, directory / "work"), directory / "checkpoint")
    return directory / "checkpoint"


def test_a_checkpoint_that_knows_nothing_fails_with_its_figures(ignorant, tmp_path, capsys):
    few = ("--pictures", "4", "--steps", "2", "--test-pictures", "4", "--world", "endoscopy")
    code = gate.main(arguments("--checkpoint", str(ignorant), "--json", str(tmp_path / "gate.json"), *few))
    printed = capsys.readouterr().out
    assert code == 1
    assert "general object QA 0.0" in printed and "the gate is NOT passed" in printed
    figures = json.loads((tmp_path / "gate.json").read_text())
    found = figures["worlds"]["endoscopy"]
    assert found["blind"] > found["all_labels"]
    assert set(found["templates"]) <= set(blind_majority("endoscopy", pictures=50)["templates"])


def test_a_missing_checkpoint_is_one_sentence(tmp_path):
    with pytest.raises(LeamlError, match="holds no checkpoint; make one with"):
        gate.main(arguments("--checkpoint", str(tmp_path)))


def test_every_condition_counts():
    def figures(general, blind, zero, tuned):
        good = tuned >= blind + gate.MARGIN and zero <= tuned - gate.MARGIN
        world = {"blind": blind, "zero_shot": zero, "all_labels": tuned, "questions": 9, "passed": good}
        return {"general": {"object": general}, "worlds": {"w": world}, "passed": good and general >= gate.GENERAL_BAR}

    assert "is passed" in gate.verdict(figures(0.8, 0.3, 0.1, 0.6))[-1]
    for bad in ((0.7, 0.3, 0.1, 0.6), (0.8, 0.3, 0.1, 0.45), (0.8, 0.3, 0.5, 0.6)):
        assert "NOT passed" in gate.verdict(figures(*bad))[-1]


def test_forgetting_and_object_qa_take_any_model_of_the_kind(ignorant):
    model, _ = gate.load(ignorant)
    lost = forgetting(model, pictures=4)
    assert set(lost) == {"qa", "caption_loss"} and lost["caption_loss"] > 3
    assert general_object_qa(model, pictures=4)["questions"] == 40


@needs_checkpoint
def test_the_shipped_checkpoint_is_small_and_described():
    directory = checkpoint_path()
    assert sum(p.stat().st_size for p in directory.iterdir()) <= 10 * 2**20
    card = (directory / "MODEL_CARD.md").read_text()
    assert pretrain.weights_hash(directory) in card


@pytest.mark.slow
@needs_checkpoint
@pytest.mark.parametrize("world", gate.OUT_OF_DISTRIBUTION)
def test_the_shipped_checkpoint_passes_the_gate(world, capsys):
    assert gate.main(arguments("--world", world)) == 0, capsys.readouterr().out
