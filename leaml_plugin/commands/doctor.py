"""``leaml doctor``: what a bug report needs, and what a user checks first."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys

EXAMPLES = """examples:
  leaml doctor
"""

PACKAGES = ("torch", "torchvision", "transformers", "peft", "accelerate", "datasets", "lmms_eval", "safetensors")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    del parser


def main(args: argparse.Namespace) -> int:
    from leaml_plugin import __version__

    print(f"leaml_plugin {__version__}, Python {platform.python_version()} ({sys.executable}), {platform.platform()}")
    for name in PACKAGES:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed" + (
                " (needed by lmms-eval tasks: pip install leaml_plugin[eval])"
                if name in ("lmms_eval", "datasets")
                else ""
            )
        print(f"  {name:<13} {version}")

    import torch

    from leaml_plugin import ops

    print("extension")
    info = ops.build_info()
    for device in ("cpu", "cuda"):
        part = info.pop(device)
        state = "compiled kernels" if part["loaded"] else f"eager reference kernels: {part['cause']}"
        print(f"  {device:<13} {state}")
    for name, value in info.items():
        if isinstance(value, dict):
            value = ", ".join(k if v is True else f"{k} {v}" for k, v in value.items() if v not in (False, None))
        print(f"  {name:<13} {value}")
    print("devices")
    print(f"  cpu           {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads")
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        p = torch.cuda.get_device_properties(i)
        print(f"  cuda:{i}        {p.name}, {p.total_memory / 2**30:.0f} GiB, compute capability {p.major}.{p.minor}")
    if not torch.cuda.is_available():
        print("  cuda          none found")
    print("lmms-eval")
    entry = [e for e in importlib.metadata.entry_points(group="lmms_eval.models") if e.name == "leaml"]
    print(f"  plugin        {'registered' if entry else 'not registered: install the package (pip install -e .)'}")
    return 0
