"""LEAML end to end on real files: three architectures, resumption after kill -9, and bad input told in a sentence."""

from __future__ import annotations

import contextlib
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
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}  # as torchrun sets it; rounding depends on the number of threads
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
        "filter.round_trip=true", "filter.blind=true", "filter.caption=true", "filter.answer_share=0.5",
        "filter.min_logprob=-20", "generate.temperature=0.7",
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
        "--output", str(project / mode), "--unlabeled", str(project / "images"), *FAST,
    ]  # fmt: skip
    assert cli.main(options) == 0
    result = project / mode / ("model" if mode == "full" else "adapter")
    said = capsys.readouterr()
    assert str(result) in said.out
    assert "trains on the labels alone and does not read --unlabeled." in said.err
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

    subprocess.run(command("whole"), check=True, stdout=subprocess.DEVNULL, env=ONE_THREAD)
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
    process = subprocess.Popen(command(output), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ONE_THREAD)
    deadline = time.monotonic() + 120
    while not (project / output / "stages" / sign).exists() and process.poll() is None:
        assert time.monotonic() < deadline, f"{sign} never appeared"
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run(command(output), check=True, stdout=subprocess.DEVNULL, env=ONE_THREAD)
    whole, killed = tree(project / "whole"), tree(project / output)
    assert whole.keys() == killed.keys()
    assert [name for name in whole if whole[name] != killed[name]] == []


def _kill_all(process: subprocess.Popen) -> None:
    """Kill a process and all it started; torchrun's workers have sessions of their own."""
    tree = [process.pid]
    for pid in tree:
        children = Path(f"/proc/{pid}/task/{pid}/children")
        tree += map(int, children.read_text().split()) if children.exists() else []
    for pid in tree:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_killed_on_two_ranks_then_on_one_then_finished_by_two_gives_the_bytes_of_one(undisturbed):
    """``torchrun`` with two processes on the CPU; killed after the first shard, and alone after the second."""
    project, command = undisturbed

    def start(ranks: int, **options) -> subprocess.Popen:
        python, *rest = command("ranks")
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        return subprocess.Popen([python, *(torchrun if ranks > 1 else []), *rest], env=ONE_THREAD, **options)

    for ranks, sign in ((2, "part-000000.jsonl"), (1, "part-000001.jsonl")):
        process = start(ranks, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 300
        while not (project / "ranks" / "stages" / "generate" / sign).exists() and process.poll() is None:
            assert time.monotonic() < deadline, f"{sign} never appeared"
            time.sleep(0.001)
        _kill_all(process)
    process = start(2, stdout=subprocess.PIPE, text=True)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    assert "rank 1 of 2: nothing is left to share" in out
    whole, shared = tree(project / "whole"), tree(project / "ranks")
    assert whole.keys() == shared.keys()
    assert [name for name in whole if whole[name] != shared[name]] == []


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


def _damaged(folder: Path) -> dict[str, str]:
    """Unlabelled pictures that cannot be used, and what must be said of each."""
    import struct
    import zlib

    from PIL import Image

    Image.effect_noise((64, 64), 60).convert("RGB").save(folder / "half.jpg")
    data = (folder / "half.jpg").read_bytes()
    (folder / "half.jpg").write_bytes(data[: len(data) // 2])
    (folder / "text.png").write_text("no picture")
    Image.new("L", (4, 4)).save(folder / "bomb.png")
    data = bytearray((folder / "bomb.png").read_bytes())
    data[16:24] = struct.pack(">II", 60_000, 60_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    (folder / "bomb.png").write_bytes(data)
    Image.new("RGB", (2000, 2)).save(folder / "wide.png")
    return {"half.jpg": "truncated", "text.png": "is not a picture", "bomb.png": "pixels", "wide.png": "aspect ratio"}


@pytest.mark.parametrize("decoded", [1000, 1])
def test_damaged_unlabelled_pictures_are_left_out_with_their_reason(decoded, project, tiny_models, capsys, monkeypatch):
    """Found before the run where they are decoded, else by the stage that opens them for a caption or a pair."""
    from leaml_plugin import pipeline

    why = _damaged(project / "images")
    with open(project / "captions.jsonl", "a") as file:
        file.writelines(json.dumps({"image": f"images/{name}", "caption": "What is it?"}) + "\n" for name in why)
    monkeypatch.setattr(pipeline, "DECODED", decoded)
    model = tiny_models("qwen2_5_vl")
    options = arguments(project, model)
    assert cli.main(options) == 0
    err = capsys.readouterr().err
    skipped = [json.loads(line) for line in (project / "run" / "skipped.jsonl").open()]
    assert {row["picture_id"] for row in skipped} == set(why) and len(skipped) == len(why)
    for row in skipped:
        assert why[row["picture_id"]] in row["reason"], row
    assert "4 of 10 unlabelled pictures could not be used" in err
    stages = project / "run" / "stages"
    early = (stages / "inputs" / "skipped.jsonl").read_text()
    assert ("half.jpg" in early) == (decoded == 1000) and "bomb.png" in early and "wide.png" not in early
    counts = json.loads((stages / "filter" / "counts.json").read_text())
    assert counts["unreadable"] == (1 if decoded == 1000 else 2)
    if decoded == 1:
        assert "left out:" in err  # by the caption distillation
    before = tree(project / "run")
    assert cli.main(options) == 0
    assert tree(project / "run") == before


def test_a_picture_that_goes_while_the_run_is_at_work(project, tiny_models, monkeypatch):
    """It was read when its pairs were written, and is gone when they are verified."""
    from leaml_plugin.data import collate

    real, stages = collate.open_image, project / "run" / "stages"

    def open_image(ref):
        if ref.uri.endswith("5.jpg") and (stages / "generate" / "done.json").exists():
            Path(ref.uri).unlink(missing_ok=True)
        return real(ref)

    monkeypatch.setattr(collate, "open_image", open_image)
    more = (
        "generator.qa_task=both",
        "verify.round_trip=true",
        "generate.max_new_tokens=40",
        "finetune.pseudo_share=0.9",
    )
    options = [word for setting in more for word in ("--set", setting)]
    monkeypatch.setattr("leaml_plugin.data.prompts.Prompts.parse_generated", lambda self, text: ("What?", text or "x"))
    assert cli.main(arguments(project, tiny_models("qwen2_5_vl"), "run", *options)) == 0
    dropped = [json.loads(line) for line in (stages / "filter" / "dropped.jsonl").open()]
    gone = [row for row in dropped if row["reason"] == "unreadable"]
    assert {row["picture_id"] for row in gone} == {"5.jpg"} and "no such picture" in gone[0]["checks"]["unreadable"]


def test_where_no_unlabelled_picture_can_be_used_nothing_begins(project, tiny_models, capsys):
    for path in (project / "images").iterdir():
        shutil.copy(path, project / path.name)
        path.write_bytes(b"no picture")
    rows = (project / "train.jsonl").read_text().replace("images/", "")
    (project / "train.jsonl").write_text(rows)
    assert cli.main(arguments(project, tiny_models("qwen2_5_vl"))) == 2
    assert "images: none of the 6 pictures can be used; the first: " in capsys.readouterr().err
    assert not (project / "run").exists()


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
        (
            ["--captions", "", "--caption-weight", "0", "--set", "verify.caption=true"],
            "or turn the caption check off with verify.caption=false",
        ),
        (["--set", "evaluate.batch_size=0"], "evaluate: batch_size is 0"),
        (["--set", "generator.caption_batch=-1"], "caption_batch is -1"),
        (["--set", "generator.train.warmup=3"], "warmup is 3.0"),
        (["--set", "generator.train.betas=[0.9]"], "it must be a list of 2"),
        (["--set", "finetune.train.betas=[2,0.9]"], "betas are [2.0, 0.9]"),
        (["--set", "finetune.train.weight_decay=-1"], "weight_decay is -1.0"),
        (["--set", "relevance.targets=("], "relevance.targets is '(', which is no regular expression"),
        (["--set", "relevance.targets=nothing"], "no Linear layer of this qwen2_5_vl model matches 'nothing'"),
        (["--mode", "lora", "--set", "finetune.targets=nothing"], "matches 'nothing'; give targets that match"),
        (["--mode", "lora", "--set", "finetune.lora_rank=0"], "lora_rank is 0"),
        (["--set", "filter.blind=true"], "filter.blind needs the second answers of verify.blind"),
        (["--set", "generator.qa_task=generate"], 'set generator.qa_task="both"'),
        (["--set", "verify.round_trip=false"], "set both to true, or both to false"),
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
