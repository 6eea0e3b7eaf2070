"""The start-up benchmark measures what it says; how long that takes is no test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from leaml_plugin.lmms import startup

pytest.importorskip("lmms_eval")


def test_both_moments_are_measured(capsys):
    startup.main(["--rounds", "1"])
    report = json.loads(capsys.readouterr().out)
    assert report["hooks_ms"]["median"] > report["line_ms"]["median"] > 0


def test_the_line_is_the_start_up_files():
    hook = (Path(__file__).parents[2] / "leaml_plugin_lmms_eval.pth").read_text()
    line = startup._LINE.split("line = '")[1].split("'\n")[0]
    assert hook.startswith(line + " and ")
