"""A two-layer Llama in a directory, and the few lines that score, train and read it: shared by the adapter tests."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from leaml_plugin import RelevanceScorer, Selection, SparseAdamW, select
from leaml_plugin.selection import linears

TARGETS = r".*\.(q_proj|v_proj|gate_proj|up_proj|down_proj)"


def build(directory, seed: int = 0, dtype: torch.dtype = torch.float32, **options):
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 64,
            "max_position_embeddings": 64,
            "pad_token_id": 0,
            **options,
        }
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(directory)
    return str(directory)


def load(path: str) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(path, dtype="auto").eval()


def score(path: str, batch, density: float = 0.15, granularity: str = "row") -> Selection:
    model = load(path)
    groups = [tuple(f"model.layers.{i}.mlp.{p}_proj" for p in ("gate", "up", "down")) for i in range(2)]
    kwargs = {"granularity": "ffn", "groups": groups} if granularity == "ffn" else {}
    with RelevanceScorer(linears(model, TARGETS), "taylor_abs", freeze=model, **kwargs) as scorer:
        model(**batch).loss.backward()
        scorer.accumulate()
    return select(scorer.scores(), density)


def train(model, parameters, batch, steps: int = 5, **options) -> float:
    """A few steps with SparseAdamW; decay is off, because rows decay and deltas decay towards different things."""
    optimizer = SparseAdamW(parameters, **{"lr": 0.01, "weight_decay": 0.0, "eps": 1e-4, **options})
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.detach())


@torch.no_grad()
def logits(model, batch) -> torch.Tensor:
    model.eval()
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
