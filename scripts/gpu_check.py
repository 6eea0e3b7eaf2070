"""Everything that needs a GPU, in steps whose results are joined in one file: build, tests, sanitizer, benchmarks.

    scripts/gpu_check.sh [--result FILE] [--budget SECONDS] [--quick] [STEP ...]

Steps (default: all, in this order): ``build``, ``tests``, ``memcheck``, ``racecheck``, ``synccheck``,
``kernels-bfloat16``, ``kernels-float32``, ``kernels-float16`` (``kernels``: these three), ``step-medium``, ``step-3b``
(``step``: these two).

Covers: running steps in one command or in several, where the time of a command is limited. What a step found is kept
under build/gpu_check, and in the result file after every step: a later command adds to it, also on a fresh machine
that has the file but not the folder. A step that was cut off leaves its output and the benchmark rows that it had.
Results of other kernel sources (csrc, setup.py, leaml_plugin/ops) or of another device are not mixed in. The build
runs by itself where its outputs are missing or older.
Does not cover: what is tested (tests/ops/test_cuda_device.py) and measured (leaml_plugin.benchmark).

Needs torch with CUDA, a CUDA toolkit (CUDA_HOME, or under /usr/local), pytest, hypothesis, and for ``step``
transformers and peft, all of it installed; nothing is fetched. ``--result`` defaults to
docs/benchmarks/gpu-<device>.json: commit it. Outside a git checkout give the commit as COMMIT. Exit code: 0 where all
steps asked for passed, 1 where one failed or found no time, 2 without a device.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "gpu_check"
LIBRARIES = ("_C.abi3.so", "_C_cuda.abi3.so")
DTYPES = ("bfloat16", "float32", "float16")
CHECKS = ("memcheck", "racecheck", "synccheck")
GROUPS = {"kernels": tuple(f"kernels-{dtype}" for dtype in DTYPES), "step": ("step-medium", "step-3b")}
STEPS = ("build", "tests", *CHECKS, *GROUPS["kernels"], *GROUPS["step"])
LEAST = 20  # seconds below which no step is begun
TAIL = 4000  # characters of a failed step's output that the result file keeps


@dataclass
class Record:
    """What became of one step. ``passed`` is None where it could not run at all."""

    passed: bool | None
    exit_code: int | None
    seconds: float
    last_line: str
    date: str
    commit: str | None
    sources: str
    device: str
    tail: str = ""


def sources() -> str:
    """SHA-256 of what the kernels are built from."""
    digest = hashlib.sha256()
    files = [*(ROOT / "csrc").iterdir(), *(ROOT / "leaml_plugin" / "ops").glob("*.py"), ROOT / "setup.py"]
    for path in sorted(files):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def output(*command: str) -> str | None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    try:
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def commit() -> str | None:
    return os.environ.get("COMMIT") or output("git", "rev-parse", "HEAD")


def sanitizer() -> str | None:
    found = [str(path) for path in sorted(Path("/usr/local").glob("cuda*/bin/compute-sanitizer"), reverse=True)]
    home = os.environ.get("CUDA_HOME")
    if home and (Path(home) / "bin" / "compute-sanitizer").exists():
        found.insert(0, str(Path(home) / "bin" / "compute-sanitizer"))
    return shutil.which("compute-sanitizer") or (found[0] if found else None)


def device() -> tuple[str, str] | None:
    """Name and capability of the GPU, asked in a process of its own: this one keeps nothing on it."""
    told = output(
        sys.executable,
        "-c",
        "import torch; print(torch.cuda.get_device_name()); print('%d.%d' % torch.cuda.get_device_capability())",
    )
    if told is None:
        return None
    name, capability = told.splitlines()[-2:]
    return name, capability


def command(step: str, capability: str, quick: bool) -> tuple[list[str], dict[str, str]] | None:
    """What a step runs and its environment's additions; None where its tool is missing."""
    python = sys.executable
    tests = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/ops/test_cuda_device.py"]
    if step == "build":
        architectures = os.environ.get("TORCH_CUDA_ARCH_LIST", capability)
        return [python, "setup.py", "-q", "build_ext", "--inplace"], {
            "LEAML_CUDA": "1",
            "TORCH_CUDA_ARCH_LIST": architectures,
        }
    if step == "tests":
        return [python, *tests], {}
    if step in CHECKS:
        tool = sanitizer()
        if tool is None:
            return None
        # under the sanitizer everything takes a hundred times longer: one test launches every kernel a few times. Each
        # tensor is an allocation of its own, so that an access beyond its end is one beyond an allocation's. Libraries
        # ask the driver for what it may not have; those answers are no errors of a kernel.
        options = ["--tool", step, "--error-exitcode", "9", "--launch-timeout", "0", "--report-api-errors", "no"]
        return [tool, *options, python, *tests, "-k", "every_kernel"], {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    json_file = ["--json", str(WORK / f"{step}.rows.json")]
    if step in GROUPS["step"]:
        options = ["--device", "cuda", "--dtype", "bfloat16", *json_file]
        if quick:
            options += ["--size", "tiny", "--densities", "0.1", "--pairs", "3"]
        elif step == "step-medium":
            options += ["--size", "medium"]
        else:  # one density: each contender has a model of its own on the device
            options += ["--size", "qwen2.5-vl-3b", "--densities", "0.1", "--text", "512"]
        return [python, "-m", "leaml_plugin.benchmark.step", *options], {}
    dtype = step.removeprefix("kernels-")
    options = ["--device", "cuda", "--model", "tiny" if quick else "qwen2.5-vl-7b", "--dtypes", dtype]
    if dtype != DTYPES[0]:  # selection knows no dtype
        options += ["--ops", "relevance", "sparse_adamw", "fusion", "weight_grad"]
    if quick:
        options += ["--layers", "1", "--pairs", "5", "--densities", "0.1"]
    return [python, "-m", "leaml_plugin.benchmark.kernels", *options, *json_file], {}


def run(step: str, capability: str, quick: bool, limit: float | None) -> tuple[int | None, float, Path]:
    """Runs a step with its output in a log, all of its processes ended after ``limit`` seconds: code 124."""
    log = WORK / f"{step}.log"
    (WORK / f"{step}.rows.json").unlink(missing_ok=True)
    found = command(step, capability, quick)
    if found is None:
        log.write_text("no compute-sanitizer found\n")
        return None, 0.0, log
    words, extra = found
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "LEAML_OPS": "native", **extra}
    if step == "build":
        env.pop("LEAML_OPS")
    begin = time.monotonic()
    with log.open("w") as out:
        process = subprocess.Popen(
            words, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
        )
        try:
            code = process.wait(limit)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            code = 124
            out.write(f"\nended after {limit:.0f} seconds: no time was left\n")
    return code, time.monotonic() - begin, log


def built(wanted: str, name: str) -> bool:
    """Whether the libraries are there and were built from these sources for this device."""
    record = recorded("build")
    fresh = record is not None and record.passed and (record.sources, record.device) == (wanted, name)
    return bool(fresh and all((ROOT / "leaml_plugin" / library).exists() for library in LIBRARIES))


def recorded(step: str) -> Record | None:
    path = WORK / f"{step}.record.json"
    return Record(**json.loads(path.read_text())) if path.exists() else None


def rows(step: str) -> list[Any] | None:
    path = WORK / f"{step}.rows.json"
    return json.loads(path.read_text()) if path.exists() else None


def write(path: Path, data: Any) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(json.dumps(data, indent=1) + "\n")
    scratch.replace(path)


def environment() -> dict[str, Any]:
    """Versions and what of the kernels loads, asked in a process of its own: the build may have come after this one."""
    code = (
        "import json, torch; from leaml_plugin import ops; info = ops.build_info(); print(json.dumps({"
        "'torch': torch.__version__, 'torch_cuda': torch.version.cuda, "
        "'build': {kind: info[kind]['loaded'] for kind in ('cpu', 'cuda')}}))"
    )
    told = output(sys.executable, "-c", code)
    nvcc = shutil.which("nvcc") or next(map(str, sorted(Path("/usr/local").glob("cuda*/bin/nvcc"))), "nvcc")
    return {
        **(json.loads(told.splitlines()[-1]) if told else {}),
        "python": platform.python_version(),
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "toolkit": ((output(nvcc, "--version") or "").splitlines() or [None])[-1],
    }


def step_of(row: dict[str, Any]) -> str:
    """The step that a benchmark row of a result file came from."""
    if "op" not in row:
        return "step-3b" if row["size"] == "qwen2.5-vl-3b" else "step-medium"
    return f"kernels-{DTYPES[0] if row['op'] == 'select' else row['dtype']}"


def join(result: Path, wanted: str, name: str, capability: str, facts: dict[str, Any]) -> dict[str, Any]:
    """The result file, with what this folder knows over what the file held before, where both are of one make."""
    before: dict[str, Any] = {}
    if result.exists():
        before = json.loads(result.read_text())
        if (before.get("sources"), before.get("device")) != (wanted, name):
            before = {}
    checks: dict[str, Any] = before.get("checks", {})
    kept: dict[str, list[Any]] = {}
    for row in [*(before.get("kernels") or []), *(before.get("step") or [])]:
        kept.setdefault(step_of(row), []).append(row)
    for step in STEPS:
        record = recorded(step)
        if record is None or (record.sources, record.device) != (wanted, name):
            continue
        known = asdict(record)
        del known["sources"], known["device"]
        checks[step] = known
        kept[step] = rows(step) or []
    changed = output("git", "status", "--porcelain")
    return {
        "device": name,
        "capability": capability,
        **facts,
        "commit": commit(),
        "uncommitted_changes": None if changed is None else bool(changed),
        "sources": wanted,
        "date": time.strftime("%Y-%m-%d"),
        "checks": {step: checks[step] for step in STEPS if step in checks},
        "not_run": [step for step in STEPS if step not in checks],
        "kernels": [row for step in GROUPS["kernels"] for row in kept.get(step, [])],
        "step": [row for step in GROUPS["step"] for row in kept.get(step, [])],
    }


def check(steps: Sequence[str], result: Path | None, budget: float | None, quick: bool) -> int:
    """Runs steps, writing the result file after each."""
    end = None if budget is None else time.monotonic() + budget
    there = device()
    if there is None:
        print("gpu_check: no CUDA device", file=sys.stderr)
        return 2
    name, capability = there
    wanted = sources()
    result = result or ROOT / "docs" / "benchmarks" / f"gpu-{name.replace(' ', '-').lower()}.json"
    WORK.mkdir(parents=True, exist_ok=True)
    todo = [step for step in STEPS if step in steps]
    if "build" not in todo and not built(wanted, name):
        todo.insert(0, "build")
    status = 0
    facts = None
    for step in todo:
        left = None if end is None else end - time.monotonic()
        if left is not None and left < LEAST:
            print(f"== {step}: not begun, {left:.0f} seconds are left", flush=True)
            status = 1
            continue
        print(f"== {step}", flush=True)
        (WORK / f"{step}.record.json").unlink(missing_ok=True)
        code, seconds, log = run(step, capability, quick, None if left is None else max(1.0, left - LEAST / 2))
        text = log.read_text(errors="replace").strip()
        passed = None if code is None else code == 0
        if passed and step in ("tests", *CHECKS):  # where a sanitizer hides the device, all tests are skipped
            passed = re.search(r"\b\d+ passed\b", text) is not None
        record = Record(
            passed=passed,
            exit_code=code,
            seconds=round(seconds, 1),
            last_line=text.splitlines()[-1] if text else "",
            date=time.strftime("%Y-%m-%d %H:%M"),
            commit=commit(),
            sources=wanted,
            device=name,
            tail="" if passed else text[-TAIL:],
        )
        write(WORK / f"{step}.record.json", asdict(record))
        print("\n".join(text.splitlines()[-(3 if passed else 40) :]), flush=True)
        print(f"   {'passed' if passed else 'missing' if passed is None else 'FAILED'} in {seconds:.0f} s", flush=True)
        status = 1 if passed is False else status
        if facts is None or step == "build":
            facts = environment()
        write(result, join(result, wanted, name, capability, facts))
        if step == "build" and not passed:
            print("gpu_check: nothing else can run without the build", flush=True)
            break
    print(f"gpu_check: wrote {result}" if facts is not None else "gpu_check: nothing was run")
    print("gpu_check: all passed" if status == 0 else "gpu_check: FAILED or unfinished, see the result file")
    return status


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"among {', '.join((*STEPS, *GROUPS))}; default: all")
    parser.add_argument("--result", type=Path, help="default: docs/benchmarks/gpu-<device>.json")
    parser.add_argument("--budget", type=float, help="seconds after which this command has to be over")
    parser.add_argument("--quick", action="store_true", help="tiny shapes and few repetitions: does everything run?")
    args = parser.parse_args(arguments)
    steps: list[str] = []
    for step in args.steps or STEPS:
        steps += GROUPS.get(step, (step,))
    unknown = [step for step in steps if step not in STEPS]
    if unknown:
        parser.error(f"unknown step {unknown[0]!r}; wanted some of {', '.join((*STEPS, *GROUPS))}")
    return check(steps, args.result and args.result.resolve(), args.budget, args.quick)


if __name__ == "__main__":
    raise SystemExit(main())
