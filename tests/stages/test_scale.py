"""Pseudo-labels at scale: killed at random moments, on several ranks, on a full disk, in constant memory."""

from __future__ import annotations

import errno
import gc
import os
import random
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
import scale_job

from leaml_plugin import artifacts, cli
from leaml_plugin.artifacts import RunDirectory, read_json, read_records
from leaml_plugin.ranks import Rank
from leaml_plugin.records import PseudoQA

PICTURES = 240
JOB = str(Path(scale_job.__file__))


def start(path, rank=0, count=1):
    command = [sys.executable, JOB, str(path), str(PICTURES), str(rank), str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return [float(line.split()[1]) for line in out.splitlines()]


def tree(path: Path) -> dict[str, bytes]:
    # a killed rank leaves the empty file that it locked
    files = (p for p in sorted(path.rglob("*")) if p.is_file() and not p.name.startswith(".rank-"))
    return {str(p.relative_to(path)): p.read_bytes() for p in files}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run, and how long its work takes (start of the interpreter aside)."""
    path = tmp_path_factory.mktemp("whole") / "run"
    *_, begun, done = finish(start(path))
    pairs = [
        pair for shard in sorted((path / "stages/generate").glob("part-*")) for pair in read_records(shard, PseudoQA)
    ]
    counts = read_json(path / "stages/filter/counts.json")
    assert counts["kept"] and counts["unreadable"] == 3 and sum(map(bool, counts.values())) >= 6
    assert len(pairs) == sum(counts.values()) == (PICTURES - 3) * 3 + 3
    return path, done - begun


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_killed_twice_at_random_moments_then_the_same_bytes_no_duplicate_no_loss(seed, whole, tmp_path):
    """Ten runs, twenty kills; in every second run two ranks share the shards and any of them may be the one killed."""
    path, seconds = whole
    draw = random.Random(seed)
    ranks = 1 + seed % 2
    for _ in range(2):
        processes = [start(tmp_path / "run", rank, ranks) for rank in range(ranks)]
        for process in processes:
            process.stdout.readline()  # "begun"
        victim = draw.choice(processes)
        time.sleep(draw.uniform(0, seconds))
        victim.send_signal(signal.SIGKILL)
        time.sleep(draw.uniform(0, 0.1))  # the others go on for a moment
        for process in processes:
            process.kill()
            process.communicate()
    for process in [start(tmp_path / "run", rank, ranks) for rank in range(ranks)]:
        finish(process)
    want, got = tree(path), tree(tmp_path / "run")
    assert want.keys() == got.keys()
    assert [name for name in want if want[name] != got[name]] == []


def test_ranks_that_share_write_what_one_writes(whole, tmp_path):
    processes = [start(tmp_path / "run", rank, 3) for rank in range(3)]
    for process in processes:
        finish(process)
    assert tree(tmp_path / "run") == tree(whole[0])


class FullDisk:
    """Stands in for ``open``: after ``room`` bytes of JSONL every further write fails as on a full disk."""

    def __init__(self, room):
        self.room = room

    def __call__(self, path, mode="r", **options):
        file = open(path, mode, **options)
        if "w" in mode:
            write = file.write

            def limited(text):
                self.room -= len(text)
                if self.room < 0:
                    write(text[: len(text) // 2])
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
                return write(text)

            class Limited:
                def __enter__(self):
                    return self

                def __exit__(self, *error):
                    file.close()

                def writelines(self, lines):
                    for text in lines:
                        limited(text)

            return Limited()
        return file


@pytest.mark.parametrize("room", [3000, 60_000, 150_000])
def test_a_full_disk_is_one_sentence_and_the_run_goes_on_when_there_is_room(room, whole, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "leaml_plugin.inference", None)  # replaced by the job; restored afterwards
    monkeypatch.setattr(artifacts, "open", FullDisk(room), raising=False)

    def command(args):
        scale_job.run(tmp_path / "run", PICTURES, Rank())
        return 0

    module = type(sys)("full_disk_job")
    module.add_arguments, module.main = (lambda parser: None), command
    monkeypatch.setitem(sys.modules, "full_disk_job", module)
    monkeypatch.setitem(cli.COMMANDS, "job", ("full_disk_job", "a job"))
    assert cli.main(["job"]) == 2
    *_, sentence = capsys.readouterr().err.strip().splitlines()
    assert sentence.startswith("leaml: ") and ".jsonl" in sentence
    assert sentence.endswith(".tmp: the disk is full; make room and repeat the command.")
    stages = tmp_path / "run" / "stages"
    before = {name: data for name, data in tree(stages).items() if "part-" in name and ".tmp" not in name}
    want = tree(whole[0] / "stages")
    assert all(want[name] == data for name, data in before.items()) and len(before) < len(want)
    monkeypatch.setattr(artifacts, "open", open, raising=False)
    assert cli.main(["job"]) == 0
    assert tree(tmp_path / "run") == tree(whole[0])


def test_memory_does_not_grow_with_the_number_of_pictures(tmp_path, monkeypatch):
    """Peak of Python's allocations over the whole data path, directory to fine-tuning batches: numbers a picture."""
    from leaml_plugin.benchmark import memory

    monkeypatch.setattr(memory, "FOLDER", 100)
    monkeypatch.setattr(memory, "STEPS", 3)
    few, many = 300, 1100  # more than a shard
    memory.make_pictures(tmp_path / "first", few, flat=False)
    assert len(list(memory.simulate(tmp_path / "first", samples=2))) == 6  # imports and caches what there is to
    peaks = {}
    for count in (few, many):
        memory.make_pictures(tmp_path / str(count), count, flat=False)
        gc.collect()
        tracemalloc.start()
        peaks[count] = {}
        for stage, _ in memory.simulate(tmp_path / str(count), samples=2):
            peaks[count][stage] = tracemalloc.get_traced_memory()[1]
            tracemalloc.reset_peak()
        tracemalloc.stop()
    growth = {stage: (peaks[many][stage] - peaks[few][stage]) / (many - few) for stage in peaks[few]}
    # bytes a picture; as a list its record takes over 600, and its two pairs twice that
    assert growth.pop("filter") < 800, growth
    assert max(growth.values()) < 400, growth


@pytest.mark.slow
def test_the_table_of_the_memory_benchmark(tmp_path, capsys):
    assert (
        cli.main(["bench", "memory", "--pictures", "20", "--work", str(tmp_path), "--json", str(tmp_path / "m.json")])
        == 0
    )
    [row] = read_json(tmp_path / "m.json")
    assert row["pictures"] == 20 and row["kept"] + row["dropped"] == 40
    assert set(row["stages_mib"]) == {"inputs", "captions", "generate", "verify", "filter", "finetune"}
    assert row["peak_mib"] == max(row["stages_mib"].values()) >= row["start_mib"] > 10
    assert "20 pictures" in capsys.readouterr().out
    assert cli.main(["bench", "memory", "--pictures", "0"]) == 2


def test_the_run_directory_of_a_rank_is_the_leaders(tmp_path):
    run = RunDirectory.open(tmp_path / "run", {"a": 1}, {"b": 2})
    run.stage("inputs").finish()
    assert RunDirectory.join(tmp_path / "run", {"a": 1}, Rank(3, 4)).stage("generate").key == run.stage("generate").key
