#!/usr/bin/env bash
# Make .venv hold the pinned packages and this checkout with its extension; do nothing where it already does.
#   PYTHON=python3.12 scripts/environment.sh
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "leaml: $PYTHON is $("$PYTHON" --version 2>&1); Python 3.10 or newer is needed (set PYTHON=...)." >&2
    exit 2
}
hash_of() { cat "$@" | sha256sum | cut -d' ' -f1; }
packages=$(hash_of constraints.txt pyproject.toml)
extension=$(find csrc -type f | LC_ALL=C sort | xargs cat setup.py leaml_plugin/__init__.py leaml_plugin_startup.pth | sha256sum | cut -d' ' -f1)

if [ ! -x "$VENV/bin/python" ]; then
    "$PYTHON" -m venv "$VENV" || {
        echo "leaml: could not make a virtual environment; on Debian and Ubuntu install the package python3-venv." >&2
        exit 2
    }
fi
if [ "$(cat "$VENV/.leaml-packages" 2>/dev/null)" != "$packages" ]; then
    echo "leaml: installing the pinned packages into $VENV (about 7 GB, a few minutes the first time)"
    rm -f "$VENV/.leaml-packages" "$VENV/.leaml-extension"
    "$VENV/bin/pip" install --quiet --disable-pip-version-check -c constraints.txt \
        setuptools wheel ninja pybind11 torch torchvision
    "$VENV/bin/python" scripts/requirements.py | xargs -d '\n' \
        "$VENV/bin/pip" install --quiet --disable-pip-version-check -c constraints.txt
    echo "$packages" > "$VENV/.leaml-packages"
fi
if [ "$(cat "$VENV/.leaml-extension" 2>/dev/null)" != "$extension" ]; then
    echo "leaml: building the extension and installing this checkout into $VENV"
    log="$VENV/.leaml-build.log"
    "$VENV/bin/pip" install --verbose --disable-pip-version-check --no-build-isolation --no-deps -e . > "$log" 2>&1 || {
        cat "$log" >&2
        exit 1
    }
    # setup.py only warns where something was not built, and pip hides that
    grep -E "Warning: .*(reference kernels|leaml doctor)" "$log" >&2 || true
    compiler=${CXX:-c++}
    if [ "${LEAML_NATIVE:-1}" != 0 ] && { command -v ${compiler%% *} || command -v g++; } > /dev/null &&
        { [ ! -e leaml_plugin/_C.abi3.so ] || grep -q "leaml_plugin._C was not built" "$log"; }; then
        echo "leaml: the compiled CPU kernels are missing, see $log; the next run tries again" >&2
    else
        echo "$extension" > "$VENV/.leaml-extension"
    fi
fi
