#!/usr/bin/env bash
# Everything that needs a GPU, in one go: build, CUDA tests, compute-sanitizer (memcheck, racecheck), benchmark.
#
#   scripts/gpu_check.sh [result.json]        default: docs/benchmarks/gpu-<device>.json
#
# Needs torch with CUDA, a CUDA toolkit (CUDA_HOME, or under /usr/local) and the test extras. QUICK=1 takes one model
# layer and few repetitions. The result file says device, driver, versions, commit and what passed; commit it.
# A step that cannot run is recorded as missing, and any failure makes the exit code 1.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT

"$PYTHON" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "gpu_check: no CUDA device")' || exit 2
DEVICE=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-").lower())')
RESULT=${1:-docs/benchmarks/gpu-$DEVICE.json}
CAPABILITY=$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
status=0

step() { # step NAME COMMAND...: runs it, keeps its exit code and output
  local name=$1
  shift
  echo "== $name"
  "$@" >"$WORK/$name.log" 2>&1
  echo $? >"$WORK/$name.rc"
  tail -n 3 "$WORK/$name.log"
  [ "$(cat "$WORK/$name.rc")" = 0 ] || status=1
}

step build env LEAML_CUDA=1 TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-$CAPABILITY}" "$PYTHON" setup.py -q build_ext --inplace
export LEAML_OPS=native PYTHONPATH=$PWD
step tests "$PYTHON" -m pytest -q tests/ops/test_cuda_device.py -p no:cacheprovider

SANITIZER=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -n 1)
for check in memcheck racecheck; do
  if [ -n "$SANITIZER" ]; then
    # one of each kind: under the sanitizer a test takes a hundred times longer. Graph capture is not for it.
    step "$check" "$SANITIZER" --tool "$check" --error-exitcode 9 --launch-timeout 0 "$PYTHON" -m pytest -q \
      -p no:cacheprovider tests/ops/test_cuda_device.py \
      -k "(test_relevance and bfloat16) or (test_sparse_adamw and bfloat16 and padded) or same_bits or more_tensors"
  else
    echo "== $check: no compute-sanitizer found"
    echo missing >"$WORK/$check.rc"
  fi
done

FEW=()
[ "${QUICK:-0}" = 1 ] && FEW=(--layers 1 --pairs 5)
step bench "$PYTHON" -m leaml_plugin.benchmark.kernels --device cuda --model qwen2.5-vl-7b --json "$WORK/kernels.json" "${FEW[@]}"
step bench_step "$PYTHON" -m leaml_plugin.benchmark.step --device cuda --size "${STEP_SIZE:-medium}" --dtype bfloat16 \
  --json "$WORK/step.json"

mkdir -p "$(dirname "$RESULT")"
"$PYTHON" - "$WORK" "$RESULT" <<'PY'
import json, pathlib, subprocess, sys, time
import torch
from leaml_plugin import ops

work, result = map(pathlib.Path, sys.argv[1:])


def output(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def rows(name):
    path = work / name
    return json.loads(path.read_text()) if path.exists() else None


checks = {}
for path in sorted(work.glob("*.rc")):
    code = path.read_text().strip()
    log = path.with_suffix(".log")
    last = log.read_text().strip().splitlines()[-1:] if log.exists() else []
    checks[path.stem] = {"passed": None if code == "missing" else code == "0", "last_line": last[0] if last else ""}
result.write_text(
    json.dumps(
        {
            "device": torch.cuda.get_device_name(),
            "capability": torch.cuda.get_device_capability(),
            "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "toolkit": (output("nvcc", "--version") or "").splitlines()[-1:],
            "torch": torch.__version__,
            "torch_cuda": torch.version.cuda,
            "commit": output("git", "rev-parse", "HEAD"),
            "uncommitted_changes": bool(output("git", "status", "--porcelain")),
            "date": time.strftime("%Y-%m-%d"),
            "build": {kind: ops.build_info()[kind]["loaded"] for kind in ("cpu", "cuda")},
            "checks": checks,
            "kernels": rows("kernels.json"),
            "step": rows("step.json"),
        },
        indent=1,
    )
    + "\n"
)
print(f"gpu_check: wrote {result}")
PY
[ $status = 0 ] && echo "gpu_check: all passed" || echo "gpu_check: FAILED, see the result file"
exit $status
