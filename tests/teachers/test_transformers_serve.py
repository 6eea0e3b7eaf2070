"""Against a real ``transformers serve`` on loopback: the local model's captions to the byte, and a server that is
killed and started again.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from PIL import Image, ImageDraw
from transformers.utils.import_utils import is_serve_available

from leaml_plugin import models
from leaml_plugin.artifacts import StageDirectory, read_records
from leaml_plugin.backends import EngineConfig
from leaml_plugin.captioning import CaptionJob, write_captions
from leaml_plugin.data import Collator, Prompts, load_unlabeled
from leaml_plugin.records import PseudoQA
from leaml_plugin.stages import generate
from leaml_plugin.stages.caption import CaptionConfig
from leaml_plugin.teachers.client import ServerConfig
from leaml_plugin.worlds.files import checkpoint_path, prompts_path

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not is_serve_available(), reason="`transformers serve` needs fastapi, uvicorn and openai: pip install .[test]"
    ),
]
COUNT = 24


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The embedded checkpoint, at a path of its own."""
    path = tmp_path_factory.mktemp("teacher") / "checkpoint"
    shutil.copytree(checkpoint_path(), path)
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("images")
    colours = ["red", "green", "blue", "yellow"]
    for n in range(COUNT):
        picture = Image.new("RGB", (64, 64), (90 + 5 * n, 90, 90))
        ImageDraw.Draw(picture).ellipse((4 + n, 8, 30 + n, 34), fill=colours[n % 4])
        picture.save(root / f"{n:02d}.png")
    return root


class Server:
    """One `transformers serve` process."""

    def __init__(self, model: Path, port: int, log: Path):
        self.port, self.log = port, log
        command = [
            sys.executable, "-m", "transformers.cli.transformers", "serve", str(model), "--host", "127.0.0.1",
            "--port", str(port), "--device", "cpu", "--dtype", "float32",
        ]  # fmt: skip
        with open(log, "wb") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)

    def wait(self) -> Server:
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2):
                    return self
            except OSError:
                time.sleep(0.3)
        raise AssertionError(self.log.read_text())

    def asked(self) -> int:
        return self.log.read_text(errors="replace").count("[Request received]")

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def job(images: Path, output: Path, teacher: str, **options) -> CaptionJob:
    config = CaptionConfig(
        teacher=teacher,
        prompts=str(prompts_path() / "caption.txt"),
        encoding="png",
        max_tokens=48,
        shard_size=8,
        server=ServerConfig(concurrency=3, backoff=0.1, max_backoff=0.5, wait=5.0, timeout=120.0),
        **options,
    )
    return CaptionJob(str(images), str(output), config, dtype="float32", device="cpu")


def captions(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_killed_and_started_again(tmp_path, images, model, capsys):
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    output, port = tmp_path / "captions.jsonl", free_port()
    first = Server(model, port, tmp_path / "first.log").wait()
    second: list[Server] = []

    def disturb() -> None:
        while first.asked() < COUNT // 3:
            time.sleep(0.02)
        first.kill()
        time.sleep(0.5)
        second.append(Server(model, port, tmp_path / "second.log"))

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        usage = write_captions(job(images, output, f"http://127.0.0.1:{port}/v1", model=str(model)))
    finally:
        thread.join()
        for server in (first, *second):
            server.kill()
    assert usage.captions == COUNT and usage.completion_tokens > COUNT
    assert COUNT <= first.asked() + second[0].asked() <= COUNT + 3  # what was under way, and nothing else, twice
    assert (
        "no connection" in capsys.readouterr().err or "Connection refused" not in (tmp_path / "first.log").read_text()
    )

    local = tmp_path / "local.jsonl"
    write_captions(job(images, local, f"model:{model}"))
    served, own = captions(output), captions(local)
    assert [c["id"] for c in served] == [f"{n:02d}.png" for n in range(COUNT)]
    assert [c["caption"] for c in served] == [c["caption"] for c in own]
    for name in ("prompt_tokens", "completion_tokens", "prompt"):
        assert [c["meta"][name] for c in served] == [c["meta"][name] for c in own]
    assert not re.search(r"<\|", "".join(c["caption"] for c in served))


def test_the_generator_on_a_server_that_the_run_starts(tmp_path, images, model):
    """Greedy pairs through `transformers serve` are those of the model in this process."""
    prompts = Prompts.load(prompts_path())
    serve = f"{sys.executable} -m transformers.cli.transformers serve {{model}} --host 127.0.0.1 --port {{port}}"
    engine = EngineConfig(
        launch=f"{serve} --device cpu --dtype float32",
        model="{model}",
        logprobs=False,
        server=ServerConfig(concurrency=1, backoff=0.1, wait=20.0),
    )

    def pairs(name: str, **options) -> list[PseudoQA]:
        shards = generate.run(
            generate.GenerateConfig(samples=1, temperature=0.0, max_new_tokens=32, shard_size=4, **options),
            StageDirectory(tmp_path / name, "key"),
            load=lambda: models.load(model, dtype="float32", device="cpu"),
            collator=lambda loaded: Collator(loaded.processor, prompts),
            prompts=prompts,
            pictures=load_unlabeled(images)[:10],
            weights={"path": model},
        )
        return [pair for shard in shards for pair in read_records(shard, PseudoQA)]

    served, own = pairs("served", backend="server", engine=engine), pairs("own")
    assert [(p.id, p.text) for p in served] == [(p.id, p.text) for p in own]
    assert len(served) == 10 and any(p.question for p in served)
