"""The start-up benchmark measures what it says; how long that takes is no test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from leaml_plugin.lmms import startup

pytest.importorskip("lmms_eval")


@pytest.mark.slow
def test_all_three_starts_are_measured(capsys):
    startup.main(["--rounds", "1"])
    report = json.loads(capsys.readouterr().out)
    assert {"lmms_eval", "elsewhere", "peft"} < set(report)
    for name in ("lmms_eval", "peft"):
        assert report[name]["clock_ms"]["median"] > report["elsewhere"]["clock_ms"]["median"] > 0
        assert report[name]["processor_ms"]["median"] > 0


def test_the_line_is_the_start_up_files():
    assert (Path(__file__).parents[2] / "leaml_plugin_startup.pth").read_text() == startup._HOOK + "\n"
