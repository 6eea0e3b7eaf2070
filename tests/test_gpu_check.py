"""scripts/gpu_check.sh without a GPU: a toy tree whose torch, pytest, sanitizer and benchmarks are stand-ins.

What is the script's own is real: choosing and ordering steps, time limits, what is kept between commands, the result.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="the script is one for bash")

FILES = {
    "torch/__init__.py": """
import os
__version__ = "2.99"
class version: cuda = "13.0"
class cuda:
    @staticmethod
    def get_device_name():
        if os.environ.get("NO_GPU"): raise RuntimeError("No CUDA GPUs are available")
        return os.environ.get("GPU", "Toy GPU")
    @staticmethod
    def get_device_capability(): return (9, 0)
""",
    "setup.py": """
import os, pathlib, sys
assert os.environ["LEAML_CUDA"] == "1" and os.environ["TORCH_CUDA_ARCH_LIST"] == "9.0"
if os.environ.get("BROKEN") == "build": sys.exit("nvcc: no such luck")
for name in ("_C.abi3.so", "_C_cuda.abi3.so"): pathlib.Path("leaml_plugin", name).write_text("built")
with open("history", "a") as f: f.write("build ")
""",
    "pytest/__init__.py": "",
    "pytest/__main__.py": """
import os, pathlib, sys, time
step = os.environ.get("TOOL", "tests")
assert os.environ["LEAML_OPS"] == "native" and pathlib.Path("leaml_plugin/_C_cuda.abi3.so").exists()
assert ("every_kernel" in sys.argv) == (step != "tests")
with open("history", "a") as f: f.write(step + " ")
print("first line", flush=True)
if os.environ.get("SLOW") == step: time.sleep(60)
if os.environ.get("SKIPPED") == step: sys.exit(print("3 skipped in 0.1s"))
print("1 failed" if os.environ.get("BROKEN") == step else "3 passed in 0.1s")
sys.exit(os.environ.get("BROKEN") == step)
""",
    "leaml_plugin/__init__.py": "",
    "leaml_plugin/ops/__init__.py": """
def build_info(): return {"cpu": {"loaded": True}, "cuda": {"loaded": True}}
""",
    "leaml_plugin/benchmark/__init__.py": "",
    "leaml_plugin/benchmark/kernels.py": """
import argparse, json, os, pathlib, time
p = argparse.ArgumentParser()
for name in ("device", "model", "json"): p.add_argument("--" + name)
p.add_argument("--dtypes", nargs="+"); p.add_argument("--ops", nargs="+")
a, _ = p.parse_known_args()
(dtype,) = a.dtypes
with open("history", "a") as f: f.write("kernels-" + dtype + " ")
rows = [{"op": "relevance", "dtype": dtype}] + ([] if a.ops else [{"op": "select", "dtype": "float32"}])
pathlib.Path(a.json).write_text(json.dumps(rows))
if os.environ.get("SLOW") == "kernels-" + dtype:
    time.sleep(40)
    with open("history", "a") as f: f.write("late ")
""",
    "leaml_plugin/benchmark/step.py": """
import argparse, json, pathlib
p = argparse.ArgumentParser()
for name in ("device", "size", "json"): p.add_argument("--" + name)
a, _ = p.parse_known_args()
pathlib.Path(a.json).write_text(json.dumps([{"name": "full", "size": a.size}]))
""",
    "csrc/kernels.cuh": "// one",
    "bin/compute-sanitizer": """#!/usr/bin/env bash
[ "$1 $3 $4 $7 $8" = "--tool --error-exitcode 9 --report-api-errors no" ] || exit 3
[ "$PYTORCH_NO_CUDA_MEMORY_CACHING" = 1 ] || exit 3
TOOL=$2 exec "${@:9}"
""",
}
EVERY = ["build", "tests", "memcheck", "racecheck", "synccheck"]
EVERY += ["kernels-bfloat16", "kernels-float32", "kernels-float16"]


class Tree:
    def __init__(self, root: Path):
        self.root = root
        self.result = root / "docs" / "benchmarks" / "gpu-toy-gpu.json"
        for name, text in FILES.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text.removeprefix("\n"))
        (root / "bin" / "compute-sanitizer").chmod(0o755)
        (root / "scripts").mkdir()
        for name in ("gpu_check.sh", "gpu_check.py"):
            shutil.copy(ROOT / "scripts" / name, root / "scripts" / name)

    def run(self, *arguments: str, expect: int = 0, **env: str) -> str:
        (self.root / "history").write_text("")
        path = f"{self.root / 'bin'}:{os.environ['PATH']}"
        done = subprocess.run(
            [self.root / "scripts" / "gpu_check.sh", *arguments],
            env={**os.environ, "PATH": path, "PYTHON": sys.executable, "COMMIT": "abc", **env},
            capture_output=True,
            text=True,
            check=False,
            timeout=100,
        )
        assert done.returncode == expect, done.stdout + done.stderr
        return done.stdout + done.stderr

    @property
    def history(self) -> list[str]:
        return (self.root / "history").read_text().split()

    def read(self) -> dict:
        return json.loads(self.result.read_text())

    def passed(self) -> dict[str, bool | None]:
        return {step: known["passed"] for step, known in self.read()["checks"].items()}


@pytest.fixture
def tree(tmp_path) -> Tree:
    return Tree(tmp_path)


def test_everything_in_one_go(tree):
    assert "all passed" in tree.run()
    assert tree.history == EVERY
    found = tree.read()
    assert found["device"] == "Toy GPU" and found["capability"] == "9.0" and found["commit"] == "abc"
    assert found["torch"] == "2.99" and found["build"] == {"cpu": True, "cuda": True}
    assert set(tree.passed().values()) == {True} and found["not_run"] == []
    assert found["checks"]["tests"]["last_line"] == "3 passed in 0.1s"
    assert [(r["op"], r["dtype"]) for r in found["kernels"]] == [
        ("relevance", "bfloat16"), ("select", "float32"), ("relevance", "float32"), ("relevance", "float16"),
    ]  # fmt: skip
    assert [r["size"] for r in found["step"]] == ["medium", "qwen2.5-vl-3b"]


def test_several_commands_make_one_result(tree):
    tree.run("build", "tests")
    assert tree.history == ["build", "tests"]
    assert tree.passed() == {"build": True, "tests": True} and "memcheck" in tree.read()["not_run"]
    tree.run("kernels-float16", "racecheck")  # the build is there and fresh
    assert tree.history == ["racecheck", "kernels-float16"]
    assert list(tree.passed()) == ["build", "tests", "racecheck", "kernels-float16"]
    tree.result.unlink()  # a clean checkout over the kept folder
    tree.run("memcheck")
    assert list(tree.passed()) == ["build", "tests", "memcheck", "racecheck", "kernels-float16"]


def test_a_fresh_machine_adds_to_the_file_it_is_given(tree):
    tree.run("tests", "kernels-bfloat16", "step-3b")
    assert tree.history == ["build", "tests", "kernels-bfloat16"]
    before = tree.read()
    shutil.rmtree(tree.root / "build")
    for library in tree.root.glob("leaml_plugin/*.so"):
        library.unlink()
    tree.run("kernels-float32", "step-medium", COMMIT="def")
    assert tree.history == ["build", "kernels-float32"]
    found = tree.read()
    assert found["checks"]["tests"] == before["checks"]["tests"]
    assert [r["dtype"] for r in found["kernels"] if r["op"] == "relevance"] == ["bfloat16", "float32"]
    assert [r["size"] for r in found["step"]] == ["medium", "qwen2.5-vl-3b"]
    assert found["checks"]["tests"]["commit"] == "abc" and found["checks"]["kernels-float32"]["commit"] == "def"


def test_a_failing_step_is_recorded_and_the_rest_goes_on(tree):
    assert "FAILED" in tree.run("tests", "memcheck", BROKEN="tests", expect=1)
    assert tree.passed() == {"build": True, "tests": False, "memcheck": True}
    failed = tree.read()["checks"]["tests"]
    assert failed["exit_code"] == 1 and "first line\n1 failed" in failed["tail"]
    tree.run("tests")  # mended
    assert tree.passed()["tests"] is True and tree.read()["checks"]["tests"]["tail"] == ""


def test_skipped_tests_have_not_passed(tree):
    """A sanitizer that does not support the device hides it from torch."""
    tree.run("memcheck", SKIPPED="memcheck", expect=1)
    assert tree.passed() == {"build": True, "memcheck": False}


def test_nothing_runs_on_a_broken_build(tree):
    tree.run(BROKEN="build", expect=1)
    assert tree.history == [] and tree.passed() == {"build": False}
    assert "no such luck" in tree.read()["checks"]["build"]["tail"]


def test_a_budget_ends_a_step_and_keeps_its_rows(tree):
    out = tree.run("--budget", "24", "kernels-bfloat16", "kernels-float32", SLOW="kernels-bfloat16", expect=1)
    assert "kernels-float32: not begun" in out
    assert tree.history == ["build", "kernels-bfloat16"]
    found = tree.read()
    assert found["checks"]["kernels-bfloat16"]["exit_code"] == 124
    assert [r["op"] for r in found["kernels"]] == ["relevance", "select"]
    assert "kernels-float32" in found["not_run"]
    tree.run("kernels-bfloat16")
    assert tree.passed()["kernels-bfloat16"] is True and len(tree.read()["kernels"]) == 2


def test_other_sources_and_other_devices_are_not_mixed_in(tree):
    tree.run("tests")
    (tree.root / "csrc" / "kernels.cuh").write_text("// two")
    tree.run("memcheck")
    assert tree.history == ["build", "memcheck"] and list(tree.passed()) == ["build", "memcheck"]
    tree.run("--result", str(tree.result), "racecheck", GPU="Another GPU")
    assert tree.read()["device"] == "Another GPU" and list(tree.passed()) == ["build", "racecheck"]


def test_a_missing_sanitizer_is_neither_passed_nor_failed(tree):
    (tree.root / "bin" / "compute-sanitizer").unlink()
    if any(Path("/usr/local").glob("cuda*/bin/compute-sanitizer")) or shutil.which("compute-sanitizer"):
        pytest.skip("this machine has a compute-sanitizer of its own")
    tree.run("memcheck")
    assert tree.passed() == {"build": True, "memcheck": None}


def test_what_cannot_be_done_is_said(tree):
    assert "no CUDA device" in tree.run(NO_GPU="1", expect=2)
    assert "unknown step 'test'" in tree.run("test", expect=2)
    assert "no Python with torch" in tree.run(PYTHON="false /nowhere", expect=2)
    assert not tree.result.exists()
