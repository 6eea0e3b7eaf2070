"""The CPU kernels under the address and undefined-behaviour sanitizers, in builds of their own.

These builds are also those for other processors: what they compute is compared with what the installed library does.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from leaml_plugin.ops import _loader

ROOT = Path(__file__).resolve().parents[2]

# the paths that index memory: odd widths, strides, types, both reductions, 8-bit states, the fusion, selection
SCENARIO = """
import hashlib
import sys
from pathlib import Path
import torch
torch.set_num_threads(2)
from leaml_plugin.ops import _loader
_loader.LIBRARIES["cpu"] = Path(sys.argv[1])
sys.path.insert(0, sys.argv[2])
from kernel_cases import DTYPES, FFN_SLOTS, LAYOUTS, WIDTHS, ffn_problem, make_problem, random_matrix
from leaml_plugin import ops
assert _loader.native(torch.device("cpu"))
digest = hashlib.sha256()
def seen(*tensors):
    for tensor in tensors:
        raw = tensor.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)
        digest.update(raw.numpy())
for layout in LAYOUTS:
    for dtype in DTYPES:
        for width in WIDTHS:
            for rows in (0, 1, 17):
                for dim in (0, 1):
                    w, g = (random_matrix((rows, width), dtype, layout, s) for s in (0, 1))
                    out = [torch.zeros(4, (rows, width)[dim])]
                    seen(ops.neuron_relevance_([w], [g], out, criteria=list(ops.CRITERIA), dims=dim), *out)
                    ops.neuron_relevance_([w], [g], [out[0][0]], dims=dim)
                    seen(*out)
                ways = [{"eight_bit": True}, {"stochastic_rounding": True}, {"master": True}, {}]
                for i, way in enumerate(ways):
                    for grad_dtype in dict.fromkeys((dtype, torch.float32)):
                        p = make_problem([(rows, width)], dtype, grad_dtype, layout, 0.5, compact=i % 2 == 1, **way)
                        p.step("native")
                        if i % 2 == 0:
                            lists, options = p.arguments()
                            out = [torch.zeros(rows)]
                            seen(ops.relevance_sparse_adamw_(*lists, out, **options), *out)
                        seen(*p.tensors())
for dtype in DTYPES:
    p = make_problem([(300, 700)] * 3, dtype, master=True)
    p.step("native")
    p = ffn_problem(dtype, 70, 300)
    lists, options = p.arguments()
    out = [torch.zeros(70), torch.zeros(70)]
    seen(ops.relevance_sparse_adamw_(*lists, out, slots=FFN_SLOTS, **options), *out, *p.tensors())
generator = torch.Generator().manual_seed(0)
scores = [torch.randn(n, generator=generator) for n in (0, 1, 5000, 70000)]
seen(*ops.select_top(scores, 0.1, scope="model"))
print("clean", digest.hexdigest())
"""


def run(library: Path, **environment: str) -> str:
    """The last line of the scenario on this library: "clean" and the hash of all results."""
    result = subprocess.run(
        [sys.executable, "-c", SCENARIO, str(library), str(Path(__file__).parent)], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment}, check=False, timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout.strip().rpartition("\n")[2]


@pytest.fixture(scope="module")
def installed(native) -> str:
    """What the installed library makes of the scenario, by its clones for this processor."""
    return run(_loader.LIBRARIES["cpu"])


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory) -> Callable[[Path, tuple[str, ...]], list[str]]:
    """Builds a library with both sanitizers; what comes back are their runtimes, with which a process has to begin."""
    import torch

    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to build the sanitized kernels with")
    runtimes = []
    for name in ("libasan.so", "libubsan.so"):
        path = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        if not Path(path).is_absolute():
            pytest.skip(f"{name} is not installed with the compiler")
        runtimes.append(path)
    base = Path(torch.__file__).parent
    flags = [
        "-std=c++20", "-O1", "-g1", "-fPIC", "-fopenmp-simd", "-Wno-psabi", "-ffp-contract=off",
        "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-DTORCH_TARGET_VERSION=0x020b000000000000",
        f"-I{base / 'include'}",
    ]  # fmt: skip

    def run(*arguments: str | Path) -> None:
        built = subprocess.run([compiler, *flags, *arguments], capture_output=True, text=True, check=False)
        assert built.returncode == 0, built.stderr

    shared = tmp_path_factory.mktemp("sanitized") / "ops_cpu.o"  # the definitions tell it nothing
    run("-c", ROOT / "csrc" / "ops_cpu.cpp", "-o", shared)

    def build(library: Path, definitions: tuple[str, ...]) -> list[str]:
        run("-shared", *(f"-DLEAML_{d}" for d in definitions), ROOT / "csrc" / "cpu_kernels.cpp", shared,
            f"-L{base / 'lib'}", "-ltorch_cpu", "-o", library)  # fmt: skip
        return runtimes

    return build


# the loops in the machine's own vectors (but for the clones, see cpu_kernels.cpp), two rows at once as on Intel; those
# of processors without AVX-512; and those of any other
@pytest.mark.slow
@pytest.mark.parametrize(
    "definitions", [("NO_CLONES", "READ_IN_PAIRS"), ("NO_CLONES", "LEVEL=3"), ("NO_DISPATCH",)], ids="-".join
)
def test_no_access_out_of_bounds_nothing_undefined_and_the_same_bits(tmp_path, installed, sanitized, definitions):
    library = tmp_path / "_C.abi3.so"
    runtimes = sanitized(library, definitions)
    # Python and torch keep what they allocate, so leaks are not looked for
    found = run(library, LD_PRELOAD=" ".join(runtimes), ASAN_OPTIONS="detect_leaks=0", PYTHONMALLOC="malloc")
    assert found.startswith("clean ") and found == installed
