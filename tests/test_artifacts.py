"""Run directories: one configuration each, atomic files, completion that is verified."""

import errno
import json
import os
import subprocess
import sys
import threading
import time

import pytest

from leaml_plugin import artifacts
from leaml_plugin.artifacts import RunDirectory, StageDirectory, StepLog
from leaml_plugin.errors import LeamlError
from leaml_plugin.ranks import Rank
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
    leftovers = [tmp_path / ".report.html.123.tmp", stage.file(".families.json.123.tmp")]
    of_a_shard = stage.file(".part-000001.jsonl.123.tmp")
    of_a_shard.write_text("another rank may be writing it")
    for path in leftovers:
        path.write_text("half")
    (tmp_path / ".mine").write_text("stays")
    RunDirectory.open(tmp_path, {}, {})
    assert not any(path.exists() for path in leftovers)
    assert (tmp_path / ".mine").exists() and of_a_shard.exists()
    claimed = []
    for index in stage.open_shards(3):
        claimed.append((index, of_a_shard.exists()))
        write_shard(stage, index)
    assert claimed == [(0, True), (1, False), (2, False)]


def test_a_kill_right_after_a_stage_was_finished_leaves_nothing_behind(tmp_path, monkeypatch):
    run = RunDirectory.open(tmp_path / "run", {}, {})
    stage = run.stage("generate")
    for index in stage.open_shards(2):
        write_shard(stage, index)
    with monkeypatch.context() as patch:
        patch.setattr(artifacts, "_remove_claims", lambda path: None)  # killed before it got there
        stage.finish_shards()
    assert (stage.path / artifacts.CLAIMS).exists()
    stage = RunDirectory.open(tmp_path / "run", {}, {}).stage("generate")
    assert stage.done and not (stage.path / artifacts.CLAIMS).exists()


def write_shard(stage, index):
    artifacts.write_records(stage.shard(index), [PseudoQA(str(index), (), 0, "x")])


def test_streamed_fingerprints_tell_order_and_content_apart():
    rows = [{"id": "ü", "n": 1}, {"id": "b", "n": None}]
    assert artifacts.fingerprint_rows(iter(rows)) == artifacts.fingerprint_rows(json.loads(json.dumps(rows)))
    others = [rows[::-1], rows[:1], [{**rows[0], "n": 2}, rows[1]], []]
    assert len({artifacts.fingerprint_rows(r) for r in [rows, *others]}) == 5


def test_a_written_record_leaves_memory_before_the_next(tmp_path):
    import weakref

    class Text(str):
        __slots__ = ("__weakref__",)

    alive, most = weakref.WeakSet(), 0

    def stream():
        nonlocal most
        for i in range(20):
            text = Text(f"p{i}")
            alive.add(text)
            most = max(most, len(alive))
            yield PseudoQA(text, (), 0, "x")

    artifacts.write_records(tmp_path / "a.jsonl", stream())
    assert most <= 3 and len(list(artifacts.read_records(tmp_path / "a.jsonl", PseudoQA))) == 20


# A process of a run: says which shard it has claimed, writes it once it is told to, and says what it got.
WORKER = """
import sys
from leaml_plugin import artifacts
from leaml_plugin.artifacts import RunDirectory
from leaml_plugin.ranks import Rank
from leaml_plugin.records import PseudoQA
path, number, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
artifacts.POLL = 0.02
rank = Rank(number, count, patience=20)
run = RunDirectory.join(path, {}, rank) if number else RunDirectory.open(path, {}, {}, rank=rank)
if not number:
    run.stage("inputs").finish()
stage = run.stage("generate")
for index in stage.open_shards(6):
    print(index, flush=True)
    if sys.stdin.readline().strip() == "stop":
        break
    artifacts.write_records(stage.shard(index), [PseudoQA(str(index), (), 0, "x")])
print("left", flush=True)
stage.finish_shards()
"""


class Worker:
    def __init__(self, path, number, count):
        command = [sys.executable, "-c", WORKER, str(path), str(number), str(count)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def says(self):
        return self.process.stdout.readline().strip()

    def go_on(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()


def test_ranks_share_the_shards_and_a_dead_ones_are_taken_over(tmp_path):
    first, second = (Worker(tmp_path / "run", n, 2) for n in range(2))
    assert (first.says(), second.says()) == ("0", "1")
    second.go_on()
    assert second.says() == "3"  # of its own: 1, 3, 5
    third = Worker(tmp_path / "run", 1, 2)
    assert "another process works on this run as rank 1" in third.process.communicate()[1]
    second.process.kill()  # with shard 3 claimed, and 5 not begun
    second.process.communicate()
    got = ["0"]
    for _ in range(5):
        first.go_on()
        got.append(first.says())
    assert got == ["0", "2", "4", "3", "5", "left"]
    first.process.communicate()
    assert first.process.returncode == 0
    stage = RunDirectory.open(tmp_path / "run", {}, {}).stage("generate")
    assert stage.done and sorted(p.name for p in stage.path.iterdir()) == [
        "done.json", *(f"part-{i:06d}.jsonl" for i in range(6))
    ]  # fmt: skip


def test_a_rank_that_is_ahead_waits_for_the_shard_of_another(tmp_path):
    first, second = (Worker(tmp_path / "run", n, 2) for n in range(2))
    assert (first.says(), second.says()) == ("0", "1")
    for want in ("2", "4", "3", "5"):
        first.go_on()
        assert first.says() == want
    first.go_on()
    time.sleep(0.2)
    assert first.process.poll() is None  # shard 1 is missing
    second.go_on()
    assert second.says() == "left" and first.says() == "left"
    for worker in (first, second):
        worker.process.communicate()
        assert worker.process.returncode == 0


def test_other_ranks_wait_for_rank_0_and_give_up_when_it_is_gone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(artifacts, "POLL", 0.01)
    with pytest.raises(LeamlError, match=r"rank 1 has waited 0 s for rank 0 to open the run, which is not at work"):
        RunDirectory.join(tmp_path / "run", {}, Rank(1, 2, patience=0.05))
    run = RunDirectory.open(tmp_path / "run", {"lr": 1}, {})
    run.stage("inputs").finish()
    run.stage("relevance").file("scores").write_text("1")
    with pytest.raises(LeamlError, match="another configuration: lr is 1 there and 2 here"):
        RunDirectory.join(tmp_path / "run", {"lr": 2}, Rank(1, 2))
    joined = RunDirectory.join(tmp_path / "run", {"lr": 1}, Rank(1, 2, patience=0.05))
    assert joined.key == run.key
    waiter = threading.Thread(target=joined.wait_for, args=[joined.stage("relevance")])
    waiter.start()
    time.sleep(0.2)  # longer than the patience, but rank 0 is there
    assert waiter.is_alive()
    run.stage("relevance").finish()
    waiter.join(timeout=5)
    assert not waiter.is_alive() and joined.stage("relevance").done
    del run
    with pytest.raises(LeamlError, match="rank 0 to finish the stage 'generate'"):
        joined.wait_for(joined.stage("generate"))


def test_without_locks_shards_are_dealt(tmp_path, monkeypatch):
    """As on a file system that has none: each rank takes its own, and nobody else's."""

    def no_locks(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(artifacts.fcntl, "lockf", no_locks)
    monkeypatch.setattr(artifacts.fcntl, "flock", no_locks)
    monkeypatch.setattr(artifacts, "POLL", 0.01)
    leader = RunDirectory.open(tmp_path / "run", {}, {}, rank=Rank(0, 2))
    leader.stage("inputs").finish()
    other = RunDirectory.join(tmp_path / "run", {}, Rank(1, 2))
    got = []
    for index in other.stage("generate").open_shards(5):
        got.append(index)
        write_shard(other.stage("generate"), index)
    assert got == [1, 3]
    for index in leader.stage("generate").open_shards(5):
        got.append(index)
        write_shard(leader.stage("generate"), index)
    assert got == [1, 3, 0, 2, 4]


@pytest.mark.parametrize(
    ("env", "arguments", "want"),
    [
        ({}, (), (0, 1)),
        ({"RANK": "1", "WORLD_SIZE": "4"}, (), (1, 4)),
        ({"RANK": "1", "WORLD_SIZE": "4", "LEAML_RANK": "0", "LEAML_WORLD_SIZE": "1"}, (), (0, 1)),
        ({"RANK": "1", "WORLD_SIZE": "4"}, (2, 3), (2, 3)),
        ({"WORLD_SIZE": "4"}, (), (0, 1)),
        ({"RANK": "x", "WORLD_SIZE": "4"}, (), "RANK is 'x'; it must be a number"),
        ({"LEAML_RANK": "1"}, (), "belong together"),
        ({}, (1, None), "give both"),
        ({}, (2, 2), "rank 2 of 2 processes"),
        ({"LEAML_PATIENCE": "soon"}, (), "LEAML_PATIENCE is 'soon'"),
    ],
)
def test_ranks_from_the_environment(env, arguments, want):
    if isinstance(want, str):
        with pytest.raises(LeamlError, match=want):
            Rank.here(*arguments, env=env)
    else:
        rank = Rank.here(*arguments, env=env)
        assert (rank.number, rank.count) == want


def test_each_local_rank_takes_its_own_accelerator(monkeypatch):
    import torch

    from leaml_plugin.ranks import local_device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [local_device("auto", {"LOCAL_RANK": str(n)}) for n in (0, 3)] == ["cuda:0", "cuda:3"]
    assert local_device("cuda", {"LOCAL_RANK": "2"}) == "cuda:2"
    assert local_device("auto", {}) == "auto"
    assert local_device("cuda:1", {"LOCAL_RANK": "2"}) == "cuda:1"
    assert local_device("cpu", {"LOCAL_RANK": "2"}) == "cpu"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # as where each process sees one device alone
    assert local_device("auto", {"LOCAL_RANK": "2"}) == "auto"
