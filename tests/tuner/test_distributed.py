"""Two gloo ranks on the CPU: the same result as one rank, a killed run resumes, and from 2 ranks to 1 and back."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from leaml_plugin import Selection

JOB = Path(__file__).with_name("ddp_job.py")


def torchrun(*jobs: dict) -> subprocess.CompletedProcess:
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(JOB.parents[2]), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(JOB)]
    return subprocess.run(
        [*command, json.dumps({"jobs": jobs})], env=env, capture_output=True, text=True, timeout=300, check=False
    )


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path / "final.pt", weights_only=True)


def assert_same(a: Path, b: Path) -> None:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys() and not any("selected_" in k for k in first)
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_two_ranks_equal_one_and_resume(base, tmp_path):
    import ddp_job

    one, two, up, down = (tmp_path / name for name in ("one", "two", "up", "down"))
    ddp_job.plain_loop(base, str(one))
    ddp_job.trainer(base, str(tmp_path / "trainer1"))
    shutil.copytree(one, up)
    (up / "final.pt").unlink()

    first = torchrun(
        {"kind": "trainer", "base": base, "out": str(tmp_path / "trainer2")},
        {"kind": "plain_loop", "base": base, "out": str(two), "die_at": 4},
    )
    assert first.returncode != 0 and (two / "checkpoint.pt").exists() and not (two / "final.pt").exists(), first.stderr
    shutil.copytree(two, down)
    second = torchrun(
        {"kind": "plain_loop", "base": base, "out": str(two)},  # killed on two ranks, goes on with two
        {"kind": "plain_loop", "base": base, "out": str(up)},  # one rank's checkpoint, goes on with two
        {
            "kind": "trainer",
            "base": base,
            "out": str(tmp_path / "trainer-up"),
            "resume": str(tmp_path / "trainer1" / "checkpoint-3"),
        },
    )
    assert second.returncode == 0, second.stderr
    ddp_job.plain_loop(base, str(down))  # two ranks' checkpoint, goes on with one
    ddp_job.trainer(base, str(tmp_path / "trainer-down"), resume=str(tmp_path / "trainer2" / "checkpoint-3"))

    chosen = [Selection.load(d / "selection.safetensors") for d in (one, two)]
    assert chosen[0].jaccard(chosen[1]) == 1
    for other in (two, up, down):
        assert_same(one, other)
    for other in ("trainer2", "trainer-up", "trainer-down"):
        assert_same(tmp_path / "trainer1", tmp_path / other)
