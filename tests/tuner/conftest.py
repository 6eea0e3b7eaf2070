"""Fixtures of the adapter tests: the tiny Llama's directories, a batch, selections from its own relevance."""

from __future__ import annotations

import pytest
import torch
from tiny_llama import build, score

from leaml_plugin import Selection


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> str:
    return build(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def base_bf16(tmp_path_factory) -> str:
    return build(tmp_path_factory.mktemp("models") / "llama-bf16", dtype=torch.bfloat16)


@pytest.fixture(scope="session")
def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 64, (3, 12), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


@pytest.fixture(scope="session")
def selection(base, batch) -> Selection:
    return score(base, batch)


@pytest.fixture(scope="session")
def ffn_selection(base, batch) -> Selection:
    return score(base, batch, granularity="ffn")
