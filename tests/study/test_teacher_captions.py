"""Captions by the larger teacher reach all that learns from captions; missing ones are told before anything runs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from leaml_plugin import study as command
from leaml_plugin.errors import LeamlError
from leaml_plugin.study import runner, tuning
from leaml_plugin.study.protocol import (
    LARGER_TEACHER,
    METHODS,
    ORDER,
    RATE_OF,
    Protocol,
    check_methods,
    learning_rate,
    tuned,
)
from leaml_plugin.study.runner import Job, identity, resolve, result_path, run_all
from leaml_plugin.worlds.teacher import captions_file


@pytest.fixture
def pool(study):
    return {scene.id: scene for scene in study.world("endoscopy")._pool}


def test_they_reach_the_generator_and_the_verify_stage(study, pool, monkeypatch):
    seen = {}
    train, verify = runner.train_generator.run, runner.verify.run

    def trained(*args, pictures, **kwargs):
        seen["generator"] = {p.id: p.caption for p in pictures}
        return train(*args, pictures=pictures, **kwargs)

    def verified(*args, shards, captions, **kwargs):
        seen["verify"] = dict(captions(shards[0]))
        return verify(*args, shards=shards, captions=captions, **kwargs)

    monkeypatch.setattr(study, "_pairs", {})  # what an earlier test's generator wrote is not taken over
    monkeypatch.setattr(runner.train_generator, "run", trained)
    monkeypatch.setattr(runner.verify, "run", verified)
    told = {}
    for method in ("leaml", "leaml-model-teacher"):
        seen.clear()
        study.run("endoscopy", method, 0.25, 0)
        told[method] = dict(seen)
    for stage in ("generator", "verify"):
        assert told["leaml-model-teacher"][stage].keys() == told["leaml"][stage].keys()
        assert told["leaml"][stage] == {name: pool[name].caption for name in told["leaml"][stage]}
        assert told["leaml-model-teacher"][stage] == {name: pool[name].true_caption for name in told["leaml"][stage]}
        assert told["leaml-model-teacher"][stage] != told["leaml"][stage]


def test_they_reach_the_joint_training(study, pool, monkeypatch):
    seen = {}
    stream = runner.Stream

    def kept(name, turns, size):
        seen[name] = [turn.target for turn in turns]
        return stream(name, turns, size)

    monkeypatch.setattr(runner, "Stream", kept)
    study.run("endoscopy", "joint-model-teacher", 0.25, 0)
    unlabelled = [picture.id for picture in study.world("endoscopy").labels(0.25, 0).unlabelled]
    assert seen["captions"] == [pool[name].true_caption for name in unlabelled]
    assert seen["captions"] != [pool[name].caption for name in unlabelled]


def test_the_teacher_is_recorded_where_it_is_not_the_worlds():
    config = {method: resolve(Protocol(), method, 0, None, None) for method in METHODS}
    for method, spec in METHODS.items():
        assert config[method]["method"].get("teacher") == (None if spec.teacher == "world" else LARGER_TEACHER)
    for method, other in (("leaml-model-teacher", "leaml"), ("joint-model-teacher", "joint")):
        assert config[method]["stages"] == config[other]["stages"], "they differ in the captions alone"
        names = [identity("c", "endoscopy", "same", 0.01, 0, config[m])["setting"] for m in (method, other)]
        assert names[0] != names[1]


def test_a_variant_keeps_the_rate_of_what_it_varies():
    for method, other in RATE_OF.items():
        assert learning_rate(method) == learning_rate(other) and not tuned(method) and tuned(other)
        assert METHODS[method].kind == METHODS[other].kind


def test_missing_captions_are_told_before_anything_is_run(study, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "captions", tmp_path / "none")
    jobs = [Job("endoscopy", "full", 0.25, 3), Job("endoscopy", "leaml-model-teacher", 0.25, 3)]
    with pytest.raises(LeamlError, match=r"endoscopy\.jsonl\.gz: .* not there.*worlds\.teacher --captions") as error:
        run_all(study, jobs, tmp_path / "results")
    assert str(captions_file(tmp_path / "none", LARGER_TEACHER, "endoscopy")) in str(error.value)
    assert not (tmp_path / "results").exists()


def test_without_captions_a_study_of_all_methods_leaves_these_out(tmp_path, teacher_captions, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(command, "_study", lambda *args: asked.append(args[-1]) or 0)
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    special = {"leaml-model-teacher", "joint-model-teacher"}
    for options, methods in (
        (["--teacher-captions", str(tmp_path)], [m for m in ORDER if m not in special]),
        (["--teacher-captions", str(tmp_path), "--summary"], list(ORDER)),
        (["--teacher-captions", str(tmp_path), "--methods", "joint-model-teacher"], ["joint-model-teacher"]),
        (["--teacher-captions", str(teacher_captions)], list(ORDER)),
    ):
        assert command.main(parser.parse_args(["--world", "endoscopy", *options])) == 0
        assert asked.pop() == methods == check_methods(methods)
        assert ("without leaml-model-teacher" in capsys.readouterr().err) == (len(methods) == len(ORDER) - 2)


def test_results_of_all_other_methods_keep_their_names():
    root = Path(__file__).resolve().parents[2] / "results" / "study" / "32cc3040"
    found = set()
    for path in sorted(root.glob("*/*.json")):
        result = json.loads(path.read_text())
        if result.get("method") not in METHODS:  # what the filters were measured to do
            continue
        method, stages = result["method"], result["config"]["stages"]
        rate = tuning.rate_of(result) if stages else None
        finetune_rate = stages["finetune"]["train"]["lr"] if "generator" in stages else None
        config = json.loads(json.dumps(resolve(Protocol(), method, result["seed"], rate, finetune_rate)))
        if (config["stages"], config["data"]) == (stages, result["config"]["data"]):
            name = identity(result["checkpoint"], result["world"], method, result["labels"], result["seed"], config)
            assert result_path(root.parent, name) == path
            found.add(method)
    assert found >= {"blind", "zero-shot", "full", "lora", "joint", "leaml"}
