"""A process of ``test_scale.py``: pairs, second answers and filter over pictures, with a model that answers at once.

    python scale_job.py RUN PICTURES RANK WORLD_SIZE

It loads no torch, so that it starts fast enough to be killed often. Says "begun" once it is at work.
"""

from __future__ import annotations

import functools
import hashlib
import sys
import time
import types
from pathlib import Path


def written(turn, sample):
    """Text and log-probability that depend on turn and sample alone."""
    digest = hashlib.sha256(f"{turn.id}/{turn.prompt}/{sample}".encode()).digest()
    answer = ["yes", "no", "a polyp", ""][digest[1] % 4]
    asked_to_write = "Use this form" in turn.prompt
    text = f"Question: What is at place {digest[0] % 6}?\nAnswer: {answer}" if asked_to_write else answer
    return text, -digest[2] / 64


def generate(loaded, turns, *, num_samples=1, on_error=None, **_):
    from leaml_plugin.errors import LeamlError

    for turn in turns:
        if turn.id.split("\t")[0].endswith("13"):
            on_error(turn, LeamlError(f"{turn.id}: the picture is damaged"))
            continue
        for sample in range(num_samples):
            text, logprob = written(turn, sample)
            yield types.SimpleNamespace(id=turn.id, sample=sample, text=text, logprob=logprob)


def slow_line(to_line, record):
    time.sleep(0.0001)
    return to_line(record)


def run(path: Path, pictures: int, rank, say=lambda word: None) -> None:
    stub = types.ModuleType("leaml_plugin.inference")
    stub.generate, stub.Sampling = generate, types.SimpleNamespace
    sys.modules["leaml_plugin.inference"] = stub
    from leaml_plugin import artifacts
    from leaml_plugin.data.prompts import Prompts
    from leaml_plugin.records import QA, ImageRef, Picture
    from leaml_plugin.sequences import Mapped
    from leaml_plugin.stages import filter, verify
    from leaml_plugin.stages import generate as generation

    artifacts.POLL = 0.01
    tools = {"load": lambda: None, "collator": lambda loaded: None, "prompts": Prompts.load()}
    labels = [QA("1", (), "What is at place 1?", "yes" * 20)]
    pool = Mapped(range(pictures), lambda n: Picture(f"p{n}", (ImageRef(f"/{n}.png"),)))
    if rank.leads:
        directory = artifacts.RunDirectory.open(path, {}, {}, rank=rank)
        if not directory.stage("inputs").done:
            directory.stage("inputs").finish()
    else:
        directory = artifacts.RunDirectory.join(path, {}, rank)
    say("begun")
    settings = generation.GenerateConfig(shard_size=8, samples=3)
    shards = generation.run(settings, directory.stage("generate"), pictures=pool, labels=labels, **tools)
    settings = verify.VerifyConfig(round_trip=True)
    shards = verify.run(settings, directory.stage("verify"), shards=shards, **tools)
    if rank.leads:
        settings = filter.FilterConfig(round_trip=False, answer_share=0.6, keep_share=0.8)
        filter.run(settings, directory.stage("filter"), shards=shards, labels=labels)
    say("done")


if __name__ == "__main__":
    from leaml_plugin import records
    from leaml_plugin.ranks import Rank

    # most of the time is spent in the middle of a file, where a kill hurts
    records.to_line = functools.partial(slow_line, records.to_line)
    began = time.monotonic()
    run(
        Path(sys.argv[1]),
        int(sys.argv[2]),
        Rank(int(sys.argv[3]), int(sys.argv[4]), patience=20),
        lambda word: print(word, round(time.monotonic() - began, 3), flush=True),
    )
    assert "torch" not in sys.modules
