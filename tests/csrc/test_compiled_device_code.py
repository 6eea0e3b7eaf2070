"""What nvcc makes of the device code: no spills, few enough registers, 128-bit loads and stores, for sm_80, 90 and 100.

Needs a toolkit and no GPU. The disassembler is the toolkit's or the one inside Triton's wheel.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = (80, 90, 100)


def cuda_home() -> Path | None:
    spec = importlib.util.spec_from_file_location("leaml_setup_probe", ROOT / "setup.py")
    source = Path(spec.origin).read_text()
    # only the finder: running setup.py would build
    namespace: dict = {"os": os, "shutil": shutil, "Path": Path}
    body = source[source.index("def find_cuda_home") : source.index("def wants_cuda")]
    exec("import glob\n" + body, namespace)
    found = namespace["find_cuda_home"]()
    return Path(found) if found else None


def tool(name: str) -> str | None:
    home = cuda_home()
    candidates = [home / "bin" / name] if home else []
    triton = importlib.util.find_spec("triton")
    if triton and triton.origin:
        candidates.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name)
    found = next((str(c) for c in candidates if c.exists()), None)
    return found or shutil.which(name)


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(cuda_home() is None, reason="no CUDA toolkit: nvcc is needed (set CUDA_HOME)"),
]

KERNELS = 43  # of ops_cuda.cu: every kernel with every combination of types that the ops dispatch to


@pytest.fixture(scope="module", params=ARCHITECTURES)
def compiled(request, tmp_path_factory) -> tuple[str, Path]:
    """The resource report and the object of the CUDA library's source for one architecture."""
    from torch.utils import cpp_extension

    cubin = tmp_path_factory.mktemp(f"sm_{request.param}") / "ops_cuda.cubin"
    setup = (ROOT / "setup.py").read_text()
    target = re.search(r'TORCH_TARGET = "(.*?)"', setup)[1]
    flags = ast.literal_eval(re.search(r"NVCC_FLAGS = (\[.*?\])", setup)[1])
    command = [
        str(cuda_home() / "bin" / "nvcc"), *flags, "-cubin", "-Xptxas=-v", f"-arch=sm_{request.param}",
        target, "-DUSE_CUDA", *(f"-I{path}" for path in cpp_extension.include_paths()),
        str(ROOT / "csrc" / "ops_cuda.cu"), "-o", str(cubin),
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stderr, cubin


def test_no_spills_and_few_enough_registers(compiled):
    report, _ = compiled
    kernels = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        report,
        re.S,
    )
    assert len(kernels) == KERNELS
    for name, *spills, registers in kernels:
        assert spills == ["0", "0", "0"], (name, spills)
        # 65,536 registers hold two blocks of 256 threads with 128 each, four with 64
        assert int(registers) <= (64 if "relevance_rows" in name else 128), (name, registers)


def test_memory_is_read_and_written_128_bits_at_a_time(compiled):
    disassembler = tool("nvdisasm")
    if disassembler is None:
        pytest.skip("no nvdisasm, neither in the toolkit nor in Triton's wheel")
    _, cubin = compiled
    listing = subprocess.run([disassembler, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    kernels = dict(re.findall(r"\.section\s+\.text\.(\w+)(.*?)(?=\.section\s|\Z)", listing, re.S))
    assert len(kernels) == KERNELS
    for name, code in kernels.items():

        def count(pattern: str, code: str = code) -> int:
            return len(re.findall(pattern, code))

        wide_loads, wide_stores = count(r"LDG\.E[\w.]*\.128"), count(r"STG\.E[\w.]*\.128")
        weights = 2 if "Iff" in name else 1  # accesses that 8 fp32 or 16-bit elements take
        if "adamw_columns" in name:  # states and masters; a gradient in rows is read from where it is, memory or tile
            floats = 6 if "Lb0E" in name else 2
            assert wide_loads == floats and wide_stores == floats, (name, wide_loads, wide_stores)
            assert count(r"\bLD\.E\.128") == (2 if re.search("(fp16E|bf16E|I?f)fLb", name) else 1), name
            assert count(r"LDS\.128") == weights and count(r"STS\.128") == weights, name
        elif "adamw" in name and "Lb0E" in name:  # fp32 states: weight, gradient, both moments and the master
            assert wide_loads >= 2 * weights + 6 and wide_stores == weights + 6, (name, wide_loads, wide_stores)
        elif "adamw" in name:  # 8-bit states: their 8 codes are 8 bytes, or twice 4 beside fp32 weights and gradients
            assert wide_loads >= 2 * weights + 2 and wide_stores == weights + 2, (name, wide_loads, wide_stores)
            assert count(r"LDG\.E[\w.]*\.64") >= 3 or weights == 2, name
            assert count(r"STG\.E[\w.]*\.64") == 2 or weights == 2, name
            assert count(r"LDG\.E[\w.]*\.U8") <= 4 and count(r"STG\.E[\w.]*\.U8") == 2, name
        elif "relevance_rows" in name or "relevance_columns" in name:
            assert wide_loads >= 2 * weights, (name, wide_loads)
        assert not re.search(r"\b(LDL|STL)\b", code), f"{name} uses local memory"
