"""Builds the CUDA ops, host side and kernels, for the CPU (``emulated_ops.cpp``) and calls them with tensors."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils import cpp_extension

from leaml_plugin import ops
from leaml_plugin.ops._library import SCHEMAS

ROOT = Path(__file__).resolve().parents[2]
DEVICE_OPS = ("neuron_relevance_", "sparse_adamw_", "relevance_sparse_adamw_")


def compiler() -> str | None:
    return shutil.which("g++") or shutil.which("c++")


def build(
    cache: Path, mutants: Sequence[tuple[str, str]] = (), sanitize: bool = False, device_arithmetic: bool = False
) -> Emulated:
    """csrc/ops_cuda.cu and csrc/kernels.cuh for the CPU, optionally with some lines changed. Cached by content.

    ``device_arithmetic``: with what a GPU works out in another way (fp32 in place of fp64), so not bit for bit.
    ``sanitize``: with the address and undefined-behaviour sanitizers, whose runtimes the process has to begin with.
    """
    sources = {path.name: path.read_text() for path in sorted((ROOT / "csrc").glob("*.h"))}
    for name in ("kernels.cuh", "ops_cuda.cu"):
        sources[name] = (ROOT / "csrc" / name).read_text()
    for name in ("cuda_emulation.h", "emulated_ops.cpp"):
        sources[name] = (ROOT / "tests" / "csrc" / name).read_text()
    for old, new in mutants:
        places = [name for name, text in sources.items() if old in text]
        assert len(places) == 1 and sources[places[0]].count(old) == 1, f"not there exactly once: {old!r}"
        sources[places[0]] = sources[places[0]].replace(old, new)
    flags = ["-std=c++20", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-Wno-psabi"]
    flags += ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
    if device_arithmetic:
        flags += ["-DLEAML_DEVICE_ARITHMETIC"]
    if sanitize:  # without the checks of the stack, which fibers change under the sanitizer's feet
        flags += ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "--param", "asan-stack=0"]
    key = hashlib.sha256(repr((sorted(sources.items()), flags, torch.__version__, sys.version)).encode()).hexdigest()
    name = f"leaml_emulated_{key[:16]}"
    library = cache / f"{name}.so"
    if not library.exists():
        folder = cache / name
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in sources.items():
            (folder / file).write_text(text)
        torch_folders = [f"-I{path}" for path in cpp_extension.include_paths()]
        links = [f"-L{path}" for path in cpp_extension.library_paths()] + ["-ltorch", "-ltorch_cpu", "-lc10"]
        scratch = folder / "library.so"
        command = [compiler(), *flags, f"-DLEAML_LIBRARY={name}", f"-I{folder}", *torch_folders, "emulated_ops.cpp"]
        subprocess.run([*command, "-o", scratch, *links], cwd=folder, check=True, capture_output=True, text=True)
        scratch.replace(library)
    return Emulated(name, library)


class Emulated:
    """``torch.ops.leaml`` as a GPU would run it. What it allocates begins as NaN."""

    def __init__(self, name: str, path: Path):
        if not hasattr(Emulated, name):  # once in a process
            library = torch.library.Library(name, "DEF")
            for op in DEVICE_OPS:
                library.define(op + SCHEMAS[op])
            setattr(Emulated, name, library)
            torch.ops.load_library(str(path))
        self.ops = getattr(torch.ops, name)
        self.native = ctypes.CDLL(str(path))
        self.native.leaml_vector_accesses.restype = ctypes.c_long
        self.native.leaml_launches.restype = ctypes.c_long
        self.native.leaml_broken_barrier.restype = ctypes.c_char_p
        self.native.leaml_row_coefficients.argtypes = [ctypes.c_double] * 4 + [ctypes.c_float, ctypes.c_void_p]

    def row_coefficients(self, lr: float, betas: tuple[float, float], decay: float, step: float) -> list[float]:
        """1 - lr * decay, lr / (1 - beta1^t), sqrt(1 - beta2^t) as the kernels have them."""
        out = (ctypes.c_float * 3)()
        self.native.leaml_row_coefficients(lr, *betas, decay, step, out)
        return list(out)

    def relevance_(
        self, weights, grads, out, criteria=(0, 1, 2, 3), dims=0, slots=None, grad_scale=None, found_inf=None
    ) -> float:
        count = len(weights)
        dims = [dims] * count if isinstance(dims, int) else dims
        slots = list(range(count)) if slots is None else slots
        return self.ops.neuron_relevance_(
            weights, grads, out, list(criteria), dims, slots, grad_scale, found_inf
        ).item()  # fmt: skip

    def step(self, problem, fused: bool = False, slots: Sequence[int] | None = None) -> list[Tensor]:
        """One step of a ``kernel_cases.Problem``; the fusion's four relevances ``[4, neurons]`` of each tensor, or of
        each of ``slots``, which follow each other."""
        lists, options = problem.arguments()
        first, second = options.pop("scales", ((), ()))
        masters = options.pop("masters", ())
        names = ("lr", "betas", "eps", "weight_decay", "maximize", "clip_coef", "grad_scale", "found_inf")
        usual = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "maximize": False}
        tail = ops._adamw_tail(
            torch.device("cpu"),
            *[options.get(name, usual.get(name)) for name in names],
            options.get("stochastic_rounding", False),
            options["seed"],
        )
        if not fused:
            self.ops.sparse_adamw_(*lists, first, second, masters, *tail)
            return []
        slots = list(range(len(problem.params))) if slots is None else list(slots)
        sizes = dict(zip(slots, (p.shape[0] for p in problem.params)))
        out = [torch.zeros(4, sizes[slot]) for slot in sorted(sizes)]
        self.ops.relevance_sparse_adamw_(*lists, first, second, masters, out, [0, 1, 2, 3], slots, *tail)
        return out
