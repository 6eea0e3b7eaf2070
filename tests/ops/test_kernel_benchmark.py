"""The kernel benchmark measures what it says and writes the keys that others read. Its times are not tested."""

from __future__ import annotations

import json

import pytest

from leaml_plugin import LeamlError
from leaml_plugin.benchmark import kernels


def test_rows_have_the_promised_keys(tmp_path, native):
    target = tmp_path / "rows.json"
    config = kernels.Config(
        ops=("relevance", "sparse_adamw"), dtypes=("float32",), densities=(0.1,), model="tiny", device="cpu", pairs=3,
        compile=False, peers=("eager",), json=target,
    )  # fmt: skip
    kernels.run(config)
    rows = json.loads(target.read_text())
    assert [row["op"] for row in rows] == ["relevance", "sparse_adamw"]
    for row in rows:
        assert {"op", "dtype", "density", "device", "time_ms", "limit_share", "ratio"} <= set(row)
        assert row["time_ms"] > 0 and row["limit_share"] > 0 and row["ratio"]["eager"] > 0


def test_a_share_scales_the_limit_to_the_bytes_needed():
    times = [{"ours": 2.0, "peer": 6.0, "limit": 4.0}] * 3
    values = kernels.summary(times, limit_bytes=50, measured_bytes=200)
    assert values["ratio"] == {"peer": 3.0}
    assert values["limit_share"] == 0.5  # 50 bytes take 1 ms, we took 2


def test_bad_options_are_named():
    with pytest.raises(LeamlError, match="did you mean 'sparse_adamw'"):
        kernels.run(kernels.Config(ops=("sparse_adam",)))
    with pytest.raises(LeamlError, match="fractions above 0"):
        kernels.run(kernels.Config(densities=(5.0,)))
