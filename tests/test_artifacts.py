"""Run directories: one configuration each, atomic files, completion that is verified."""

import json
import os
import subprocess
import sys

import pytest

from leaml_plugin import artifacts
from leaml_plugin.artifacts import RunDirectory, StageDirectory, StepLog
from leaml_plugin.errors import LeamlError
from leaml_plugin.records import QA, ImageRef, PseudoQA


def snapshot(path):
    return {p.relative_to(path): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_a_run_is_taken_up_by_the_same_configuration(tmp_path):
    first = RunDirectory.open(tmp_path / "run", {"lr": 1e-4, "stage": {"k": (1, 2)}}, {"labels": "abc"})
    again = RunDirectory.open(tmp_path / "run", {"lr": 1e-4, "stage": {"k": (1, 2)}}, {"labels": "abc"})
    assert first.key == again.key


@pytest.mark.parametrize(
    ("config", "inputs", "names"),
    [
        ({"lr": 2e-4, "stage": {"k": 1}}, {"labels": "abc"}, "lr is 0.0001 there and 0.0002 here"),
        ({"lr": 1e-4, "stage": {"k": 3}}, {"labels": "abc"}, "stage.k is 1 there and 3 here"),
        ({"lr": 1e-4, "stage": {"k": 1}}, {"labels": "xyz"}, 'labels is "abc" there and "xyz" here'),
    ],
)
def test_another_configuration_is_refused_and_nothing_is_touched(tmp_path, config, inputs, names):
    run = RunDirectory.open(tmp_path, {"lr": 1e-4, "stage": {"k": 1}}, {"labels": "abc"})
    run.stage("relevance").file("scores").write_text("1")
    before = snapshot(tmp_path)
    with pytest.raises(LeamlError, match="another configuration") as caught:
        RunDirectory.open(tmp_path, config, inputs)
    assert names in str(caught.value)
    assert snapshot(tmp_path) == before


def test_a_run_that_has_written_nothing_may_be_corrected(tmp_path):
    run = RunDirectory.open(tmp_path, {"targets": "wrong"}, {})
    run.stage("inputs").file("labels.jsonl").write_text("{}")
    run = RunDirectory.open(tmp_path, {"targets": "right"}, {})
    run.stage("relevance").file("scores").write_text("1")
    with pytest.raises(LeamlError, match="another configuration"):
        RunDirectory.open(tmp_path, {"targets": "wrong"}, {})


def test_a_directory_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(LeamlError, match="no run directory"):
        RunDirectory.open(tmp_path, {}, {})
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(LeamlError, match="no run directory"):
        RunDirectory.open(file, {}, {})


def test_a_refused_check_leaves_nothing_behind(tmp_path):
    def check():
        raise LeamlError("picture missing")

    with pytest.raises(LeamlError, match="picture missing"):
        RunDirectory.open(tmp_path / "run", {}, {}, check)
    assert not (tmp_path / "run").exists()
    RunDirectory.open(tmp_path / "run", {}, {})
    RunDirectory.open(tmp_path / "run", {}, {}, check)  # a run that is taken up was checked before


def test_done_only_after_finish_and_only_with_the_files_as_they_were(tmp_path):
    stage = StageDirectory(tmp_path / "relevance", "key")
    assert not stage.done
    stage.file("scores/a.bin").write_bytes(b"0123456789")
    (stage.work / "checkpoint").write_text("big")
    stage.finish()
    assert stage.done
    assert not (tmp_path / "relevance" / "work").exists()
    with pytest.raises(LeamlError, match="another configuration"):
        _ = StageDirectory(tmp_path / "relevance", "other key").done
    stage.file("scores/a.bin").write_bytes(b"0123456780")
    with pytest.raises(LeamlError, match=r"a\.bin is not the file that the stage 'relevance' wrote"):
        _ = stage.done
    os.remove(stage.file("scores/a.bin"))
    with pytest.raises(LeamlError, match="missing, truncated or edited"):
        _ = stage.done


def test_atomic_path_keeps_the_old_file_when_writing_fails(tmp_path):
    target = tmp_path / "a.txt"
    artifacts.write_text(target, "old")
    with pytest.raises(RuntimeError), artifacts.atomic_path(target) as temporary:
        temporary.write_text("half of the new")
        raise RuntimeError("disk full")
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_atomic_directory_replaces_whole_or_not_at_all(tmp_path):
    target = tmp_path / "adapter"
    with artifacts.atomic_directory(target) as temporary:
        (temporary / "old").write_text("1")
    with pytest.raises(RuntimeError), artifacts.atomic_directory(target) as temporary:
        (temporary / "new").write_text("2")
        raise RuntimeError
    assert [p.name for p in target.iterdir()] == ["old"]


def test_records_round_trip_and_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "part.jsonl"
    pairs = [
        PseudoQA("p1", (ImageRef("/a.png"), ImageRef("/b.png")), 0, "Question: ü\nAnswer: <b>", "ü", "<b>", -0.25),
        PseudoQA("p2", (ImageRef("/a.png"),), 1, "", reason="malformed"),
    ]
    artifacts.write_records(path, pairs)
    assert list(artifacts.read_records(path, PseudoQA)) == pairs
    with open(path, "a") as f:
        f.write('{"picture_id": "p3"')
    with pytest.raises(LeamlError, match=r"part\.jsonl line 3 is damaged"):
        list(artifacts.read_records(path, PseudoQA))
    qa = QA("1", (), "q", "a", "train.jsonl line 1", {"template": "t"})
    artifacts.write_records(path, [qa])
    assert list(artifacts.read_records(path, QA)) == [qa]
    with pytest.raises(LeamlError, match="line 1 is damaged"):
        list(artifacts.read_records(path, PseudoQA))


def test_step_log_continues_where_the_checkpoint_stands(tmp_path):
    path = tmp_path / "log.jsonl"
    log = StepLog(path, 0)
    for step in range(5):
        log.append({"step": step})
    log.close()
    path.write_text(path.read_text()[:-4])  # killed while writing the last line
    log = StepLog(path, 3)
    log.append({"step": 3})
    log.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2, 3]


def test_an_output_that_cannot_be_made_is_told_before_the_check(tmp_path):
    (tmp_path / "file").write_text("")

    def check():
        raise AssertionError("expensive")

    with pytest.raises(LeamlError, match=r"file is a file: name another --output"):
        RunDirectory.open(tmp_path / "file" / "run", {}, {}, check)
    with pytest.raises(LeamlError, match=r"cannot be made"):
        RunDirectory.open("/proc/leaml/run", {}, {})


def test_a_run_belongs_to_one_process_at_a_time(tmp_path):
    run = RunDirectory.open(tmp_path / "run", {}, {})
    RunDirectory.open(tmp_path / "run", {}, {})  # within a process it is shared
    code = (
        "import sys; from leaml_plugin.artifacts import RunDirectory; from leaml_plugin.errors import LeamlError\n"
        "try: RunDirectory.open(sys.argv[1], {}, {})\n"
        "except LeamlError as error: sys.exit(str(error))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert "another process works on this run" in refused.stderr
    del run
    assert subprocess.run(command).returncode == 0


def test_temporary_files_of_a_killed_process_are_removed(tmp_path):
    run = RunDirectory.open(tmp_path, {}, {})
    stage = run.stage("generate")
    leftovers = [tmp_path / ".report.html.123.tmp", stage.file(".part-000001.jsonl.123.tmp")]
    for path in leftovers:
        path.write_text("half")
    (tmp_path / ".mine").write_text("stays")
    RunDirectory.open(tmp_path, {}, {})
    assert not any(path.exists() for path in leftovers)
    assert (tmp_path / ".mine").exists()
