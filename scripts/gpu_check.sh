#!/usr/bin/env bash
# Everything that needs a GPU: build, CUDA tests, compute-sanitizer, benchmarks; see scripts/gpu_check.py.
#
#   scripts/gpu_check.sh                                    all steps
#   scripts/gpu_check.sh --budget 570 build tests memcheck  some steps, ended before 570 seconds are over
#
# PYTHON chooses the interpreter (default: python3 or python, whichever has torch).
set -euo pipefail
cd "$(dirname "$0")/.."
for candidate in ${PYTHON:-python3 python}; do
  if "$candidate" -c 'import torch' 2>/dev/null; then
    exec "$candidate" scripts/gpu_check.py "$@"
  fi
done
echo "gpu_check: no Python with torch found; set PYTHON" >&2
exit 2
