"""What setup.py would build: decided by the compiler, the toolkit and the environment, never by whether there is a GPU.

Covers: the choice of extensions, and that what is chosen here has been built. Does not cover: compiling them (the other
kernel tests run what was built, and skip where nothing was).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from leaml_plugin import ops

ROOT = Path(__file__).resolve().parents[2]
CUDA = "leaml_plugin._C_cuda"

# setup.py as it is, but for the last call; `only` is the toolkit that there is
PROBE = """
import json, os, pathlib, runpy, setuptools, sys
only, exists = sys.argv.pop(), pathlib.Path.exists
pathlib.Path.exists = lambda self: exists(self) and (self.name != "nvcc" or str(self).startswith(only))
setuptools.setup = lambda **options: print(json.dumps([extension.name for extension in options["ext_modules"]]))
runpy.run_path("setup.py")
"""


@pytest.fixture
def toolkit(tmp_path) -> Path:
    """What setup.py takes for a CUDA toolkit. There is no GPU in it."""
    for name in ("bin/nvcc", "include/cuda_runtime.h"):
        (tmp_path / "cuda" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cuda" / name).touch(0o755)
    return tmp_path / "cuda"


def extensions(toolkit: Path | str = "/nowhere", **environment: str) -> tuple[str, subprocess.CompletedProcess[str]]:
    names = ("LEAML_CUDA", "LEAML_NATIVE", "LEAML_SANITIZE", "CUDA_HOME", "CUDA_PATH")
    inherited = {name: value for name, value in os.environ.items() if name not in names}
    result = subprocess.run(
        [sys.executable, "-c", PROBE, str(toolkit)], cwd=ROOT, capture_output=True, text=True, check=False,
        env={**inherited, "CUDA_VISIBLE_DEVICES": "", "CUDA_HOME": str(toolkit), **environment},
    )  # fmt: skip
    return result.stdout.strip().rpartition("\n")[2], result


@pytest.fixture
def torch_with_cuda() -> None:
    import torch

    if torch.version.cuda is None:
        pytest.skip("this torch was built without CUDA: no CUDA kernels can be built for it")


@pytest.mark.parametrize("choice", ["auto", "1"])
def test_a_toolkit_is_enough_for_the_cuda_kernels(toolkit, choice, torch_with_cuda):
    names, result = extensions(toolkit, LEAML_CUDA=choice)
    assert CUDA in names and "leaml_plugin._C" in names, result.stderr


def test_the_cuda_kernels_can_be_switched_off(toolkit):
    names, result = extensions(toolkit, LEAML_CUDA="0")
    assert "leaml_plugin._C" in names and CUDA not in names, result.stderr


def test_without_a_toolkit_there_are_the_cpu_kernels_unless_cuda_was_asked_for():
    names, result = extensions()
    assert "leaml_plugin._C" in names and CUDA not in names, result.stderr
    _, result = extensions(LEAML_CUDA="1")
    assert result.returncode != 0 and "LEAML_CUDA=1, but no CUDA toolkit was found" in result.stderr


def test_a_choice_that_is_none_is_named(toolkit):
    _, result = extensions(toolkit, LEAML_CUDA="yes")
    assert result.returncode != 0 and "LEAML_CUDA: wanted auto, 0 or 1, got 'yes'" in result.stderr


def test_nothing_is_built_where_nothing_can_or_shall_be(toolkit):
    assert extensions(toolkit, LEAML_NATIVE="0")[0] == "[]"
    names, result = extensions(toolkit, PATH="/nowhere", CXX="/nowhere/c++")
    assert names == "[]" and "no C++ compiler: leaml_plugin will run on its slower reference kernels" in result.stderr


def test_what_setup_would_build_here_was_built():
    """A build that failed only warns, and the kernel tests then skip; this is the test that fails."""
    result = subprocess.run([sys.executable, "-c", PROBE, ""], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    chosen = json.loads(result.stdout.strip().rpartition("\n")[2])
    if not chosen:
        pytest.skip(f"setup.py would build nothing here: {result.stderr.strip() or 'LEAML_NATIVE=0'}")
    info = ops.build_info()
    for extension, kind in (("leaml_plugin._C", "cpu"), (CUDA, "cuda")):
        if extension in chosen:
            assert info[kind]["loaded"], f"{extension} can be built here, but {info[kind]['cause']}"
