"""The CUDA ops, run on the CPU, under the address and undefined-behaviour sanitizers: no access outside a tensor."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# aligned and unaligned rows, their ends, no rows and no columns; more tensors than a launch takes
SCENARIO = """
import itertools, sys
from pathlib import Path
sys.path[:0] = [sys.argv[2], sys.argv[3]]
import torch
import emulated
from kernel_cases import DTYPES, FFN_SLOTS, LAYOUTS, ffn_problem, make_problem, random_matrix
device = emulated.build(Path(sys.argv[1]), eval(sys.argv[4]), sanitize=True)
shapes = [(9, 784), (1, 257), (5, 33), (2, 512), (0, 8), (3, 0)]
for dtype, wide, layout in itertools.product(DTYPES, (False, True), LAYOUTS):
    if wide and layout in LAYOUTS[2:]:
        continue
    grad = torch.float32 if wide else dtype
    for dim in (0, 1):
        w, g = ([random_matrix(s, t, layout, i) for i, s in enumerate(shapes)] for t in (dtype, grad))
        device.relevance_(w, g, [torch.zeros(4, s[dim]) for s in shapes], dims=dim)
    for eight_bit, mode in itertools.product((False, True), ("dense", "compact", "fused")):
        options = {"eight_bit": eight_bit, "master": wide, "stochastic_rounding": True}
        p = make_problem(shapes, dtype, grad, layout, 0.5, compact=mode == "compact", **options)
        device.step(p, mode == "fused")
    if layout == "transposed":
        p = make_problem([(70, 300), (40, 256)], dtype, torch.float32, layout, 0.5, compact=True, master=True)
        p.grads = [g.contiguous() for g in p.grads]
        device.step(p)
many = [torch.ones(1 + i % 3, 8) for i in range(700)]
device.relevance_(many, many, [torch.zeros(4, len(w)) for w in many])
device.step(make_problem([(2, 8)] * 450, density=0.5), True)
device.step(ffn_problem(torch.bfloat16, 70, 300, eight_bit=True), True, FFN_SLOTS)
print("clean")
"""


@pytest.mark.slow
def test_no_access_out_of_bounds_and_nothing_undefined(mutants=()):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to build the sanitized kernels with")
    runtimes = []
    for name in ("libasan.so", "libubsan.so"):
        path = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        if not Path(path).is_absolute():
            pytest.skip(f"{name} is not installed with the compiler")
        runtimes.append(path)
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python and torch keep what they allocate
        "PYTHONPATH": str(ROOT),
        "PYTHONMALLOC": "malloc",
        "OMP_NUM_THREADS": "1",
    }
    folders = [ROOT / "build" / "emulation", Path(__file__).parent, ROOT / "tests" / "ops"]
    result = subprocess.run(
        [sys.executable, "-c", SCENARIO, *map(str, folders), repr(mutants)],
        env=environment, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert result.returncode == 0 and result.stdout.strip().endswith("clean"), result.stderr[-4000:]
