"""Runs for the report's tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from leaml_plugin.artifacts import RunDirectory

sys.path.insert(0, str(Path(__file__).parent))  # tests import report_runs, report_pages and report_browser by name
from report_runs import MakeRun


@pytest.fixture
def make_run(tmp_path) -> MakeRun:
    return MakeRun(tmp_path)


@pytest.fixture(scope="module")
def shared_run(tmp_path_factory) -> RunDirectory:
    """A finished run with everything in it, its report written. Read only."""
    from leaml_plugin.report import write_report

    stages = ("inputs", "caption", "relevance", "train_generator", "generate", "filter", "finetune", "evaluate")
    run = MakeRun(tmp_path_factory.mktemp("shared"))(stages=stages)
    write_report(run)
    return run
