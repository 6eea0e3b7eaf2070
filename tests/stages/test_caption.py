"""The caption stage: provenance, resumption to the same bytes, totals, and what is not used with its reason."""

from __future__ import annotations

import dataclasses
import errno
import gc
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "teachers"))
from fake_server import FakeServer, Reply, completion, describe, picture_of, serving

from leaml_plugin import cli
from leaml_plugin.artifacts import StageDirectory, read_records
from leaml_plugin.data import load_unlabeled
from leaml_plugin.errors import LeamlError
from leaml_plugin.records import Picture
from leaml_plugin.stages import caption
from leaml_plugin.stages.caption import CaptionConfig
from leaml_plugin.teachers import Caption
from leaml_plugin.teachers.client import ServerConfig
from leaml_plugin.teachers.prompt import TeacherPrompt

SERVER = ServerConfig(concurrency=4, backoff=0.01, max_backoff=0.05, wait=5.0, timeout=10.0, total_timeout=30.0)
PROMPT = TeacherPrompt.load()


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("images")
    for n in range(23):
        Image.new("RGB", (20 + n, 30), (10 * n, 50, 200)).save(root / f"{n:02d}.png")
    return root


def config(url: str, **options) -> CaptionConfig:
    return CaptionConfig(**{"teacher": url, "encoding": "png", "shard_size": 5, "server": SERVER, **options})


def run(path: Path, images: Path, settings: CaptionConfig, **options):
    pictures = load_unlabeled(images, **options)
    return caption.run(settings, StageDirectory(path, "key"), pictures=pictures, prompt=PROMPT, load=None)


def shards(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(path.glob("*")) if p.is_file() and p.name != "done.json"}


def records(path: Path) -> list[Caption]:
    return [r for p in StageDirectory(path, "key").shards() for r in read_records(p, Caption)]


def number_of(body) -> int:
    return picture_of(body).width - 20


def test_every_caption_tells_where_it_comes_from(tmp_path, images):
    with serving(FakeServer(lambda body, n: describe(body))) as server:
        joined, usage = run(tmp_path, images, config(server.url, extra={"chat_template_kwargs": {"thinking": False}}))
    first = records(tmp_path)[0]
    assert first.id == "00.png" and first.caption.startswith("A picture of 20 by 30 pixels")
    assert first.meta == {
        "teacher": server.url,
        "model": "tiny",
        "prompt": PROMPT.version,
        "parameters": {
            "temperature": 0.0, "max_tokens": 256, "longest_side": 1024, "encoding": "png",
            "chat_template_kwargs": {"thinking": False},
        },
        "finish_reason": "stop",
        "prompt_tokens": 100,
        "completion_tokens": 9,
    }  # fmt: skip
    sent = server.requests[0]
    assert sent["messages"][-1]["content"][-1]["text"] == PROMPT.caption
    assert (sent["temperature"], sent["max_tokens"]) == (0.0, 256)
    assert sent["chat_template_kwargs"] == {"thinking": False} and "seed" not in sent
    assert (usage.pictures, usage.captions, usage.prompt_tokens, usage.completion_tokens) == (23, 23, 2300, 207)
    pictures = list(read_records(joined, Picture))
    assert [p.id for p in pictures] == [f"{n:02d}.png" for n in range(23)]
    assert all(p.caption for p in pictures)


def test_neither_concurrency_nor_the_order_of_answers_matters(tmp_path, images):
    def answer(body, number):
        time.sleep(0.05 * (number_of(body) % 3))
        return describe(body)

    with serving(FakeServer(lambda body, n: describe(body))) as server:
        port = int(server.url.split(":")[2].split("/")[0])
        run(tmp_path / "a", images, config(server.url, server=ServerConfig(concurrency=1)))
    with serving(FakeServer(answer), port) as server:
        run(tmp_path / "b", images, config(server.url, server=ServerConfig(concurrency=16)))
        assert server.most_at_once > 1
    assert shards(tmp_path / "a") == shards(tmp_path / "b")


def test_sampling_has_a_seed_for_each_picture(tmp_path, images):
    with serving(FakeServer(lambda body, n: describe(body))) as server:
        run(tmp_path / "a", images, config(server.url, temperature=0.7, top_p=0.9, seed=3))
        seeds = {number_of(body): body["seed"] for body in server.requests}
        assert len(set(seeds.values())) == 23
        assert {body["top_p"] for body in server.requests} == {0.9}
        server.requests.clear()
        run(tmp_path / "b", images, config(server.url, temperature=0.7, top_p=0.9, seed=3, shard_size=7))
        assert seeds == {number_of(body): body["seed"] for body in server.requests}
        server.requests.clear()
        run(tmp_path / "c", images, config(server.url, temperature=None))
        assert not {"temperature", "seed", "top_p"} & set(server.requests[0])


def test_refused_empty_rejected_and_broken_pictures_are_kept_with_their_reason(tmp_path, images):
    folder = tmp_path / "images"
    folder.mkdir()
    for path in images.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "04.png").write_bytes(b"no picture")

    def answer(body, number):
        n = number_of(body)
        if n == 1:
            return "I'm sorry, but I can't help with that."
        if n == 2:
            return ""
        if n == 3:
            return Reply(400, {"error": {"message": "too many pixels"}})
        if n == 5:
            said = completion("A spot and")
            said["choices"][0]["finish_reason"] = "length"
            return said
        return describe(body)

    with serving(FakeServer(answer)) as server:
        joined, usage = run(tmp_path / "run", folder, config(server.url))
    by_id = {r.id: r for r in records(tmp_path / "run")}
    assert by_id["01.png"].reason == "refused" and by_id["01.png"].text.startswith("I'm sorry")
    assert by_id["02.png"].reason == "empty"
    assert by_id["03.png"].reason == "rejected: the server answers 400: too many pixels"
    assert by_id["04.png"].reason.startswith("unreadable: ") and "prompt_tokens" not in by_id["04.png"].meta
    assert by_id["05.png"].caption == "A spot and" and by_id["05.png"].meta["finish_reason"] == "length"
    assert usage.reasons == {"empty": 1, "refused": 1, "rejected": 1, "unreadable": 1}
    assert (usage.captions, usage.cut) == (19, 1)
    assert "19 captions of 23 pictures (1 empty, 1 refused, 1 rejected, 1 unreadable); 1 ended by" in str(usage)
    captions = {p.id: p.caption for p in read_records(joined, Picture)}
    assert [captions[f"0{n}.png"] for n in (1, 2, 3, 4)] == [None] * 4


def test_pictures_with_captions_are_not_asked_about(tmp_path, images):
    (tmp_path / "own.jsonl").write_text(
        '{"image": "00.png", "caption": "Mine."}\n{"image": "07.png", "caption": "Too."}'
    )
    with serving(FakeServer(lambda body, n: describe(body))) as server:
        joined, usage = run(tmp_path / "run", images, config(server.url), captions=tmp_path / "own.jsonl")
    captions = {p.id: p.caption for p in read_records(joined, Picture)}
    assert (captions["00.png"], captions["07.png"]) == ("Mine.", "Too.")
    assert captions["08.png"].startswith("A picture of 28 by 30")
    assert len(server.requests) == usage.captions == 21


def test_a_finished_stage_asks_nobody(tmp_path, images):
    with serving(FakeServer(lambda body, n: describe(body))) as server:
        first = run(tmp_path, images, config(server.url))
    assert run(tmp_path, images, config(server.url)) == first


def test_the_server_goes_away_and_comes_back_elsewhere(tmp_path, images):
    """Nothing is lost, only what was under way is asked again, and the bytes are those of a quiet run."""
    enough = threading.Event()

    def until(limit):
        def answer(body, number):
            if number >= limit:
                enough.set()
                return Reply(401, {})
            return describe(body)

        return answer

    fake = FakeServer(until(9))
    with serving(fake) as server:
        port = int(server.url.split(":")[2].split("/")[0])
        with pytest.raises(LeamlError, match="API key"):
            run(tmp_path / "run", images, config(server.url))
    answered = [number_of(body) for body in fake.requests[:9]]
    with serving(FakeServer(lambda body, n: describe(body)), port) as again:
        run(tmp_path / "run", images, config(again.url))
    second = [number_of(body) for body in again.requests]
    assert len(second) == len(set(second))
    assert set(answered) | set(second) == set(range(23))
    assert not set(answered) & set(second)
    with serving(FakeServer(lambda body, n: describe(body)), port) as server:
        run(tmp_path / "quiet", images, config(server.url))
    assert shards(tmp_path / "run") == shards(tmp_path / "quiet")


def test_a_journal_cut_anywhere_is_taken_up(tmp_path, images):
    with serving(FakeServer(lambda body, n: describe(body))) as server:
        port = int(server.url.split(":")[2].split("/")[0])
        run(tmp_path / "quiet", images, config(server.url))
    want = shards(tmp_path / "quiet")

    def stop_at(limit):
        return lambda body, n: describe(body) if n < limit else Reply(401, {})

    for cut in (0, 1, 30, -30, -1):
        path = tmp_path / f"run{cut}"
        with serving(FakeServer(stop_at(7)), port) as server, pytest.raises(LeamlError):
            run(path, images, config(server.url, server=ServerConfig(concurrency=1)))
        (journal,) = (path / "work").glob("captions-000001.jsonl")
        data = journal.read_bytes()
        assert data.count(b"\n") == 2
        journal.write_bytes(data[: len(data) + cut if cut <= 0 else cut])
        lost = 2 - journal.read_bytes().count(b"\n")
        # stopped again in the same shard: what was written behind the cut line must not be lost with it
        with serving(FakeServer(stop_at(lost + 1)), port) as server, pytest.raises(LeamlError):
            run(path, images, config(server.url, server=ServerConfig(concurrency=1)))
        lost -= lost + 1
        with serving(FakeServer(lambda body, n: describe(body)), port) as server:
            run(path, images, config(server.url))
            assert len(server.requests) == 23 - 7 + lost
        assert shards(path) == want


def test_cost_and_tokens_and_a_budget(tmp_path, images):
    prices = {"price_prompt": 1000.0, "price_completion": 10000.0}  # 0.19 a caption
    with serving(FakeServer(lambda body, n: describe(body))) as server:
        with pytest.raises(LeamlError, match=r"have cost 1\.\d\d, more than server.max_cost \(1\); \d+ of 23 are kept"):
            run(tmp_path, images, config(server.url, server=ServerConfig(**prices, max_cost=1.0, concurrency=2)))
        asked = len(server.requests)
        assert 6 <= asked <= 6 + 3 * 2  # under way, or not read yet, when the budget was spent
        with pytest.raises(LeamlError, match=rf"; {asked} of 23 are kept"):  # what was spent before counts
            run(tmp_path, images, config(server.url, server=ServerConfig(**prices, max_cost=1.0)))
        _, usage = run(tmp_path, images, config(server.url, server=ServerConfig(**prices)))
        assert len(server.requests) == 23  # nothing was paid twice
    assert usage.cost == pytest.approx((2300 * 1000 + 207 * 10000) / 1e6)
    assert str(usage).endswith("2300 prompt + 207 completion tokens; cost 4.37")
    assert json.loads((tmp_path / "usage.json").read_text())["cost"] == pytest.approx(4.37)


def test_no_usable_caption_at_all(tmp_path, images):
    with (
        serving(FakeServer(lambda body, n: "I'm sorry, no.")) as server,
        pytest.raises(LeamlError, match=r"no usable caption for any of 23 pictures \(23 refused\)"),
    ):
        run(tmp_path, images, config(server.url))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"teacher": "captions.jsonl"}, "a file goes to --captions"),
        ({"teacher": "model:"}, "names no model"),
        ({"teacher": "http://me:pw@host"}, "holds a password"),
        ({"teacher": "http://host", "encoding": "gif"}, "known are jpeg, png"),
        ({"teacher": "http://host", "max_tokens": 0}, "at least 1"),
        ({"teacher": "http://host", "extra": {"api_key": "x"}}, "put the key into the environment"),
        ({"teacher": "model:x", "temperature": None}, "needs a temperature"),
    ],
)
def test_impossible_configurations(options, words):
    with pytest.raises(LeamlError, match=words):
        CaptionConfig(**options)


def test_a_local_model(tmp_path, images, tiny_models, monkeypatch):
    """Batches, tokens, a broken picture in the middle; and the batch size changes nothing."""
    from leaml_plugin import models

    folder = tmp_path / "images"
    folder.mkdir()
    for path in sorted(images.iterdir())[:7]:
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "03.png").write_bytes(b"no picture")
    monkeypatch.setattr(PROMPT.__class__, "is_refusal", lambda self, text: False)  # a random model may say anything

    def captions(name: str, **options):
        settings = CaptionConfig(
            teacher=f"model:{tiny_models('qwen2_5_vl')}", max_tokens=6, temperature=1.0, shard_size=3, **options
        )
        _, usage = caption.run(
            settings,
            StageDirectory(tmp_path / name, "key"),
            pictures=load_unlabeled(folder),
            prompt=PROMPT,
            load=lambda path: models.load(path, dtype="float32", device="cpu"),
        )
        return records(tmp_path / name), usage

    first, usage = captions("a", batch_size=2)
    assert [r.id for r in first] == [f"{n:02d}.png" for n in range(7)]
    assert first[3].reason.startswith("unreadable: ")
    written = [r for r in first if r.caption]
    assert written and all(r.meta["completion_tokens"] >= 1 for r in written)
    assert all(r.meta["prompt_tokens"] > 100 for r in written)
    assert usage.prompt_tokens == sum(r.meta["prompt_tokens"] for r in first if r.reason[:5] != "unrea")
    assert written[0].meta["teacher"].startswith("model:")
    assert captions("b", batch_size=5)[0] == first


# -- the command -------------------------------------------------------------------------------------------------------


def command(images: Path, url: str, output: Path, *more: str) -> list[str]:
    quick = ["caption.server.backoff=0.01", "caption.shard_size=5", "caption.encoding=png"]
    return [
        "caption", "--images", str(images), "--teacher", url, "--output", str(output),
        *(word for setting in quick for word in ("--set", setting)), *more,
    ]  # fmt: skip


def test_the_command_writes_a_file_that_captions_reads_back(tmp_path, images, capsys, monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", "sk-secret-77")

    def answer(body, number):
        return "I'm sorry, but I cannot." if number_of(body) == 4 else describe(body)

    output = tmp_path / "captions.jsonl"
    key = ["--api-key-env", "TEACHER_KEY", "--price-prompt", "1", "--price-completion", "2"]
    with serving(FakeServer(answer)) as server:
        assert cli.main(command(images, server.url, output, *key)) == 0
        out = capsys.readouterr().out
        assert out.startswith(f"{output}: 22 captions of 23 pictures (1 refused)") and "prompt +" in out
        assert cli.main(command(images, server.url, output, *key)) == 0  # finished: reads alone
        assert cli.main(command(images, server.url, output, *key, "--concurrency", "3", "--timeout", "9")) == 0
        assert len(server.requests) == 23
        assert cli.main(command(images, server.url, output, *key, "--max-tokens", "9")) == 2
        assert "run of another configuration" in capsys.readouterr().err
    assert {h["Authorization"] for h in server.headers} == {"Bearer sk-secret-77"}
    pictures = load_unlabeled(images, captions=output)
    assert [p.id for p in pictures if not p.caption] == ["04.png"]
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert lines[4]["caption"] is None and lines[4]["reason"] == "refused"
    assert lines[5]["meta"]["prompt"] == PROMPT.version
    everything = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert b"sk-secret-77" not in everything


def test_the_command_needs_a_teacher_and_a_file(tmp_path, images, capsys):
    assert cli.main(["caption", "--images", str(images), "--output", str(tmp_path / "c.jsonl")]) == 2
    assert "give --teacher" in capsys.readouterr().err
    assert cli.main(command(images, "http://127.0.0.1:9", tmp_path / "c.txt")) == 2
    assert "must end in .jsonl" in capsys.readouterr().err
    assert cli.main(["caption", "--show-settings"]) == 0
    assert json.loads(capsys.readouterr().out)["caption"]["server"]["concurrency"] == 8


def test_kill_nine_and_go_on(tmp_path, images):
    """The client is killed with requests under way: the same bytes at the end, and only those are asked again."""
    asked: Counter[int] = Counter()
    first_kill, second_kill = threading.Event(), threading.Event()
    lock = threading.Lock()

    def answer(body, number):
        with lock:
            asked[number_of(body)] += 1
        if number == 8:
            first_kill.set()
            time.sleep(1)
        if number == 17:
            second_kill.set()
            time.sleep(1)
        return describe(body)

    output = tmp_path / "captions.jsonl"
    with serving(FakeServer(answer)) as server:
        words = command(images, server.url, output, "--concurrency", "2")
        start = [sys.executable, "-m", "leaml_plugin.cli", *words]
        for reached in (first_kill, second_kill):
            process = subprocess.Popen(start, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
            assert reached.wait(60)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        assert cli.main(words) == 0
        assert sum(asked.values()) <= 23 + 2 * 3  # two kills, two under way and one perhaps unread
        quiet = command(images, server.url, tmp_path / "quiet.jsonl")
        assert cli.main(quiet) == 0
    assert output.read_bytes() == (tmp_path / "quiet.jsonl").read_bytes()


class FullDisk(io.FileIO):
    """A file on a disk with ``room`` bytes left for all journals together, part of a write included."""

    room = 0

    def write(self, data):
        if FullDisk.room <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done = super().write(bytes(data)[: FullDisk.room])
        FullDisk.room -= done
        return done


@pytest.mark.parametrize("room", [100, 3000])
def test_a_full_disk_loses_no_answer_that_was_written(room, tmp_path, images, capsys, monkeypatch):
    def journal(path, mode, encoding):
        return io.TextIOWrapper(io.BufferedWriter(FullDisk(path, mode)), encoding=encoding)

    with serving(FakeServer(lambda body, n: describe(body))) as server:
        assert cli.main(command(images, server.url, tmp_path / "quiet.jsonl")) == 0
        capsys.readouterr()
        words = command(images, server.url, tmp_path / "captions.jsonl", "--concurrency", "2")
        monkeypatch.setattr(FullDisk, "room", room)
        monkeypatch.setattr(caption, "open", journal, raising=False)
        assert cli.main(words) == 2
        assert (
            capsys.readouterr()
            .err.strip()
            .splitlines()[-1]
            .endswith("the disk is full; make room and repeat the command.")
        )
        work = tmp_path / "captions.jsonl.run" / "stages" / "caption"
        kept = sum(path.read_bytes().count(b"\n") for path in work.rglob("*.jsonl"))
        assert (room > 400) == (kept > 0)
        monkeypatch.undo()
        gc.collect()
        before = len(server.requests)
        assert cli.main(words) == 0
        # pictures, not requests: one that the broken run had under way may reach the server late
        assert len({picture_of(body).width for body in server.requests[before:]}) == 23 - kept
    assert (tmp_path / "captions.jsonl").read_bytes() == (tmp_path / "quiet.jsonl").read_bytes()


SERVE = """
import os, sys, time
sys.path.insert(0, {tests!r})
from fake_server import FakeServer, describe, picture_of, serving

def answer(body, number):
    os.write(1, b"%d\\n" % (picture_of(body).width - 20))
    time.sleep(0.01)
    return describe(body)

with serving(FakeServer(answer), int(sys.argv[1])):
    time.sleep(600)
"""


@pytest.mark.slow
def test_the_server_killed_twenty_times(tmp_path):
    """At random moments: the same bytes as without, nothing lost, and only what was under way is asked again."""
    rng = random.Random(0)
    images = tmp_path / "images"
    images.mkdir()
    for n in range(300):
        Image.new("RGB", (20 + n, 10), (n % 256, 50, 200)).save(images / f"{n:03d}.png")
    script = tmp_path / "serve.py"
    script.write_text(SERVE.format(tests=str(Path(__file__).parents[1] / "teachers")))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    kills, stop = 0, threading.Event()

    def serve_and_kill() -> None:
        nonlocal kills
        while True:
            with open(tmp_path / "asked.log", "a") as log:
                process = subprocess.Popen([sys.executable, str(script), str(port)], stdout=log)
            asked = (tmp_path / "asked.log").read_text().count("\n")
            # the moment is counted in requests, so that a slow machine is killed as often
            moment = asked + rng.randint(1, 20)
            while not stop.is_set() and (tmp_path / "asked.log").read_text().count("\n") < moment:
                time.sleep(rng.uniform(0, 0.01))
            if kills == 20:
                stop.wait()
            process.kill()
            process.wait()
            if stop.is_set():
                return
            kills += 1

    thread = threading.Thread(target=serve_and_kill)
    thread.start()
    settings = config(f"http://127.0.0.1:{port}/v1", shard_size=32)
    patient = ServerConfig(concurrency=4, retries=50, backoff=0.01, max_backoff=0.1, wait=60.0, timeout=20.0)
    try:
        run(tmp_path / "run", images, dataclasses.replace(settings, server=patient))
    finally:
        stop.set()
        thread.join()
    assert kills == 20
    asked = Counter(map(int, (tmp_path / "asked.log").read_text().split()))
    assert set(asked) == set(range(300))
    assert sum(asked.values()) <= 300 + 20 * patient.concurrency
    with serving(FakeServer(lambda body, n: describe(body)), port):
        run(tmp_path / "quiet", images, settings)
    assert shards(tmp_path / "run") == shards(tmp_path / "quiet")
