"""Adapter path = in-place path; adapter = merged = reloaded = LoRA-exported, each by its logits."""

from __future__ import annotations

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_llama import build, load, logits, score, train

from leaml_plugin import LeamlConfig, LeamlError, attach
from leaml_plugin.selection import all_neurons, linears
from leaml_plugin.tuner import (
    apply_delta,
    delta_between,
    diff,
    export_lora,
    load_delta,
    max_logit_difference,
    merge,
    probe,
    save_adapter,
    selection_of,
)
from leaml_plugin.tuner.convert import load_model


def in_place(base, chosen, batch, steps: int = 5):
    """A model tuned in place, with its handle."""
    model = load(base)
    handle = attach(model, chosen)
    train(model, handle.parameters(), batch, steps)
    return model, handle


@pytest.fixture(scope="module", params=["row", "ffn"])
def chosen(request, selection, ffn_selection):
    return selection if request.param == "row" else ffn_selection


@pytest.fixture
def adapter(base, chosen, batch, tmp_path) -> str:
    _, handle = in_place(base, chosen, batch)
    return str(save_adapter(handle, tmp_path / "adapter"))


def test_both_paths_give_the_same_weights(base, chosen, batch):
    """Same neurons, optimizer and steps: tuned in place, and as an adapter that is merged. fp32, to 1e-6."""
    tuned, handle = in_place(base, chosen, batch, steps=10)
    handle.detach()
    adapted = get_peft_model(load(base), LeamlConfig(selection=chosen))
    train(adapted, [p for p in adapted.parameters() if p.requires_grad], batch, steps=10)
    merged = adapted.merge_and_unload()
    start = load(base).state_dict()
    theirs = merged.state_dict()
    moved = 0.0
    for name, value in tuned.state_dict().items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=1e-6)
        moved = max(moved, float((value - start[name]).abs().max()))
    assert moved > 0.01


@pytest.mark.parametrize("detached", [False, True])
def test_save_adapter_from_the_in_place_path(base, chosen, batch, tmp_path, detached):
    model, handle = in_place(base, chosen, batch)
    want = logits(model, batch)
    if detached:
        handle.detach()
    save_adapter(handle, tmp_path)
    again = PeftModel.from_pretrained(load(base), tmp_path)
    torch.testing.assert_close(logits(again, batch), want, rtol=1e-5, atol=1e-5)
    found = selection_of(tmp_path)
    assert found.jaccard(chosen) == 1 and found.validate(load(base), same_base=True)
    assert "import leaml_plugin.tuner" in (tmp_path / "README.md").read_text()
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == base and config["criterion"] == "taylor_abs"
    assert config["row_counts"] | config["column_counts"] == chosen.counts()


def test_auto_peft_model_finds_the_base(adapter, batch, base):
    model = AutoPeftModelForCausalLM.from_pretrained(adapter)
    torch.testing.assert_close(logits(model, batch), logits(PeftModel.from_pretrained(load(base), adapter), batch))


def test_saved_bytes_do_not_depend_on_the_run(base, selection, batch, tmp_path):
    for name in ("a", "b"):
        save_adapter(in_place(base, selection, batch)[1], tmp_path / name)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_in_place_merged_adapter_and_reloaded_agree(base, base_bf16, batch, tmp_path, dtype):
    path = base if dtype == "fp32" else base_bf16
    chosen = score(path, batch)
    model, handle = in_place(path, chosen, batch)
    handle.detach()
    save_adapter(handle, tmp_path / "adapter")
    assert merge(path, tmp_path / "adapter", tmp_path / "merged") < (1e-5 if dtype == "fp32" else 0.1)
    merged = load(str(tmp_path / "merged"))
    # the merged weights are the trained ones: bit for bit where rounding to bf16 hides the last fp32 bit
    for name, value in model.state_dict().items():
        other = merged.state_dict()[name]
        assert value.dtype == other.dtype
        if dtype == "bf16":
            assert torch.equal(value, other), name
        else:
            torch.testing.assert_close(value, other, rtol=0, atol=1e-7)


@pytest.mark.parametrize("uniform", [False, True])
def test_lora_export_is_exact(base, adapter, batch, tmp_path, uniform):
    assert export_lora(adapter, tmp_path / "lora", uniform=uniform, base=base) < 1e-5
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["base_model_name_or_path"] == base
    ours = logits(PeftModel.from_pretrained(load(base), adapter), batch)
    lora = PeftModel.from_pretrained(load(base), tmp_path / "lora")
    torch.testing.assert_close(logits(lora, batch), ours, rtol=1e-5, atol=1e-5)
    assert (ours - logits(load(base), batch)).abs().max() > 0.01
    ranks = {m.r["default"] for m in lora.modules() if hasattr(m, "lora_A")}
    counts = {len(index) for _, index, _ in load_delta(adapter)[0].values()}
    assert ranks == ({max(counts)} if uniform else counts)


def test_diff_finds_what_was_tuned(base, chosen, batch, tmp_path):
    model, handle = in_place(base, chosen, batch)
    handle.detach()
    model.save_pretrained(tmp_path / "tuned")
    assert diff(base, tmp_path / "tuned", tmp_path / "adapter") < 1e-5
    found, _ = load_delta(tmp_path / "adapter")
    assert {n: len(e[1]) for n, e in found.items()} == chosen.counts()
    for name, (axis, index, values) in handle.delta().items():
        assert found[name][0] == axis and torch.equal(found[name][1], index)
        torch.testing.assert_close(found[name][2], values, rtol=0, atol=1e-7)


def test_diff_of_dense_training_and_of_other_parameters(base, batch, tmp_path):
    before, after = load(base), load(base)
    handle = attach(after, all_neurons(linears(after, ["q_proj"])))
    train(after, handle.parameters(), batch, steps=1)
    handle.detach()
    assert {n: len(e[1]) for n, e in delta_between(before, after).items()} == {
        f"model.layers.{i}.self_attn.q_proj": 32 for i in range(2)
    }
    after.model.norm.weight.data += 1
    with pytest.raises(LeamlError, match=r"1 parameters differ .* model.norm.weight"):
        delta_between(before, after)
    assert len(delta_between(before, after, ignore_others=True)) == 2
    with pytest.raises(LeamlError, match="nothing to store"):
        delta_between(before, load(base))
    with pytest.raises(LeamlError, match="different make"):
        delta_between(before, load(build(tmp_path / "wide", intermediate_size=64)))


def test_merge_takes_lora_too(base, tmp_path):
    model = get_peft_model(load(base), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "lora")
    assert merge(base, tmp_path / "lora", tmp_path / "merged") < 1e-5
    assert max_logit_difference(load(base), load(str(tmp_path / "merged"))) > 1e-3


def test_bf16_storage_halves_the_file(base, selection, batch, tmp_path):
    _, handle = in_place(base, selection, batch)
    sizes = []
    for dtype in (torch.float32, torch.bfloat16):
        out = save_adapter(handle, tmp_path / str(dtype), dtype=dtype)
        sizes.append(sum(t.nbytes for k, t in load_file(out / "adapter_model.safetensors").items() if "delta" in k))
    assert sizes[0] == 2 * sizes[1]
    PeftModel.from_pretrained(load(base), out)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava", "idefics3"])
def test_merge_and_diff_of_image_text_models(tiny_models, name, tmp_path):
    base = tiny_models(name)
    model = load_model(base)
    targets = linears(model, r".*language_model.*_proj|.*text_model.*_proj")
    handle = attach(model, all_neurons(targets))
    inputs = probe(model)
    train(model, handle.parameters(), {**inputs, "labels": inputs["input_ids"]}, steps=1)
    save_adapter(handle, tmp_path / "adapter")
    assert merge(base, tmp_path / "adapter", tmp_path / "merged") < 1e-4
    assert diff(base, tmp_path / "merged", tmp_path / "back") < 1e-4
    from transformers import AutoProcessor

    AutoProcessor.from_pretrained(tmp_path / "merged")


# -- bad input


def test_bad_input_is_one_sentence(base, selection, batch, tmp_path):
    adapter = save_adapter(in_place(base, selection, batch)[1], tmp_path / "adapter")
    twin = build(tmp_path / "twin", seed=1)
    wide = build(tmp_path / "wide", intermediate_size=64)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    delta, config = load_delta(adapter)
    nan = {n: (a, i, v * float("nan")) for n, (a, i, v) in delta.items()}
    for action, sentence in [
        (lambda: merge(twin, adapter, tmp_path / "out"), "another base model"),
        (lambda: merge(wide, adapter, tmp_path / "out"), "another base model"),
        (lambda: apply_delta(load(twin), delta, base=config.base), "another base model"),
        (lambda: apply_delta(load(wide), delta), "another base model"),
        (lambda: merge(base, adapter, tmp_path / "full"), "not empty"),
        (lambda: merge(base, tmp_path / "none", tmp_path / "out"), "adapter_config.json is missing"),
        (lambda: merge(tmp_path / "none", adapter, tmp_path / "out"), "cannot be loaded as a transformers model"),
        (lambda: save_adapter({}, tmp_path / "out"), "nothing to save"),
        (lambda: save_adapter(nan, tmp_path / "out", model=load(base)), "training diverged"),
    ]:
        with pytest.raises(LeamlError, match=sentence) as caught:
            action()
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()


def test_damaged_adapters_are_named(adapter, tmp_path, base):
    from pathlib import Path

    source = Path(adapter)
    weights = load_file(source / "adapter_model.safetensors")
    key = next(k for k in weights if k.endswith("leaml_index"))
    for change, sentence in [
        (lambda t: t.pop(key), "the file is incomplete"),
        (lambda t: t.update({key: t[key][:-1].clone()}), "its configuration says"),
        (lambda t: t[key].fill_(10_000), "out of range"),
    ]:
        tensors = {k: v.clone() for k, v in weights.items()}
        change(tensors)
        (tmp_path / "adapter_config.json").write_text((source / "adapter_config.json").read_text())
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        with pytest.raises(LeamlError, match=sentence):
            load_delta(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"junk")
    with pytest.raises(LeamlError, match="cannot be read"):
        load_delta(tmp_path)
    lora = get_peft_model(load(base), LoraConfig(r=2, target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path / "lora")
    with pytest.raises(LeamlError, match="is a LORA adapter, wanted a LEAML one"):
        load_delta(tmp_path / "lora")
