"""What nvcc makes of the device code: no spills, few enough registers, 128-bit loads and stores, for sm_80, 90 and 100.

Needs a toolkit and no GPU. The disassembler is the toolkit's or the one inside Triton's wheel.
"""

from __future__ import annotations

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

# one kernel of each kind and each width of access; the rest are the same templates
INSTANCES = """
#include <cuda_runtime.h>
#include "numerics.h"
namespace leaml::cuda {
__device__ __forceinline__ uint4 load16(const uint4* p) { return *p; }
__device__ __forceinline__ void store16(uint4* p, const uint4& x) { *p = x; }
}
#include "kernels.cuh"
namespace leaml::cuda {
template __global__ void relevance_rows<float, float>(const __grid_constant__ RelevanceArgs);
template __global__ void relevance_rows<bf16, bf16>(const __grid_constant__ RelevanceArgs);
template __global__ void relevance_columns<bf16, bf16>(const __grid_constant__ RelevanceArgs);
template __global__ void sparse_adamw<float, float, false>(const __grid_constant__ UpdateArgs);
template __global__ void sparse_adamw<bf16, bf16, false>(const __grid_constant__ UpdateArgs);
template __global__ void sparse_adamw<bf16, bf16, true>(const __grid_constant__ UpdateArgs);
template __global__ void sparse_adamw<fp16, float, false>(const __grid_constant__ UpdateArgs);
template __global__ void relevance_sparse_adamw<bf16, bf16, false>(const __grid_constant__ UpdateArgs);
}
"""


@pytest.fixture(scope="module", params=ARCHITECTURES)
def compiled(request, tmp_path_factory) -> tuple[str, Path]:
    """The resource report and the object of one architecture."""
    folder = tmp_path_factory.mktemp(f"sm_{request.param}")
    source, cubin = folder / "instances.cu", folder / "instances.cubin"
    source.write_text(INSTANCES)
    command = [
        str(cuda_home() / "bin" / "nvcc"), "-std=c++20", "-O3", "-cubin", "-Xptxas=-v", f"-arch=sm_{request.param}",
        f"-I{ROOT / 'csrc'}", str(source), "-o", str(cubin),
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
    assert len(kernels) >= 10
    for name, *spills, registers in kernels:
        assert spills == ["0", "0", "0"], (name, spills)
        # 65,536 registers hold two blocks of 256 threads; coding 8-bit states is arithmetic enough for one
        assert int(registers) <= (255 if "Lb1E" in name else 128), (name, registers)


def test_memory_is_read_and_written_128_bits_at_a_time(compiled):
    disassembler = tool("nvdisasm")
    if disassembler is None:
        pytest.skip("no nvdisasm, neither in the toolkit nor in Triton's wheel")
    _, cubin = compiled
    listing = subprocess.run([disassembler, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    kernels = dict(re.findall(r"\.section\s+\.text\.(\w+)(.*?)(?=\.section\s|\Z)", listing, re.S))
    assert len(kernels) >= 10
    for name, code in kernels.items():
        wide_loads, wide_stores = (
            len(re.findall(r"LDG\.E[\w.]*\.128", code)),
            len(re.findall(r"STG\.E[\w.]*\.128", code)),
        )
        if "adamw" in name:
            assert wide_loads >= 2 and wide_stores >= 1, (name, wide_loads, wide_stores)
            if "Lb0E" in name:  # fp32 states: both moments, both ways
                assert wide_loads >= 6 and wide_stores >= 5, (name, wide_loads, wide_stores)
        elif "relevance_rows" in name or "relevance_columns" in name:
            assert wide_loads >= 2, (name, wide_loads)
        assert not re.search(r"\b(LDL|STL)\b", code), f"{name} uses local memory"
