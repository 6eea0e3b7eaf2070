"""Builds the emulated device code and calls it with tensors: ``Emulated.relevance_`` and ``Emulated.step``."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def compiler() -> str | None:
    return shutil.which("g++") or shutil.which("c++")


def build(cache: Path, name: str, mutants: Sequence[tuple[str, str]] = (), fp32_only: bool = False):
    """csrc/kernels.cuh compiled for the CPU, optionally with some lines changed. Cached by content."""
    import pybind11

    sources = {path.name: path.read_text() for path in sorted((ROOT / "csrc").glob("*.h"))}
    sources["kernels.cuh"] = (ROOT / "csrc" / "kernels.cuh").read_text()
    for path in sorted((ROOT / "tests" / "csrc").glob("*.[hc]*")):
        if path.suffix in (".h", ".cpp"):
            sources[path.name] = path.read_text()
    for old, new in mutants:
        assert sources["kernels.cuh"].count(old) == 1, f"a mutant's line is not there exactly once: {old!r}"
        sources["kernels.cuh"] = sources["kernels.cuh"].replace(old, new)
    flags = ["-std=c++20", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-Wno-psabi"]
    flags += ["-DLEAML_FP32_ONLY"] if fp32_only else []
    key = hashlib.sha256(repr((sorted(sources.items()), flags, sys.version, pybind11.__version__)).encode()).hexdigest()
    module = f"{name}_{key[:16]}"
    library = cache / f"{module}.so"
    if not library.exists():
        folder = cache / module
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in sources.items():
            (folder / file).write_text(text)
        includes = [f"-I{folder}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
        scratch = folder / "module.so"
        command = [compiler(), *flags, *includes, f"-DLEAML_MODULE={module}", "emulated_kernels.cpp", "-o", scratch]
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
        scratch.replace(library)
    spec = importlib.util.spec_from_file_location(module, library)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return Emulated(loaded)


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None or tensor.numel() == 0 else tensor.data_ptr()


def matrix(tensor: Tensor) -> tuple[int, int, int, int]:
    column = tensor.stride(1) if tensor.shape[1] != 1 else 1
    return tensor.data_ptr(), tensor.stride(0), column, tensor.element_size()


class Emulated:
    """What ``ops_cuda.cu`` does around the kernels, for matrices."""

    def __init__(self, module):
        self.module = module

    def relevance_(self, weights, grads, out, criteria, dim, slots, grad_scale=None, found_inf=None) -> float:
        parts = [
            (matrix(w), matrix(g), w.shape[dim], w.shape[1 - dim], slot) for w, g, slot in zip(weights, grads, slots)
        ]
        outputs = [(o.data_ptr(), o.stride(0), o.stride(1), o.shape[1]) for o in out]
        types = CODES[weights[0].dtype], CODES[grads[0].dtype]
        return self.module.relevance(
            parts, *types, dim, outputs, criteria, address(grad_scale), address(found_inf)
        )  # fmt: skip

    def step(self, problem, fused: bool = False) -> list[Tensor]:
        """One step of a ``kernel_cases.Problem``; the fusion's sums ``[3, neurons]`` of each tensor."""
        items = []
        for param, rows, grad, state in zip(problem.params, problem.rows, problem.grads, problem.states):
            names = ("exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale", "master", "step")
            pointers = [address(state.get(name)) for name in names]
            compact = grad.shape[0] == rows.numel() != param.shape[0]
            shape = (param.shape[0], param.shape[1], rows.numel())
            items.append((matrix(param), matrix(grad), address(rows), *pointers, *shape, compact))
        options = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "maximize": False, **problem.options}
        lr = options["lr"]
        hyper = {
            "lr": 0.0 if isinstance(lr, Tensor) else lr,
            "beta1": options["betas"][0],
            "beta2": options["betas"][1],
            "eps": options["eps"],
            "weight_decay": options["weight_decay"],
            "maximize": options["maximize"],
            "stochastic": options.get("stochastic_rounding", False),
            "seed": options["seed"],
        }
        packed = "exp_avg_scale" in problem.states[0]
        sums = self.module.update(
            items, CODES[problem.params[0].dtype], CODES[problem.grads[0].dtype], packed, fused, hyper,
            address(lr if isinstance(lr, Tensor) else None), address(options.get("clip_coef")),
            address(options.get("grad_scale")), address(options.get("found_inf")),
        )  # fmt: skip
        return [torch.tensor(values).reshape(-1, 3).t() for values in sums]
