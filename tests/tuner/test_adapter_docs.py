"""The Python blocks of docs/adapters.md run in order, as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from tiny_llama import load

DOCS = Path(__file__).parents[2] / "docs" / "adapters.md"


def test_documentation_runs(base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = torch.randint(1, 64, (8, 10), generator=torch.Generator().manual_seed(1))
    names = {
        "model": load(base),
        "base_path": base,
        "load_base": lambda: load(base),
        "loader": [{"input_ids": part, "labels": part} for part in rows.split(2)],
        "dataset": [{"input_ids": row, "labels": row} for row in rows],
    }
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(), flags=re.S)
    assert len(blocks) == 6
    for block in blocks:
        exec(compile(block, "docs/adapters.md", "exec"), names)
    assert max(names["merged"], names["found"], names["lora"]) < 1e-5
    assert (tmp_path / "trainer-adapter" / "adapter_config.json").exists()
    assert "0." in capsys.readouterr().out
