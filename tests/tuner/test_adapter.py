"""LEAML inside PEFT: everything that PEFT's own tuners can do, on a tiny Llama and on odd layers."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from tiny_llama import build, load, logits, score, train
from torch import nn
from transformers.pytorch_utils import Conv1D

from leaml_plugin import LeamlConfig, LeamlError, Selection, attach
from leaml_plugin.tuner import LeamlLayer, hotswap
from leaml_plugin.tuner.register import add_member, register


def adapted(base: str, chosen: Selection, **options):
    return get_peft_model(load(base), LeamlConfig(selection=chosen, task_type="CAUSAL_LM", **options))


@pytest.fixture(scope="module")
def saved(base, selection, batch, tmp_path_factory):
    """A trained adapter's directory and its logits."""
    model = adapted(base, selection)
    first = logits(model, batch)
    train(model, [p for p in model.parameters() if p.requires_grad], batch)
    out = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(out)
    want = logits(model, batch)
    assert (want - first).abs().max() > 0.01
    return out, want


# -- registration


def test_the_peft_type_is_a_real_member():
    assert PeftType.LEAML is PeftType("LEAML") is PeftType["LEAML"] is add_member("LEAML")
    assert PeftType.LEAML in list(PeftType) and "LEAML" in list(PeftType) and PeftType.LEAML.value == "LEAML"
    assert pickle.loads(pickle.dumps(PeftType.LEAML)) is PeftType.LEAML
    assert copy.deepcopy(PeftType.LEAML) is PeftType.LEAML
    assert json.dumps({"peft_type": PeftType.LEAML}) == '{"peft_type": "LEAML"}'
    register()  # twice is once


def test_config_pickles_and_copies(selection):
    config = LeamlConfig(selection=selection)
    for other in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):
        assert other.row_counts == config.row_counts and other._selection.jaccard(selection) == 1


def test_config_survives_its_file(selection, tmp_path):
    config = LeamlConfig(selection=selection, modules_to_save=["lm_head"], base_model_name_or_path="x")
    config.save_pretrained(tmp_path)
    again = PeftConfig.from_pretrained(tmp_path)
    assert type(again) is LeamlConfig and again.to_dict() == config.to_dict()


# -- training, saving, loading


def test_only_the_deltas_train(base, selection, batch):
    model = adapted(base, selection)
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(".leaml_delta.default" in n for n in trainable)
    shapes = {n.split(".leaml_delta")[0].removeprefix("base_model.model."): p.shape for n, p in trainable.items()}
    assert {n: s[0] for n, s in shapes.items()} == selection.counts()
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    torch.testing.assert_close(logits(model, batch), logits(load(base), batch), rtol=0, atol=0)
    train(model, trainable.values(), batch)
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("trainable", [False, True])
def test_from_pretrained(base, saved, batch, low_cpu_mem_usage, trainable):
    path, want = saved
    model = PeftModel.from_pretrained(load(base), path, is_trainable=trainable, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(model, batch), want)
    assert any(p.requires_grad for p in model.parameters()) == trainable
    assert not any(p.device.type == "meta" for p in model.parameters())


def test_auto_peft_model(saved, batch):
    path, want = saved
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(path), batch), want)


def test_transformers_load_adapter(base, saved, batch):
    path, want = saved
    model = load(base)
    before = logits(model, batch)
    model.load_adapter(str(path))
    assert torch.equal(logits(model, batch), want)
    model.disable_adapters()
    assert torch.equal(logits(model, batch), before)
    model.enable_adapters()
    model.delete_adapter("default")
    assert torch.equal(logits(model, batch), before)


def test_what_is_in_the_files(saved, selection):
    path, _ = saved
    tensors = load_file(path / "adapter_model.safetensors")
    assert {k.rsplit(".", 1)[1] for k in tensors} == {"leaml_delta", "leaml_index"}
    name = "model.layers.1.mlp.up_proj"
    assert torch.equal(tensors[f"base_model.model.{name}.leaml_index"], selection.rows[name])
    config = json.loads((path / "adapter_config.json").read_text())
    assert config["row_counts"] == selection.counts() and config["sizes"][name] == 48 and len(config["base"]) == 10


@pytest.mark.slow
def test_a_process_that_imports_us_can_load(base, saved):
    path, _ = saved
    code = (
        "import sys, leaml_plugin.tuner; from peft import AutoPeftModelForCausalLM as A;"
        f"m = A.from_pretrained({str(path)!r}); print(sum('leaml_delta' in n for n, _ in m.named_parameters()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "10"


# -- several adapters


def test_several_adapters(base, selection, saved, batch):
    path, want = saved
    model = PeftModel.from_pretrained(load(base), path)
    plain = logits(load(base), batch)
    model.add_adapter("other", LeamlConfig(target_modules=["q_proj"], density=0.2, init_weights=False))
    assert torch.equal(logits(model, batch), want)
    model.set_adapter("other")
    other = logits(model, batch)
    assert not torch.equal(other, want) and not torch.equal(other, plain)
    assert {n.rsplit(".", 1)[1] for n, p in model.named_parameters() if p.requires_grad} == {"other"}
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), plain)
    assert torch.equal(logits(model, batch), other)
    model.base_model.set_adapter(["default", "other"])
    both = logits(model, batch)
    assert not torch.equal(both, other) and not torch.equal(both, want)
    model.set_adapter("default")
    model.load_adapter(path, "third")
    model.set_adapter("third")
    assert torch.equal(logits(model, batch), want)
    model.delete_adapter("other")
    assert not any(".other" in n for n in model.state_dict())
    assert set(get_peft_model_state_dict(model, adapter_name="third")) == set(
        load_file(path / "adapter_model.safetensors")
    )


def test_mixed_batches(base, saved, batch):
    path, want = saved
    model = PeftModel.from_pretrained(load(base), path)
    model.load_adapter(path, "zero")
    for n, p in model.named_parameters():
        if n.endswith("leaml_delta.zero"):
            p.data.mul_(-1)
    model.set_adapter("zero")
    flipped = logits(model, batch)
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        mixed = model(**inputs, adapter_names=["default", "zero", "__base__"]).logits
    torch.testing.assert_close(mixed[0], want[0])
    torch.testing.assert_close(mixed[1], flipped[1])
    torch.testing.assert_close(mixed[2], logits(load(base), batch)[2])
    with pytest.raises(ValueError, match="non-existing adapter"):
        model(**inputs, adapter_names=["default", "zero", "nobody"])
    with pytest.raises(ValueError, match="one adapter per sample"):
        model(**inputs, adapter_names=["default"])
    generated = model.generate(**inputs, adapter_names=["default", "zero", "__base__"], max_new_tokens=3, num_beams=2)
    assert generated.shape[0] == 3


# -- merging


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_and_exact_unmerge(base, base_bf16, batch, selection, ffn_selection, dtype):
    path = base if dtype == torch.float32 else base_bf16
    for chosen in (selection, ffn_selection):
        model = adapted(path, chosen, init_weights=False)
        weights = {n: p.clone() for n, p in model.named_parameters()}
        want = logits(model, batch)
        model.merge_adapter(safe_merge=True)
        merged = logits(model, batch)
        torch.testing.assert_close(merged, want, atol=1e-5 if dtype == torch.float32 else 0.05, rtol=0.05)
        assert not torch.equal(merged, logits(load(path), batch))
        model.unmerge_adapter()
        assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
        plain = model.merge_and_unload()
        assert torch.equal(logits(plain, batch), merged)
        assert not any(isinstance(m, LeamlLayer) for m in plain.modules())


def test_unload_gives_the_base_back(base, saved, batch):
    model = PeftModel.from_pretrained(load(base), saved[0]).unload()
    assert torch.equal(logits(model, batch), logits(load(base), batch))


def test_safe_merge_refuses_nan(base, selection):
    model = adapted(base, selection)
    next(p for p in model.parameters() if p.requires_grad).data[0, 0] = float("nan")
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert all(torch.equal(p.nan_to_num(7.0), before[n].nan_to_num(7.0)) for n, p in model.named_parameters())


# -- other layers and modes


def test_conv1d_equals_linear():
    torch.manual_seed(0)
    conv, linear = nn.Sequential(Conv1D(6, 4)), nn.Sequential(nn.Linear(4, 6))
    linear[0].weight.data, linear[0].bias.data = conv[0].weight.data.t().clone(), conv[0].bias.data.clone()
    x = torch.randn(3, 4)
    for chosen in (
        Selection({"0": torch.tensor([0, 5])}, sizes={"0": 6}),
        Selection({}, {"0": torch.tensor([1, 3])}, sizes={"0": 4}, granularity="ffn"),
    ):
        outputs = []
        for model in (copy.deepcopy(conv), copy.deepcopy(linear)):
            torch.manual_seed(1)
            tuned = get_peft_model(model, LeamlConfig(selection=chosen, init_weights=False))
            outputs.append(tuned(x))
            tuned.merge_adapter()
            torch.testing.assert_close(tuned(x), outputs[-1])
        torch.testing.assert_close(*outputs)


def test_target_patterns_and_random_rows(base):
    model = get_peft_model(load(base), LeamlConfig(target_modules="all-linear", density=0.1, seed=3))
    config = model.peft_config["default"]
    assert len(config.row_counts) == 14 and config.row_counts["model.layers.0.mlp.up_proj"] == 5
    again = get_peft_model(load(base), LeamlConfig(target_modules="all-linear", density=0.1, seed=3))
    a, b = (m.state_dict() for m in (model, again))
    assert all(torch.equal(v, b[k]) for k, v in a.items() if "leaml_index" in k)


def test_modules_to_save(base, selection, batch, tmp_path):
    model = adapted(base, selection, modules_to_save=["lm_head"])
    train(model, [p for p in model.parameters() if p.requires_grad], batch, steps=2)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(load(base), tmp_path), batch), logits(model, batch))


def test_an_opaque_base_is_only_called(selection, base, batch):
    """A base whose weight cannot be read (as when quantised) trains and infers all the same."""

    class Opaque(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.in_features, self.out_features = inner.in_features, inner.out_features
            self.hidden = [inner]
            self.register_buffer("qweight", torch.zeros(1, dtype=torch.uint8))  # packed, as quantisers name it

        def forward(self, x):
            return self.hidden[0](x)

    model = load(base)
    want = logits(adapted(base, selection), batch)
    for name in selection.rows:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, Opaque(model.get_submodule(name)))
    tuned = get_peft_model(model, LeamlConfig(selection=selection))
    assert torch.equal(logits(tuned, batch), want)
    first = train(tuned, [p for p in tuned.parameters() if p.requires_grad], batch, steps=1)
    assert train(tuned, [p for p in tuned.parameters() if p.requires_grad], batch, steps=3) < first


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_base(tmp_path, batch, bits):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    path = build(tmp_path / "base", hidden_size=64, intermediate_size=128)
    chosen = score(path, batch)
    options = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_compute_dtype=torch.float32)

    def quantised():
        return LlamaForCausalLM.from_pretrained(path, quantization_config=options, device_map="cpu")

    model = get_peft_model(quantised(), LeamlConfig(selection=chosen))
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in parameters} == {torch.float32}
    losses = [train(model, parameters, batch, steps=n) for n in (1, 5)]
    assert losses[1] < losses[0]
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(quantised(), tmp_path / "adapter")
    assert torch.equal(logits(again, batch), logits(model, batch))
    with pytest.raises(LeamlError, match="tune it through the adapter"):
        attach(quantised(), chosen)


def test_delta_parameters_are_fp32_beside_a_bf16_base(base_bf16, batch):
    model = adapted(base_bf16, score(base_bf16, batch))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    losses = [train(model, [p for p in model.parameters() if p.requires_grad], batch, steps=n) for n in (1, 6)]
    assert losses[1] < losses[0]


@pytest.mark.slow
def test_under_compile_and_checkpointing(base, selection, batch):
    losses = []
    for mode in ("eager", "compile", "checkpoint"):
        model = adapted(base, selection)
        model.train()
        if mode == "checkpoint":
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable()
        run = torch.compile(model, backend="aot_eager") if mode == "compile" else model
        losses.append(train(run, [p for p in model.parameters() if p.requires_grad], batch, steps=3))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and losses[2] == pytest.approx(losses[0], rel=1e-5)


# -- hot swap


def test_hotswap(base, saved, selection, batch, tmp_path):
    path, want = saved
    smaller = Selection({n: i[:1] for n, i in selection.rows.items() if "layers.0" in n}, sizes=selection.sizes)
    other = adapted(base, smaller, init_weights=False)
    other.save_pretrained(tmp_path / "other")
    model = PeftModel.from_pretrained(load(base), path)
    shapes = {n: p.shape for n, p in model.named_parameters()}
    hotswap(model, tmp_path / "other")
    torch.testing.assert_close(logits(model, batch), logits(other, batch))
    assert {n: p.shape for n, p in model.named_parameters()} == shapes
    model.merge_adapter()
    torch.testing.assert_close(logits(model, batch), logits(other, batch), rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    model.save_pretrained(tmp_path / "swapped")
    again = PeftModel.from_pretrained(load(base), tmp_path / "swapped")
    assert torch.equal(logits(again, batch), logits(model, batch))
    hotswap(model, path)
    torch.testing.assert_close(logits(model, batch), want)
    narrow = PeftModel.from_pretrained(load(base), tmp_path / "other")
    with pytest.raises(LeamlError, match="load it instead"):
        hotswap(narrow, path)
    with pytest.raises(LeamlError, match="no LEAML adapter 'x'"):
        hotswap(model, path, "x")


# -- bad input


def test_an_adapter_for_another_base_is_refused(saved, tmp_path, batch):
    path, _ = saved
    twin = load(build(tmp_path / "twin", seed=1))
    with pytest.raises(LeamlError, match=r"another base model: 10 of 10 target weights differ"):
        PeftModel.from_pretrained(twin, path)
    wider = load(build(tmp_path / "wider", intermediate_size=64))
    with pytest.raises(LeamlError, match=r"has 64 neurons, the adapter was made for 48"):
        PeftModel.from_pretrained(wider, path)
    shallow = load(build(tmp_path / "shallow", num_hidden_layers=1))
    with pytest.raises(LeamlError, match="5 of the 10 modules that the adapter tunes are not in the model"):
        PeftModel.from_pretrained(shallow, path)
    assert not any(isinstance(m, LeamlLayer) for m in shallow.modules())


def test_a_selection_may_come_from_another_model(tmp_path, selection, batch):
    """Relevance is scored on the QA-trained generator; the neurons are then tuned in the base."""
    other = build(tmp_path / "other", seed=5)
    model = adapted(other, selection)
    model.save_pretrained(tmp_path / "adapter")
    PeftModel.from_pretrained(load(other), tmp_path / "adapter")


def test_indices_out_of_range_in_the_file_are_refused(base, saved, tmp_path):
    from safetensors.torch import save_file

    path, _ = saved
    tensors = load_file(path / "adapter_model.safetensors")
    key = next(k for k in tensors if k.endswith("up_proj.leaml_index"))
    tensors[key][-1] = 48
    (tmp_path / "adapter_config.json").write_text((path / "adapter_config.json").read_text())
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(LeamlError, match="tunes neuron 48"):
        PeftModel.from_pretrained(load(base), tmp_path)


@pytest.mark.parametrize(
    "config, sentence",
    [
        (lambda s: LeamlConfig(target_modules=["nothing"]), "Target modules .* not found"),
        (lambda s: LeamlConfig(target_modules=["embed_tokens"]), "is a Embedding; LEAML tunes"),
        (lambda s: LeamlConfig(target_modules=["lm_head"], density=2.0), "density must be"),
        (lambda s: LeamlConfig(selection=3), "must be a Selection"),
        (lambda s: LeamlConfig(selection="/no/such/file"), "no such file"),
        (lambda s: LeamlConfig(selection=Selection({"lm_head": torch.tensor([], dtype=torch.long)})), "empty"),
        (lambda s: LeamlConfig(selection=Selection({"lm_head": torch.tensor([64])})), "out of range, it has 64"),
    ],
)
def test_bad_input_is_one_sentence(base, selection, config, sentence):
    with pytest.raises((LeamlError, ValueError), match=sentence) as caught:
        get_peft_model(load(base), config(selection))
    assert "\n" not in str(caught.value)


def test_tied_embeddings_are_refused(tmp_path):
    tied = load(build(tmp_path / "tied", tie_word_embeddings=True))
    with pytest.raises(LeamlError, match=r"lm_head.weight is tied to model.embed_tokens.weight"):
        get_peft_model(tied, LeamlConfig(target_modules=["lm_head"]))


def test_beside_lora_on_another_model(base, batch):
    """Registering must not disturb PEFT's own methods."""
    model = get_peft_model(load(base), LoraConfig(r=2, target_modules=["q_proj"]))
    assert torch.equal(logits(model, batch), logits(load(base), batch))
