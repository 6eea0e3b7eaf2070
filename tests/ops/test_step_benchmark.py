"""The step benchmark counts bytes exactly and writes a row for each contender and size. Its times are not tested."""

from __future__ import annotations

import json

import pytest
import torch

from leaml_plugin import LeamlError
from leaml_plugin.benchmark import step


def test_bytes_are_proportional_to_what_is_trained(tmp_path, native):
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib (pip install leaml_plugin[report])")
    config = step.Config(
        densities=(0.1, 0.2), batch=1, text=8, image=28, device="cpu", pairs=3, memory=False,
        json=tmp_path / "rows.json",
        plot=tmp_path / "cost.svg",
    )  # fmt: skip
    rows = step.run(config, ["tiny"])
    written = json.loads((tmp_path / "rows.json").read_text())
    assert written[0]["size"] == "tiny"
    for row, kept in zip(rows, written):
        assert row.spread.keys() == ({"full", "lora"} if row.name.startswith("selective") else {"full"})
        for peer, (low, high) in row.spread.items():
            assert low <= getattr(row, f"ratio_to_{peer}") <= high
            assert kept["spread"][peer] == [low, high] and f"[{low:.2f}-{high:.2f}]" in step.line(row)
    assert "density" in (tmp_path / "cost.svg").read_text()
    by_name = {row.name: row for row in rows}
    assert list(by_name) == ["full", "lora@0.1", "selective@0.1", "lora@0.2", "selective@0.2"]
    for row in rows:
        assert row.gradient_bytes == 4 * row.trainable
        counters = row.state_bytes - 8 * row.trainable  # beside the two moments: a step count a row or a tensor
        assert 0 < counters < 0.02 * row.state_bytes + 4096
    half, whole = by_name["selective@0.1"], by_name["selective@0.2"]
    assert abs(2 * half.trainable - whole.trainable) < 0.02 * whole.trainable


def test_bad_options_are_named():
    with pytest.raises(LeamlError, match="did you mean 'tiny'"):
        step.run(step.Config(), ["tyny"])
    with pytest.raises(LeamlError, match="a multiple of 28"):
        step.run(step.Config(image=30))


@pytest.mark.slow
def test_the_peak_is_the_contenders_own():
    held = torch.ones(400 * 2**20)  # 1.6 GB in this process, which a child's ru_maxrss would begin with
    config = step.Config(size="tiny", batch=1, text=8, image=28, device="cpu")
    assert 50 * 2**20 < step.peak_memory(config, "full") < held.numel() * held.element_size()
