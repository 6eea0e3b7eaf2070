"""Loading models, finding neurons, and one sentence for everything that is not there."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from torch import nn

from leaml_plugin import models
from leaml_plugin.errors import LeamlError

LANGUAGE = {"qwen2_5_vl": "model.language_model.", "llava": "model.language_model.", "idefics3": "model.text_model."}


def test_load_gives_a_model_that_is_ready(tiny_model_dir):
    loaded = models.load(tiny_model_dir, device="cpu")
    assert not loaded.model.training and loaded.device.type == "cpu" and loaded.dtype == torch.float32
    assert loaded.processor.chat_template and loaded.path == str(tiny_model_dir)
    models.check(tiny_model_dir)


def test_a_directory_loads_without_a_bar(tiny_models, capsys):
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
    try:
        models.load(tiny_models("qwen2_5_vl"), device="cpu")
        assert "Loading weights" not in capsys.readouterr().err
        assert logging.is_progress_bar_enabled(), "others' bars stay as they were"
        with models.no_bars("some/hub-id"):
            assert logging.is_progress_bar_enabled()
    finally:
        if not before:
            logging.disable_progress_bar()


def test_dtype_is_honoured_and_pictures_follow_it(tiny_models):
    loaded = models.load(tiny_models("llava"), dtype="bfloat16", device="cpu")
    assert loaded.dtype == torch.bfloat16
    batch = loaded.to_device({"pixel_values": torch.ones(1), "input_ids": torch.ones(1, dtype=torch.int64), "x": "y"})
    assert batch["pixel_values"].dtype == torch.bfloat16 and batch["input_ids"].dtype == torch.int64
    with pytest.raises(LeamlError, match="did you mean 'bfloat16'"):
        models.load(tiny_models("llava"), dtype="bloat16")


def test_processor_options_reach_the_processor(tiny_models):
    loaded = models.load(tiny_models("qwen2_5_vl"), device="cpu", processor_options={"max_pixels": 28 * 28 * 4})
    assert loaded.processor.image_processor.size["longest_edge"] == 28 * 28 * 4


def test_target_linears_are_the_language_models(tiny_model_dir):
    model = models.load(tiny_model_dir, device="cpu").model
    linears = models.target_linears(model)
    prefix = LANGUAGE[tiny_model_dir.name]
    want = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith(prefix)}
    assert set(linears) == want and len(want) == 14  # 2 layers of q, k, v, o, gate, up, down
    assert all(linears[n] is model.get_submodule(n) for n in linears)


def test_a_pattern_chooses_among_all_layers_but_the_head(tiny_models):
    model = models.load(tiny_models("qwen2_5_vl"), device="cpu").model
    assert all("visual" in n for n in models.target_linears(model, r"visual\.blocks.*mlp"))
    assert "lm_head" not in models.target_linears(model, ".")
    with pytest.raises(LeamlError, match=r"matches 'attention'.*q_proj|matches 'attention'"):
        models.target_linears(model, "attention")
    with pytest.raises(LeamlError, match="no regular expression"):
        models.target_linears(model, "(")


def test_ffn_groups_are_whole_blocks(tiny_model_dir):
    model = models.load(tiny_model_dir, device="cpu").model
    groups = models.ffn_groups(model)
    assert len(groups) == 2
    for gate, up, down in groups:
        units = model.get_submodule(down).in_features
        assert model.get_submodule(gate).out_features == model.get_submodule(up).out_features == units
    with pytest.raises(LeamlError, match="granularity 'row'"):
        models.ffn_groups(nn.Sequential(nn.Linear(2, 2)))


def test_targets_are_checked_without_weights(tiny_model_dir, copied_config):
    """A directory that has no weights at all is enough."""
    models.check_targets(copied_config, [r"q_proj$"], ffn=True)
    with pytest.raises(LeamlError, match="matches 'nothing'"):
        models.check_targets(copied_config, [r"q_proj$", "nothing"])


@pytest.fixture
def copied_config(tiny_model_dir, tmp_path):
    import shutil

    shutil.copy(tiny_model_dir / "config.json", tmp_path)
    return tmp_path


def test_save_and_load_again(tiny_model_dir, tmp_path):
    loaded = models.load(tiny_model_dir, device="cpu")
    models.save(loaded.model, loaded.processor, tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    again = models.load(tmp_path, device="cpu")
    for (name, a), b in zip(loaded.model.state_dict().items(), again.model.state_dict().values()):
        assert torch.equal(a, b), name
    assert again.processor.chat_template == loaded.processor.chat_template


def test_fingerprint_follows_content_not_place(tiny_models, tmp_path):
    source = tiny_models("llava")
    copy = shutil.copytree(source, tmp_path / "copy")
    assert models.fingerprint(source) == models.fingerprint(copy)
    (copy / "generation_config.json").write_text("{}")
    assert models.fingerprint(source) != models.fingerprint(copy)


def test_a_lora_adapter_is_loaded(tiny_model_dir, tmp_path):
    from peft import LoraConfig, get_peft_model

    loaded = models.load(tiny_model_dir, device="cpu")
    names = list(models.target_linears(loaded.model))
    peft_model = get_peft_model(loaded.model, LoraConfig(r=2, target_modules=names, init_lora_weights=False))
    peft_model.save_pretrained(tmp_path)
    again = models.load(tiny_model_dir, device="cpu", adapter=tmp_path)
    want, got = peft_model.state_dict(), again.model.state_dict()
    assert want.keys() == got.keys() and all(torch.equal(want[k], got[k]) for k in want)
    assert any("lora_A" in k for k in want)
    assert all("lora_" not in n for n in models.target_linears(again.model))


@pytest.fixture
def copied(tiny_models, tmp_path):
    return shutil.copytree(tiny_models("llava"), tmp_path / "model")


def _edit(path, **values):
    data = json.loads(path.read_text())
    data.update(values)
    path.write_text(json.dumps(data))


def _break(directory, how):
    if how == "no config":
        (directory / "config.json").unlink()
    elif how == "adapter":
        (directory / "config.json").rename(directory / "adapter_config.json")
    elif how == "text model":
        _edit(directory / "config.json", model_type="llama", architectures=["LlamaForCausalLM"])
    elif how == "unknown":
        _edit(directory / "config.json", model_type="nonesuch")
    elif how == "pickle":
        (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    elif how == "no weights":
        (directory / "model.safetensors").unlink()
    elif how == "no template":
        (directory / "chat_template.jinja").unlink()
    elif how == "no processor":
        for name in ("processor_config.json", "tokenizer_config.json", "tokenizer.json"):
            (directory / name).unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("no config", "config.json is missing"),
        ("adapter", "is an adapter, not a model"),
        ("text model", "is a llama model, which takes no pictures"),
        ("unknown", "does not know this model"),
        ("pickle", "convert them to safetensors"),
        ("no weights", "has no weights"),
        ("no template", "no chat template"),
        ("no processor", "processor"),
    ],
)
def test_what_is_no_model_is_told_before_any_weight_is_read(copied, how, words):
    _break(copied, how)
    for attempt in (models.check, models.load):
        with pytest.raises(LeamlError, match=words) as error:
            attempt(copied)
        assert str(copied) in str(error.value) and "\n" not in str(error.value)


def test_an_incomplete_checkpoint_is_refused(copied):
    from safetensors.torch import load_file, save_file

    tensors = load_file(copied / "model.safetensors")
    tensors.pop(next(k for k in sorted(tensors) if "q_proj" in k))
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LeamlError, match="lacks 1 tensors"):
        models.load(copied, device="cpu")


def test_truncated_weights_are_one_sentence(copied):
    data = (copied / "model.safetensors").read_bytes()
    (copied / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(LeamlError, match="weights cannot be loaded"):
        models.load(copied, device="cpu")


@pytest.mark.parametrize("path", ["/nowhere/model", "./nowhere", "a/b/c", "nobody/none", "none"])
def test_a_path_that_does_not_exist(path):
    with pytest.raises(LeamlError, match=r"no such model directory|neither a model directory"):
        models.load(path)
    if path.count("/") == 1:
        with pytest.raises(LeamlError):
            models.fingerprint(path)


def test_bad_adapters_are_one_sentence(tiny_models, tmp_path):
    llava = tiny_models("llava")
    with pytest.raises(LeamlError, match="no such adapter directory"):
        models.load(llava, device="cpu", adapter=tmp_path / "none")
    with pytest.raises(LeamlError, match=r"adapter_config.json is missing"):
        models.load(llava, device="cpu", adapter=tmp_path)
    from peft import LoraConfig, get_peft_model

    qwen = models.load(tiny_models("qwen2_5_vl"), device="cpu").model
    config = LoraConfig(r=2, target_modules=list(models.target_linears(qwen, "visual")))
    get_peft_model(qwen, config).save_pretrained(tmp_path)
    with pytest.raises(LeamlError, match="does not fit this model"):
        models.load(llava, device="cpu", adapter=tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(LeamlError, match=r"adapter_model.safetensors is missing"):
        models.load(llava, device="cpu", adapter=tmp_path)


def test_a_device_that_is_not_here(tiny_models):
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(LeamlError, match="device 'cuda' cannot be used"):
        models.load(tiny_models("llava"), device="cuda")
