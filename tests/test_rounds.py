"""Several rounds of self-training: where the next generator starts, when to stop, and resumption."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
from test_pipeline import arguments, make_project, tree

from leaml_plugin import cli, models
from leaml_plugin.errors import LeamlError
from leaml_plugin.pipeline import AdaptConfig
from leaml_plugin.report.facts import Facts


@pytest.fixture(scope="module")
def project(tmp_path_factory, pictures):
    return make_project(tmp_path_factory.mktemp("rounds"), pictures)


@pytest.fixture(scope="module", autouse=True)
def pairs_from_noise():
    """Random weights write no question and answer; whatever they write is taken for the answer to one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("leaml_plugin.data.prompts.Prompts.parse_generated", lambda self, text: ("What?", text or "x"))
        yield


#: Random weights agree with nothing.
LENIENT = [
    "--set", "verify.round_trip=false", "--set", "filter.round_trip=false", "--set", "filter.length_slack=99",
    "--set", "finetune.pseudo_share=0.9", "--lr", "0.02",
]  # fmt: skip


def state(path, adapter=None):
    import torch

    loaded = models.load(path, dtype="float32", device="cpu", adapter=adapter).model
    with torch.no_grad():
        return (loaded.merge_and_unload() if adapter else loaded).state_dict()


@pytest.fixture(scope="module")
def two_rounds(project, tiny_models):
    more = ["--rounds", "2", "--set", "round_gain=-1"]
    options = arguments(project, tiny_models("qwen2_5_vl"), "two", *more, *LENIENT)
    assert cli.main(options) == 0
    return options


def test_the_second_generator_starts_from_the_first_vqa_model(project, tiny_models, two_rounds):
    import torch

    model, stages = tiny_models("qwen2_5_vl"), project / "two" / "stages"
    first, start = state(model, stages / "finetune" / "adapter"), state(stages / "round-2" / "start" / "model")
    assert first.keys() == start.keys() and all(torch.equal(first[name], start[name]) for name in first)
    config = json.loads((stages / "round-2" / "train_generator" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(stages / "round-2" / "start" / "model")
    pairs = [(stages / where / "generate" / "part-000000.jsonl").read_text() for where in ("", "round-2")]
    assert pairs[0] != pairs[1]
    # the VQA model starts from the base model again
    config = json.loads((stages / "round-2" / "finetune" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(model)
    delivered, of_round_2 = tree(project / "two" / "adapter"), tree(stages / "round-2" / "finetune" / "adapter")
    assert delivered == of_round_2 != tree(stages / "finetune" / "adapter")
    rounds = json.loads((stages / "rounds" / "rounds.json").read_text())
    assert rounds["delivered"] == 2 and len(rounds["kept_share"]) == 2


def test_rounds_resume_to_the_same_bytes(project, two_rounds):
    run = project / "two"
    before = tree(run)
    assert cli.main(two_rounds) == 0 and tree(run) == before
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "stages" / "rounds")
    for name in ("start", "generate", "filter", "finetune"):
        shutil.rmtree(run / "stages" / "round-2" / name)
    assert cli.main(two_rounds) == 0 and tree(run) == before


def test_the_report_shows_the_round_that_was_delivered(project, two_rounds):
    written = list(Facts(project / "two").pseudo())
    stage = project / "two" / "stages" / "round-2" / "generate"
    assert len(written) == sum(1 for path in stage.glob("part-*") for _ in path.open())
    texts = {json.loads(line)["text"] for path in stage.glob("part-*") for line in path.open()}
    assert {pair.text for pair in written} == texts


def test_rounds_end_where_no_larger_share_of_the_pairs_is_kept(project, tiny_models, capsys):
    more = ["--rounds", "3", "--set", "round_gain=0.5"]
    options = arguments(project, tiny_models("qwen2_5_vl"), "stops", *more, *LENIENT)
    assert cli.main(options) == 0
    assert "the result is that of round 1" in capsys.readouterr().err
    stages = project / "stops" / "stages"
    assert json.loads((stages / "rounds" / "rounds.json").read_text())["delivered"] == 1
    assert not (stages / "round-2" / "finetune").exists() and not (stages / "round-3").exists()
    assert tree(project / "stops" / "adapter") == tree(stages / "finetune" / "adapter")


@pytest.mark.slow
def test_two_ranks_share_every_round(project, tiny_models):
    """The bytes are those of one process, but for the names of the run's own folder in the second generator's files."""
    more = ["--rounds", "2", "--set", "round_gain=-1"]
    options = arguments(project, tiny_models("qwen2_5_vl"), "", *more)
    where = options.index("--output") + 1
    ranks = []
    for output, number, count in (("alone", 0, 1), ("shared", 0, 2), ("shared", 1, 2)):
        command = [*options[:where], str(project / output), *options[where + 1 :]]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "LEAML_RANK": str(number), "LEAML_WORLD_SIZE": str(count)}
        ranks.append(
            subprocess.Popen([sys.executable, "-m", "leaml_plugin.cli", *command], env=env, stdout=subprocess.DEVNULL)
        )
        if output == "alone":
            ranks[0].wait(timeout=300)
    assert [process.wait(timeout=300) for process in ranks] == [0, 0, 0]
    alone, shared = tree(project / "alone"), tree(project / "shared")
    assert alone.keys() == shared.keys() and "stages/round-2/finetune/done.json" in alone
    own = ("config.json", "report", "stages/round-2/train_generator/")
    assert [n for n in alone if alone[n] != shared[n] and not n.startswith(own)] == []


def test_bad_settings():
    files = {"model": "m", "labeled": "l", "unlabeled": "u", "output": "o"}
    with pytest.raises(LeamlError, match="rounds is 0"):
        AdaptConfig(**files, rounds=0)
    with pytest.raises(LeamlError, match="round_gain is 2"):
        AdaptConfig(**files, round_gain=2)
