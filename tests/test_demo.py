"""The demo: every method through lmms-eval, a table, a report, and nothing to do the second time."""

import pytest

from leaml_plugin import cli

SMALL = ["--pictures", "60", "--label-fraction", "0.1", "--steps", "3", "--questions", "24"]


@pytest.mark.slow
def test_the_demo_ends_with_a_table_and_a_report_and_repeats_at_once(tmp_path, capsys):
    run = ["demo", "--output", str(tmp_path / "demo"), *SMALL]
    assert cli.main(run) == 0
    out = capsys.readouterr().out
    for method in ("image-blind majority", "zero-shot", "full fine-tuning", "LoRA", "LEAML"):
        assert f"\n{method}" in out
    assert "docs/study.md" in out
    page = (tmp_path / "demo" / "report.html").read_text()
    assert "LEAML" in page
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "demo" / "stages").rglob("*") if p.is_file()}
    assert cli.main(run) == 0
    assert out[out.index("method ") :] == (again := capsys.readouterr().out)[again.index("method ") :]
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "demo" / "stages").rglob("*") if p.is_file()}


def test_the_demo_refuses_another_configuration(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert cli.main(["demo", "--output", str(tmp_path), *SMALL]) == 2
    assert "no run directory" in capsys.readouterr().err
