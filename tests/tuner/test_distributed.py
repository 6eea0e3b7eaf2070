"""Two gloo ranks on the CPU: the same result as one rank, a killed run resumes, and from 2 ranks to 1 and back."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import socket
import sys
from pathlib import Path

import ddp_job
import pytest
import torch
from safetensors.torch import load_file

from leaml_plugin import Selection

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"


def two_ranks(*jobs: dict) -> list[int]:
    """Run the jobs on two processes as torchrun would; their exit codes. One import of torch serves both."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ddp_job"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for rank in range(2):
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        ranks.append(context.Process(target=ddp_job.main, args=(environment, list(jobs))))
        ranks[-1].start()
    for process in ranks:
        process.join(timeout=600)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in ranks]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path / "final.pt", weights_only=True)


def assert_same(a: Path, b: Path) -> None:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys() and not any("selected_" in k for k in first)
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_two_ranks_equal_one_and_resume(base, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))  # what the fork server imports from
    one, two, up, down = (tmp_path / name for name in ("one", "two", "up", "down"))
    ddp_job.plain_loop(base, str(one))
    ddp_job.trainer(base, str(tmp_path / "trainer1"))
    ddp_job.fsdp(base, str(tmp_path / "fsdp1"))
    shutil.copytree(one, up)
    (up / "final.pt").unlink()

    died = two_ranks(
        {"kind": "fsdp", "base": base, "out": str(tmp_path / "fsdp2")},
        {"kind": "trainer", "base": base, "out": str(tmp_path / "trainer2")},
        {"kind": "plain_loop", "base": base, "out": str(two), "die_at": 4},
    )
    assert died == [-9, -9] and (two / "checkpoint.pt").exists() and not (two / "final.pt").exists()
    shutil.copytree(two, down)
    finished = two_ranks(
        {"kind": "plain_loop", "base": base, "out": str(two)},  # killed on two ranks, goes on with two
        {"kind": "plain_loop", "base": base, "out": str(up)},  # one rank's checkpoint, goes on with two
        {
            "kind": "trainer",
            "base": base,
            "out": str(tmp_path / "trainer-up"),
            "resume": str(tmp_path / "trainer1" / "checkpoint-3"),
        },
    )
    assert finished == [0, 0]
    ddp_job.plain_loop(base, str(down))  # two ranks' checkpoint, goes on with one
    ddp_job.trainer(base, str(tmp_path / "trainer-down"), resume=str(tmp_path / "trainer2" / "checkpoint-3"))

    chosen = [Selection.load(d / "selection.safetensors") for d in (one, two)]
    assert chosen[0].jaccard(chosen[1]) == 1
    for other in (two, up, down):
        assert_same(one, other)
    for other in ("trainer2", "trainer-up", "trainer-down"):
        assert_same(tmp_path / "trainer1", tmp_path / other)
    adapters = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("fsdp1", "fsdp2")]
    assert adapters[0].keys() == adapters[1].keys() and any(
        v.is_floating_point() and v.any() for v in adapters[0].values()
    )
    for name, value in adapters[0].items():
        torch.testing.assert_close(value, adapters[1][name], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_deepspeed_zero_equals_one_rank_and_resumes(base, tmp_path, monkeypatch):
    """Stages 1, 2 and 3 on two gloo ranks: sharded states, gradients and weights, the adapter saved whole.

    Stages 2 and 3 as ``accelerate launch`` reads them from the examples' files.
    """
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    job = {"kind": "zero", "base": base}
    configs = {stage: str(CONFIGS / f"deepspeed_zero{stage}.yaml") for stage in (2, 3)}
    runs = {"zero1": {"stage": 1}, "zero2": {"config": configs[2]}, "zero3": {"config": configs[3]}}
    runs["resumed"] = {"config": configs[3], "resume": str(tmp_path / "zero3" / "checkpoint-3")}
    assert two_ranks(*({**job, **options, "out": str(tmp_path / name)} for name, options in runs.items())) == [0, 0]
    ddp_job.zero(base, str(tmp_path / "one"), 0)
    want = load_file(tmp_path / "one" / "final" / "adapter_model.safetensors")
    assert any(v.is_floating_point() and v.abs().max() > 0.01 for v in want.values())
    for name in runs:
        found = load_file(tmp_path / name / "final" / "adapter_model.safetensors")
        assert found.keys() == want.keys()
        for key, value in found.items():
            torch.testing.assert_close(value, want[key], rtol=1e-5, atol=1e-6, msg=f"{name} {key}")
