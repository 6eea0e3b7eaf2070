"""The table of bytes is what real adapters and optimizers need, and the documentation shows the current one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, ShiraConfig, get_peft_model, get_peft_model_state_dict
from tiny_llama import TARGETS, load

from leaml_plugin import LeamlConfig, SparseAdamW, attach
from leaml_plugin.selection import linears, random_selection
from leaml_plugin.tuner.footprint import footprint, table

DENSITY = 0.15
DOCS = Path(__file__).parents[2] / "docs" / "adapters.md"

# the language model of Qwen2.5-VL-7B: 28 layers, without the head
QWEN_7B = {
    f"{layer}.{name}": shape
    for layer in range(28)
    for name, shape in {
        "q": (3584, 3584),
        "k": (512, 3584),
        "v": (512, 3584),
        "o": (3584, 3584),
        "gate": (18944, 3584),
        "up": (18944, 3584),
        "down": (3584, 18944),
    }.items()
}


def nbytes(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return nbytes(v for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v))


def step(model, parameters, batch, make) -> tuple[int, int]:
    """Bytes of gradients and of optimizer state after one step."""
    parameters = list(parameters)
    optimizer = make(parameters, lr=0.0)
    model(**batch).loss.backward()
    gradients = nbytes(p.grad for p in parameters)
    optimizer.step()
    return gradients, state_bytes(optimizer)


@pytest.fixture(scope="module")
def rows(base):
    """By method, ranks left out of the names."""
    found = footprint(linears(load(base), TARGETS), DENSITY, base_bytes=4)
    return {re.sub(r", (rank|r =) \d+", "", row.method): row for row in found}


def trainable(model) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def test_full_fine_tuning(base, batch, rows):
    model = load(base)
    modules = linears(model, TARGETS)
    for p in model.parameters():
        p.requires_grad_(False)
    weights = [m.weight.requires_grad_(True) for m in modules.values()]
    row = rows["full fine-tuning"]
    assert (row.gradients, row.optimizer) == step(model, weights, batch, torch.optim.AdamW)
    assert row.trainable == sum(w.numel() for w in weights) and row.weights == 0


@pytest.mark.parametrize("method", ["LoRA", "SHiRA"])
def test_rivals(base, batch, rows, method):
    row = rows[method]
    rank = int(re.search(r"\d+", row.method)[0])
    kind = LoraConfig if method == "LoRA" else ShiraConfig
    model = get_peft_model(load(base), kind(r=rank, target_modules=TARGETS))
    parameters = trainable(model)
    assert sum(p.numel() for p in parameters) == row.trainable
    assert (row.gradients, row.optimizer) == step(model, parameters, batch, torch.optim.AdamW)
    assert nbytes(get_peft_model_state_dict(model).values()) == row.file


def test_leaml_adapter(base, batch, rows):
    row = rows["LEAML adapter"]
    model = get_peft_model(load(base), LeamlConfig(target_modules=TARGETS, density=DENSITY))
    parameters = trainable(model)
    assert sum(p.numel() for p in parameters) == row.trainable
    assert (row.gradients, row.optimizer) == step(model, parameters, batch, SparseAdamW)
    assert nbytes(get_peft_model_state_dict(model).values()) == row.file == row.weights


@pytest.mark.parametrize("eight_bit", [False, True])
def test_leaml_in_place(base, batch, rows, selection, eight_bit):
    row = rows["LEAML in place" + ", 8-bit states" * eight_bit]
    model = load(base)
    chosen = random_selection(selection, seed=1)
    handle = attach(model, chosen)
    assert nbytes(handle.parameters()) + nbytes(m.selected_index for m in handle.modules.values()) == row.weights

    def make(parameters, lr):
        return SparseAdamW(parameters, lr=lr, eight_bit=eight_bit)

    assert (row.gradients, row.optimizer) == step(model, handle.parameters(), batch, make)


def test_documentation_shows_this_table():
    text = DOCS.read_text()
    assert table(footprint(QWEN_7B, 0.05)) in text, "run the snippet above the table in docs/adapters.md again"


def test_everything_of_ours_scales_with_density():
    one, two = (footprint(QWEN_7B, d) for d in (0.05, 0.10))
    for a, b in zip(one[3:], two[3:]):
        for name in ("trainable", "file", "weights", "gradients", "optimizer"):
            assert getattr(b, name) / getattr(a, name) == pytest.approx(2.0, rel=0.01)
