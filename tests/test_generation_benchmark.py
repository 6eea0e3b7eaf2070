"""The benchmark of pseudo-QA generation runs, and its contenders write the same texts."""

from __future__ import annotations

import json

import pytest

from leaml_plugin import cli
from leaml_plugin.benchmark import generate


def test_it_compares_what_writes_the_same(tmp_path, capsys):
    options = ["--pictures", "4", "--samples", "1", "3", "--batch-size", "6", "--new-tokens", "5", "--pairs", "3"]
    path = tmp_path / "out" / "generate.json"
    assert cli.main(["bench", "generate", *options, "--device", "cpu", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())
    assert [(row["workload"], row["samples"]) for row in rows] == [
        ("even", 1),
        ("even", 3),
        ("ragged", 1),
        ("ragged", 3),
    ]
    for row in rows:
        assert set(row["ratio"]) == {generate.LOOP, generate.BATCHES} and min(row["ratio"].values()) > 0
        # five tokens of four pictures: rounding turns no tie
        assert set(row["equal_texts"].values()) == {1.0}
        assert row["clock"] == "process CPU time" and row["machine"]["cores"]
    assert "ragged  3 sample(s)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pairs", "2"], "at least 3"),
        (["--workloads", "raged"], "did you mean 'ragged'"),
        (["--samples", "0"], "numbers from 1"),
        (["--pictures", "0"], "pictures is 0"),
    ],
)
def test_bad_options(options, message, capsys):
    assert cli.main(["bench", "generate", *options]) == 2
    assert message in capsys.readouterr().err
