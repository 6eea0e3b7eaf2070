"""The scripts in examples/ run as they stand, on tiny models."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tiny_llama import load

from leaml_plugin import Selection
from leaml_plugin.tuner.convert import load_model

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, *argv: str):
    """Run a script's main() with these arguments."""
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]([str(a) for a in argv])


@pytest.fixture
def files(tmp_path, pictures) -> Path:
    """A directory with pictures, labels of two of them and captions of all."""
    (tmp_path / "images").mkdir()
    names = [shutil.copy(p, tmp_path / "images" / p.name).name for p in pictures]
    labels = [{"image": f"images/{n}", "question": "Which colour?", "answer": "red"} for n in names[:2]]
    captions = [{"image": f"images/{n}", "caption": f"A spot in picture {i}."} for i, n in enumerate(names)]
    for file, rows in (("train", labels), ("captions", captions)):
        (tmp_path / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_plain_pytorch(tmp_path, capsys):
    assert run("plain_pytorch", "--output", tmp_path) > 0.9
    assert Selection.load(tmp_path / "selection.safetensors").density == pytest.approx(0.1, abs=0.02)
    assert "35 of 336 neurons learned" in capsys.readouterr().out


@pytest.mark.slow
def test_trainer_qwen2_5_vl(files, tiny_models):
    base, out = tiny_models("qwen2_5_vl"), files / "out"
    options = ["--model", base, "--labeled", files / "train.jsonl", "--unlabeled", files / "images"]
    options += ["--captions", files / "captions.jsonl", "--output", out, "--batch-size", "2", "--device", "cpu"]
    trainer = run("trainer_qwen2_5_vl", *options, "--steps", "4", "--lr", "0.01")
    assert all("language_model" in name for name in trainer.selection.counts())
    adapted = PeftModel.from_pretrained(load_model(base), out / "adapter")
    assert any(p.any() for n, p in adapted.named_parameters() if "leaml_delta" in n)
    resumed = run("trainer_qwen2_5_vl", *options, "--steps", "6", "--lr", "0.01", "--resume")
    assert resumed.state.global_step == 6 and resumed.selection.jaccard(trainer.selection) == 1


@pytest.mark.slow
def test_trl_sft(files, tiny_models):
    base = tiny_models("qwen2_5_vl")
    model = load_model(base)
    names = ["model.language_model.layers.0.mlp.up_proj", "model.language_model.layers.1.self_attn.q_proj"]
    assert all(isinstance(model.get_submodule(n), torch.nn.Linear) for n in names)
    chosen = Selection({n: torch.tensor([1, 3]) for n in names}, sizes={names[0]: 64, names[1]: 32})
    chosen.save(files / "selection.safetensors")
    options = ["--model", base, "--labeled", files / "train.jsonl", "--output", files / "out", "--device", "cpu"]
    run("trl_sft", *options, "--selection", files / "selection.safetensors", "--steps", "2", "--batch-size", "2")
    adapted = PeftModel.from_pretrained(load_model(base), files / "out" / "adapter")
    assert adapted.peft_config["default"].row_counts == {n: 2 for n in names}


def test_parity(base, capsys):
    results = run("parity", "--model", base, "--density", "0.1", "--lr", "0.01")
    changed = results.pop("base against tuned in place (what training changed)")
    assert changed > 0.01 and len(results) == 5 and max(results.values()) < 1e-5
    assert len(capsys.readouterr().out.strip().splitlines()) == 6


def test_ms_swift_plugin(base, selection, tmp_path, monkeypatch):
    """ms-swift is not installed here; its tuner mapping is one dictionary and this base class."""

    class PeftTuner:
        @staticmethod
        def from_pretrained(model, model_id, **kwargs):
            return PeftModel.from_pretrained(model, model_id, **kwargs)

    plugin = types.ModuleType("swift.tuner_plugin")
    plugin.PeftTuner, plugin.tuners_map = PeftTuner, {}
    monkeypatch.setitem(sys.modules, "swift", types.ModuleType("swift"))
    monkeypatch.setitem(sys.modules, "swift.tuner_plugin", plugin)
    selection.save(tmp_path / "selection.safetensors")
    monkeypatch.setenv("LEAML_SELECTION", str(tmp_path / "selection.safetensors"))
    runpy.run_path(str(EXAMPLES / "ms_swift_plugin.py"))
    tuner = plugin.tuners_map["leaml"]
    model = tuner.prepare_model(None, load(base))
    model.save_pretrained(tmp_path / "adapter")
    again = tuner.from_pretrained(load(base), tmp_path / "adapter", is_trainable=True)
    assert again.peft_config["default"].row_counts == selection.counts()
    monkeypatch.delenv("LEAML_SELECTION")
    random = tuner.prepare_model(None, load(base))
    assert random.peft_config["default"].criterion == "random"


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "deepspeed_zero2", "deepspeed_zero3"])
def test_accelerate_configurations_are_read(name):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(EXAMPLES / "configs" / f"{name}.yaml"))
    assert config.num_processes == 2 and config.mixed_precision == "bf16"
