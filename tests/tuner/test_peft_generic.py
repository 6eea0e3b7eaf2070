"""What PEFT's own suite asserts of its tuners (its test_custom_models and testing_common), held against ours.

A compact version, on small models of our own: one of Linears, one of Conv1Ds, one with a convolution and a bias-free
head around them, and a tiny Llama; neurons as rows and as columns. What LoRA alone has in PEFT (weighted combination,
other methods mixed in) is refused in words.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from tiny_llama import load
from torch import nn
from transformers.pytorch_utils import Conv1D

from leaml_plugin import LeamlConfig, LeamlError, Selection
from leaml_plugin.tuner import LeamlLayer


class Mlp(nn.Module):
    def __init__(self, kind: str):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 2, 3) if kind == "conv" else None
        width = 2 * 4 * 4 if self.conv is not None else 10
        make = (lambda i, o: Conv1D(o, i)) if kind == "conv1d" else nn.Linear
        self.one = make(width, 20)
        self.norm = nn.LayerNorm(20)
        self.two = make(20, 12)
        self.head = nn.Linear(12, 5, bias=kind != "conv")
        self.is_gradient_checkpointing = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.conv is not None:
            x = self.conv(x.to(self.conv.weight.dtype)).flatten(1)
        x = torch.relu(self.norm(self.one(x.to(self.norm.weight.dtype))))
        return self.head(torch.relu(self.two(x)))


ROWS = Selection({"one": torch.tensor([0, 3, 19]), "two": torch.tensor([5, 6])}, sizes={"one": 20, "two": 12})
COLUMNS = Selection(
    {"one": torch.tensor([1, 2])}, {"two": torch.tensor([1, 2])}, sizes={"one": 20, "two": 20}, granularity="ffn"
)
CHOICES = {"rows": ROWS, "columns": COLUMNS, "random": None}


def settings(choice: str, **options) -> LeamlConfig:
    chosen = CHOICES[choice]
    targets = {"selection": chosen} if chosen is not None else {"target_modules": ["one", "two"], "density": 0.2}
    return LeamlConfig(**targets, **{"init_weights": False, **options})


CASES = [("linear", "rows"), ("linear", "columns"), ("conv1d", "rows"), ("conv1d", "columns"), ("conv", "random")]


@pytest.fixture(params=CASES, ids="-".join)
def case(request) -> tuple[str, str]:
    return request.param


@pytest.fixture
def make(case):
    return lambda: Mlp(case[0]).eval()


@pytest.fixture
def x(make) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (4, 1, 6, 6) if make().conv is not None else (4, 10)
    return torch.randn(shape, generator=generator)


@pytest.fixture
def choice(case) -> str:
    return case[1]


def tuned(make, choice, name: str = "default", **options) -> PeftModel:
    torch.manual_seed(7)
    return get_peft_model(make(), settings(choice, **options), adapter_name=name).eval()


@torch.no_grad()
def out(model, x, **options) -> torch.Tensor:
    return model(x, **options).float()


def step(model, x, times: int = 3) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(times):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


# ------------------------------------------------------------------------------------------ what an adapter does


def test_a_new_adapter_changes_nothing(make, x, choice):
    assert torch.equal(out(tuned(make, choice, init_weights=True), x), out(make(), x))


def test_only_the_adapters_parameters_train(make, x, choice):
    model = tuned(make, choice, init_weights=True)
    before = copy.deepcopy(model.state_dict())
    step(model, x)
    changed = {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])}
    assert changed == {n for n, p in model.named_parameters() if "leaml_delta" in n}
    assert all(p.requires_grad == ("leaml_delta" in n) for n, p in model.named_parameters())
    assert model.get_nb_trainable_parameters()[0] == sum(before[n].numel() for n in changed)


def test_save_and_load(make, x, choice, tmp_path):
    model = tuned(make, choice)
    step(model, x)
    want = out(model, x)
    assert (want - out(make(), x)).abs().max() > 1e-3
    model.save_pretrained(tmp_path / "a")
    for options in ({}, {"low_cpu_mem_usage": True}, {"is_trainable": True}, {"autocast_adapter_dtype": False}):
        again = PeftModel.from_pretrained(make(), tmp_path / "a", **options).eval()
        assert torch.equal(out(again, x), want)
    # saved again: the same bytes
    again.save_pretrained(tmp_path / "b")
    a, b = (tmp_path / d / "adapter_model.safetensors" for d in "ab")
    assert a.read_bytes() == b.read_bytes()
    # nothing but the adapter, and no adapter's name, is in the file
    assert all(".leaml_" in key and "default" not in key for key in load_file(a))


def test_selected_adapters_are_saved_alone(make, choice, tmp_path):
    model = tuned(make, choice)
    model.add_adapter("other", settings(choice))
    model.save_pretrained(tmp_path, selected_adapters=["other"])
    assert (tmp_path / "other" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "adapter_model.safetensors").exists()


def test_state_dict_round_trip(make, x, choice):
    model, other = tuned(make, choice), tuned(make, choice, init_weights=True)
    result = set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    assert not result.unexpected_keys and not any("leaml" in key for key in result.missing_keys)
    assert torch.equal(out(other, x), out(model, x))


def test_injected_without_a_wrapper(make, x, choice):
    torch.manual_seed(7)
    model = inject_adapter_in_model(settings(choice), make())
    assert type(model) is Mlp and torch.equal(out(model, x), out(tuned(make, choice), x))


def test_copies_and_pickles(make, x, choice):
    model = tuned(make, choice)
    assert torch.equal(out(copy.deepcopy(model), x), out(model, x))
    assert torch.equal(out(pickle.loads(pickle.dumps(model)), x), out(model, x))


# ------------------------------------------------------------------------------------------------------- merging


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merge_unmerge_and_unload(make, x, choice, dtype):
    model = tuned(lambda: make().to(dtype), choice)
    base = {n: p.clone() for n, p in model.named_parameters()}
    want = out(model, x)
    tolerance = {"atol": 1e-5 if dtype == torch.float32 else 0.03, "rtol": 1e-3}
    model.merge_adapter(safe_merge=True)
    merged = out(model, x)
    torch.testing.assert_close(merged, want, **tolerance)
    with pytest.warns(UserWarning, match="already merged, nothing to do"):
        model.merge_adapter()
    assert torch.equal(out(model, x), merged), "merging twice is merging once"
    model.unmerge_adapter()
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters())
    assert torch.equal(out(model, x), want)
    whole = model.merge_and_unload()
    assert type(whole) is Mlp and torch.equal(out(whole, x), merged)


def test_unload_and_disabling_give_the_base(make, x, choice):
    model, plain = tuned(make, choice), out(make(), x)
    want = out(model, x)
    with model.disable_adapter():
        assert torch.equal(out(model, x), plain)
        assert not any(p.requires_grad for p in model.parameters())
    assert torch.equal(out(model, x), want)
    model.merge_adapter()
    with model.disable_adapter():  # unmerges, as PEFT's own layers do
        assert torch.equal(out(model, x), plain)
    assert torch.equal(out(model.unload(), x), plain)


def test_several_adapters_merge_and_unmerge(make, x, choice):
    model = tuned(make, choice)
    model.add_adapter("other", settings("random", seed=5))
    model.base_model.set_adapter(["default", "other"])
    both = out(model, x)
    base = {n: p.clone() for n, p in model.named_parameters()}
    model.merge_adapter()
    torch.testing.assert_close(out(model, x), both, atol=1e-5, rtol=1e-4)
    model.unmerge_adapter()
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters())
    model.base_model.set_adapter("other")
    other = out(model, x)
    model.merge_adapter(["other"])
    torch.testing.assert_close(out(model, x), other, atol=1e-5, rtol=1e-4)
    model.unmerge_adapter()
    merged = model.merge_and_unload(adapter_names=["default", "other"])
    torch.testing.assert_close(out(merged, x), both, atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------------------------------------- several adapters


def test_adding_switching_and_deleting(make, x, choice):
    model, plain = tuned(make, choice), out(make(), x)
    first = out(model, x)
    model.add_adapter("other", settings("random", seed=5))
    model.set_adapter("other")
    second = out(model, x)
    assert not torch.equal(second, first) and not torch.equal(second, plain)
    assert {n.split(".")[-1] for n, p in model.named_parameters() if p.requires_grad} == {"other"}
    model.set_adapter("default", inference_mode=True)
    assert torch.equal(out(model, x), first) and not any(p.requires_grad for p in model.parameters())
    model.set_adapter("other")
    model.delete_adapter("default")
    assert torch.equal(out(model, x), second) and "default" not in model.peft_config
    assert not any(".default" in key for key in model.state_dict())
    with pytest.raises(ValueError, match="Adapter default does not exist"):
        model.delete_adapter("default")
    with pytest.raises(ValueError, match="nobody"):
        model.set_adapter("nobody")


def test_deleting_the_active_adapter_leaves_the_base(make, x, choice):
    model = tuned(make, choice)
    model.add_adapter("other", settings("random", seed=5))
    with pytest.warns(UserWarning, match="Adapter default was active which is now deleted"):
        model.delete_adapter("default")
    assert not any(".default" in key for key in model.state_dict()) and torch.isfinite(out(model, x)).all()


def test_mixed_batches(make, x, choice):
    model = tuned(make, choice)
    model.add_adapter("other", settings("random", seed=5))
    rows = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        rows[name] = out(model, x)
    rows["__base__"] = out(make(), x)
    names = ["other", "default", "__base__", "other"]
    mixed = out(model, x, adapter_names=names)
    torch.testing.assert_close(mixed, torch.stack([rows[name][i] for i, name in enumerate(names)]))
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        model(x, adapter_names=names)
    model.eval()
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        model(x, adapter_names=names)


def test_status(make, choice):
    model = tuned(make, choice)
    model.add_adapter("other", settings(choice))
    status = model.get_model_status()
    assert status.peft_types == {"default": "LEAML", "other": "LEAML"}
    assert status.num_adapter_layers == 2 and status.active_adapters == ["default"] and status.enabled
    assert status.requires_grad == {"default": True, "other": False} and status.merged_adapters == []
    layers = model.get_layer_status()
    assert {layer.name for layer in layers} == {"model.one", "model.two"}
    assert all(layer.available_adapters == ["default", "other"] for layer in layers)
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["default"]


def test_modules_to_save_train_and_travel(make, x, choice, tmp_path):
    model = tuned(make, choice, modules_to_save=["head"])
    step(model, x)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make(), tmp_path).eval()
    assert torch.equal(out(again, x), out(model, x))
    with model.disable_adapter():
        assert torch.equal(out(model, x), out(make(), x))


# ---------------------------------------------------------------------------------------------- dtypes and modes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_deltas_are_fp32_unless_asked_otherwise(make, x, choice, dtype, autocast):
    model = get_peft_model(make().to(dtype), settings(choice), autocast_adapter_dtype=autocast)
    kinds = {p.dtype for n, p in model.named_parameters() if "leaml_delta" in n}
    assert kinds == {torch.float32 if autocast else dtype}
    assert model(x).dtype == dtype


def test_low_memory_injection_makes_meta_tensors(make, choice):
    model = get_peft_model(make(), settings(choice), low_cpu_mem_usage=True)
    assert {p.device.type for n, p in model.named_parameters() if "leaml_delta" in n} == {"meta"}


def test_under_autocast_and_compile(make, x, choice):
    model = tuned(make, choice)
    want = out(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(out(model, x), want, atol=0.05, rtol=0.05)
    torch.testing.assert_close(out(torch.compile(model, backend="eager", fullgraph=True), x), want)


def test_llama_generates_and_takes_embeddings(base, selection, batch):
    model = get_peft_model(load(base), LeamlConfig(selection=selection, init_weights=False, task_type="CAUSAL_LM"))
    ids = batch["input_ids"]
    assert model.generate(ids, max_new_tokens=2).shape == (3, 14)
    embedded = model.get_input_embeddings()(ids)
    with torch.no_grad():
        torch.testing.assert_close(model(inputs_embeds=embedded).logits, model(input_ids=ids).logits)
    assert model.active_adapter == "default" and model.peft_type == "LEAML" and hasattr(model, "config")


# --------------------------------------------------------------------------------------------- refused in words


def test_what_lora_alone_can_is_refused(make, choice):
    model = tuned(make, choice)
    model.add_adapter("other", settings(choice))
    with pytest.raises(LeamlError, match="cannot be combined by weights; activate several together"):
        model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "both")
    with pytest.raises(ValueError, match="LEAML"):
        get_peft_model(make(), settings(choice), mixed=True)
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.add_adapter("lora", LoraConfig(r=2, target_modules=["one"]))


def test_two_adapters_training_the_same_whole_module(make, choice):
    model = tuned(make, choice, modules_to_save=["head"])
    model.add_adapter("other", settings(choice, modules_to_save=["head"]))
    assert set(model.base_model.model.head.modules_to_save) == {"default", "other"}


def test_layers_are_ours(make, choice):
    model = tuned(make, choice)
    found = {n for n, m in model.named_modules() if isinstance(m, LeamlLayer)}
    assert found == {"base_model.model.one", "base_model.model.two"}
    assert "leaml." in repr(model)
