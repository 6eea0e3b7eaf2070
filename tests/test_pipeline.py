"""LEAML end to end on real files: three architectures, resumption after kill -9, and bad input told in a sentence."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from leaml_plugin import cli

ARCHITECTURES = ("qwen2_5_vl", "llava", "idefics3")
FAST = [
    "--dtype", "float32", "--device", "cpu", "--steps", "4", "--batch-size", "2", "--density", "0.2", "--samples", "2",
    "--set", "generate.max_new_tokens=12", "--set", "generate.shard_size=2",
    "--set", "generator.train.checkpoint_every=2",
    "--set", "finetune.train.checkpoint_every=2", "--set", "evaluate.max_new_tokens=4",
]  # fmt: skip


@pytest.fixture
def project(tmp_path, pictures):
    return make_project(tmp_path, pictures)


def make_project(tmp_path: Path, pictures: list[Path]) -> Path:
    """A user's folder: JPEG pictures, a JSONL made by hand, captions, and a few test questions."""
    from PIL import Image

    (tmp_path / "images").mkdir()
    for i, path in enumerate(pictures):
        Image.open(path).convert("RGB").save(tmp_path / "images" / f"{i}.jpg", quality=90)
    rows = [
        {"image": f"images/{i}.jpg", "question": "Which colour is the spot?", "answer": ["red", "green"][i % 2]}
        for i in range(4)
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[:2]))
    captions = [{"image": f"images/{i}.jpg", "caption": f"A spot on ground number {i}."} for i in range(6)]
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(c) + "\n" for c in captions))
    return tmp_path


def arguments(project: Path, model: Path, output: str = "run", *more: str) -> list[str]:
    return [
        "adapt", "--model", str(model), "--labeled", str(project / "train.jsonl"),
        "--unlabeled", str(project / "images"), "--captions", str(project / "captions.jsonl"),
        "--output", str(project / output), *FAST, *more,
    ]  # fmt: skip


def tree(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_adapt_from_jpegs_and_a_jsonl(name, project, tiny_models, capsys):
    import torch

    from leaml_plugin import models

    model = tiny_models(name)
    before = tree(model)
    test = ["--evaluation", str(project / "test.jsonl")]
    assert cli.main(arguments(project, model, "run", *test)) == 0
    out = capsys.readouterr().out
    assert "image-blind majority" in out
    run = project / "run"
    first = tree(run)
    assert {"config.json", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"} <= set(first)

    # the adapter loads through the public loader and changes what the model says
    base = models.load(str(model), dtype="float32", device="cpu").model.state_dict()
    tuned = models.load(str(model), dtype="float32", device="cpu", adapter=str(run / "adapter"))
    merged = tuned.model.merge_and_unload().state_dict()
    assert any(not torch.equal(base[key], merged[key]) for key in base)
    assert tree(model) == before

    assert cli.main(arguments(project, model, "run", *test)) == 0  # finished: reads, changes nothing
    assert tree(run) == first


def test_every_option_at_once(project, tiny_models):
    """FFN neurons, QA free to move everything, both QA tasks, second answers, all filters, LoRA at the end."""
    model = tiny_models("qwen2_5_vl")
    settings = [
        "relevance.granularity=ffn", "relevance.loss=both", "relevance.scope=model", "generator.qa_task=both",
        "generator.qa_updates=all", "verify.round_trip=true", "verify.blind=true", "verify.caption=true",
        "filter.round_trip=true", "filter.blind=true", "filter.caption=true", "filter.answer_share=0.5", "filter.min_logprob=-20", "generate.temperature=0.7",
        "generate.mix=uniform", "generate.max_new_tokens=40",
        "finetune.mode=lora", "finetune.train.schedule=linear", "generator.train.micro_batch=1",
        "finetune.train.gradient_checkpointing=true",
    ]  # fmt: skip
    options = [word for setting in settings for word in ("--set", setting)]
    assert cli.main(arguments(project, model, "run", *options)) == 0
    stages = project / "run" / "stages"
    assert (stages / "train_generator" / "model" / "model.safetensors").exists()
    families = json.loads((stages / "generate" / "families.json").read_text())["families"]
    rows = [json.loads(line) for line in (stages / "verify" / "part-000000.jsonl").open()]
    assert [family["name"] for family in families if family["target"]] == ["which color is the"]
    assert all(row["text"].startswith("Question: Which colour is the") for row in rows)
    assert all(set(row["checks"]) in (set(), {"round_trip", "blind", "caption"}) for row in rows)


def test_clips_are_lists_of_frames(project, tiny_models):
    """Labels, unlabelled pictures and captions may be videos, given as their frames in order."""
    frames = [f"images/{i}.jpg" for i in range(3)]
    label = {"images": frames, "question": "Who has it?", "answer": "red"}
    clip = {"id": "clip1", "images": frames[::-1]}
    (project / "train.jsonl").write_text(json.dumps(label) + "\n")
    (project / "clips.jsonl").write_text(json.dumps(clip) + "\n")
    (project / "captions.jsonl").write_text(json.dumps({**clip, "caption": "A run."}) + "\n")
    options = arguments(project, tiny_models("qwen2_5_vl"))
    options[options.index("--unlabeled") + 1] = str(project / "clips.jsonl")
    assert cli.main(options) == 0
    rows = [json.loads(line) for line in (project / "run/stages/generate/part-000000.jsonl").open()]
    assert {len(row["images"]) for row in rows} == {3}


@pytest.mark.parametrize("mode", ["full", "lora", "selected"])
def test_labels_only_baselines(mode, project, tiny_models, capsys):
    model = tiny_models("qwen2_5_vl")
    options = [
        "adapt", "--model", str(model), "--labeled", str(project / "train.jsonl"), "--method", "labels", "--mode", mode,
        "--output", str(project / mode), *FAST,
    ]  # fmt: skip
    assert cli.main(options) == 0
    result = project / mode / ("model" if mode == "full" else "adapter")
    assert str(result) in capsys.readouterr().out
    assert any(p.suffix == ".safetensors" for p in result.iterdir())
    assert not (project / mode / "stages" / "generate").exists()


def test_equal_runs_give_equal_bytes_whatever_the_hash_seed(project, tiny_models):
    """LoRA included, whose configuration peft writes in hash order."""
    model = tiny_models("qwen2_5_vl")
    for seed in ("1", "2"):
        subprocess.run(
            [sys.executable, "-m", "leaml_plugin.cli", *arguments(project, model, f"run{seed}", "--mode", "lora")],
            check=True, env={**os.environ, "PYTHONHASHSEED": seed}, stdout=subprocess.DEVNULL,
        )  # fmt: skip
    assert tree(project / "run1") == tree(project / "run2")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, pictures, tiny_models):
    """A project with one whole run, and the command of a run. Every run is a process of its own, as for a user."""
    project = make_project(tmp_path_factory.mktemp("killed"), pictures)
    test = ["--evaluation", str(project / "test.jsonl")]

    def command(output: str) -> list[str]:
        model = tiny_models("qwen2_5_vl")
        return [sys.executable, "-m", "leaml_plugin.cli", *arguments(project, model, output, *test)]

    subprocess.run(command("whole"), check=True, stdout=subprocess.DEVNULL)
    return project, command


@pytest.mark.slow
@pytest.mark.parametrize(
    "sign",
    [
        "relevance/scores.safetensors",
        "train_generator/work/checkpoint.safetensors",
        "generate/part-000000.jsonl",
        "filter/dropped.jsonl",
        "finetune/work/checkpoint.safetensors",
        "evaluate/predictions.jsonl",
    ],
)
def test_kill_nine_in_any_stage_then_the_same_command_gives_the_same_bytes(sign, undisturbed):
    project, command = undisturbed
    output = sign.split("/")[0]
    process = subprocess.Popen(command(output), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (project / output / "stages" / sign).exists() and process.poll() is None:
        assert time.monotonic() < deadline, f"{sign} never appeared"
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run(command(output), check=True, stdout=subprocess.DEVNULL)
    whole, killed = tree(project / "whole"), tree(project / output)
    assert whole.keys() == killed.keys()
    assert [name for name in whole if whole[name] != killed[name]] == []


# Each case breaks the project and names what the sentence must say.
def _missing_picture(p):
    (p / "images" / "2.jpg").unlink()
    return ["train.jsonl", "line 3", "2.jpg"]


def _truncated_picture(p):
    data = (p / "images" / "1.jpg").read_bytes()
    (p / "images" / "1.jpg").write_bytes(data[: len(data) // 2])
    return ["1.jpg"]


def _bad_json(p):
    with open(p / "train.jsonl", "a") as f:
        f.write('{"image": "images/0.jpg", "question"\n')
    return ["train.jsonl", "line 5"]


def _empty_answer(p):
    with open(p / "train.jsonl", "a") as f:
        f.write('{"image": "images/0.jpg", "question": "q", "answer": "  "}\n')
    return ["train.jsonl", "line 5", "answer"]


def _escaping_path(p):
    with open(p / "train.jsonl", "a") as f:
        f.write('{"image": "../../etc/passwd", "question": "q", "answer": "a"}\n')
    return ["train.jsonl", "line 5"]


def _no_pictures(p):
    shutil.rmtree(p / "images")
    (p / "images").mkdir()
    for name in ("train.jsonl",):
        (p / name).write_text('{"image": "0.jpg", "question": "q", "answer": "a"}\n')
    from PIL import Image

    Image.new("RGB", (28, 28)).save(p / "0.jpg")
    return ["images"]


def _foreign_output(p):
    (p / "run").mkdir()
    (p / "run" / "thesis.tex").write_text("years of work")
    return ["run", "--output"]


def _a_shape_that_the_processor_refuses(p):
    from PIL import Image

    Image.new("RGB", (2000, 2)).save(p / "images" / "wide.png")
    with open(p / "train.jsonl", "a") as f:
        f.write('{"image": "images/wide.png", "question": "q", "answer": "a"}\n')
    return ["train.jsonl", "line 5", "aspect ratio"]


def _no_labels(p):
    (p / "train.jsonl").unlink()
    return ["train.jsonl"]


BAD = [
    _missing_picture, _truncated_picture, _bad_json, _empty_answer, _escaping_path, _no_pictures, _foreign_output,
    _a_shape_that_the_processor_refuses, _no_labels,
]  # fmt: skip


@pytest.mark.parametrize("harm", BAD, ids=lambda f: f.__name__.strip("_"))
def test_bad_input_is_one_sentence_and_touches_nothing(harm, project, tiny_models, capsys):
    words = harm(project)
    before = tree(project)
    assert cli.main(arguments(project, tiny_models("qwen2_5_vl"))) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("leaml: ")
    for word in words:
        assert word in error, error
    assert tree(project) == before


def test_a_model_that_is_no_image_text_model(project, tmp_path, capsys):
    model = tmp_path / "bert"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    assert cli.main(arguments(project, model)) == 2
    assert "bert" in capsys.readouterr().err
    assert cli.main(arguments(project, tmp_path / "nowhere")) == 2
    assert "nowhere" in capsys.readouterr().err
    assert not (project / "run").exists()


def test_another_configuration_in_the_output_directory(project, tiny_models, capsys):
    model = tiny_models("qwen2_5_vl")
    assert cli.main(arguments(project, model)) == 0
    before = tree(project)
    assert cli.main(arguments(project, model, "run", "--seed", "1")) == 2
    assert "another configuration" in capsys.readouterr().err
    assert tree(project) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--density", "2"], "density is 2.0; it must be above 0 and at most 1"),
        (["--method", "laeml"], "did you mean 'leaml'"),
        (["--set", "finetune.train.lrr=1"], "did you mean 'finetune.train.lr'"),
        (["--mode", "lors"], "did you mean 'lora'"),
        (["--criterion", "tayler"], "did you mean 'taylor'"),
        (["--caption-weight", "-1"], "caption_weight must not be negative"),
        (["--max-length", "8"], "train.jsonl"),
        (["--device", "gpu"], "device 'gpu' cannot be used here"),
        (["--dtype", "float8"], "unknown dtype 'float8'"),
        (["--lr", "nan"], "generator.train.lr is nan; it must be a finite number"),
        (["--batch-size", "1"], "set --batch-size to at least 2"),
        (["--captions", ""], "no picture has a caption; give --captions"),
        (["--set", "evaluate.batch_size=0"], "evaluate: batch_size is 0"),
        (["--set", "generator.caption_batch=-1"], "caption_batch is -1"),
        (["--set", "generator.train.warmup=3"], "warmup is 3.0"),
        (["--set", "generator.train.betas=[0.9]"], "it must be a list of 2"),
        (["--set", "finetune.train.betas=[2,0.9]"], "betas are [2.0, 0.9]"),
        (["--set", "finetune.train.weight_decay=-1"], "weight_decay is -1.0"),
        (["--set", "relevance.targets=("], "relevance.targets is '(', which is no regular expression"),
        (["--mode", "lora", "--set", "finetune.lora_rank=0"], "lora_rank is 0"),
        (["--set", "filter.blind=true"], "filter.blind needs the second answers of verify.blind"),
        (["--set", "verify.round_trip=true"], 'set generator.qa_task="both"'),
    ],
)
def test_bad_options(options, message, project, tiny_models, capsys):
    assert cli.main(arguments(project, tiny_models("qwen2_5_vl"), "run", *options)) == 2
    assert message in capsys.readouterr().err
    assert not (project / "run").exists()


def test_no_kept_pair_is_told_and_edits_of_the_result_leave_the_run_alone(project, tiny_models, capsys):
    model = tiny_models("qwen2_5_vl")
    options = arguments(project, model, "run", "--set", "filter.min_logprob=0")
    assert cli.main(options) == 0
    assert "the filter kept no pseudo-QA pair (" in capsys.readouterr().err
    config = project / "run" / "adapter" / "adapter_config.json"
    with open(config, "r+") as file:  # in place, as some editors do
        file.write("{ ")
    assert cli.main(options) == 0


def test_a_result_with_folders_is_delivered(tmp_path):
    """Processors with several chat templates save them in a folder."""
    from leaml_plugin.artifacts import RunDirectory
    from leaml_plugin.pipeline import Adaptation

    run = Adaptation.__new__(Adaptation)
    run.directory = RunDirectory.open(tmp_path / "run", {}, {})
    source = run.directory.stage("finetune").file("model")
    (source / "additional_chat_templates").mkdir(parents=True)
    (source / "additional_chat_templates" / "rag.jinja").write_text("x")
    (source / "model.safetensors").write_text("w")
    target = run.deliver({"path": source})["model"]
    assert (target / "additional_chat_templates" / "rag.jinja").read_text() == "x"
    assert (target / "model.safetensors").samefile(source / "model.safetensors")
