"""What our hooks add to a start of lmms-eval, and to that of any other Python process: medians over fresh processes.

    python -m leaml_plugin.lmms.startup [--rounds 15]

Covers: the start-up hook and the entry point together, as lmms-eval meets them (wall time inside the process, from the
first import of this package to the returned manifest; lmms-eval's own registry is imported before); and the start-up
file's line in a process that is not lmms-eval's. Prints one JSON line with the machine.
Does not cover: indexing the task files, which lmms-eval does for its own thousand at the same time.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys

_HOOKS = """
import sys, time, types, importlib.util
spec = importlib.util.find_spec("lmms_eval")
package = types.ModuleType("lmms_eval.models")
package.__path__ = [spec.submodule_search_locations[0] + "/models"]
sys.modules["lmms_eval.models"] = package
import lmms_eval.models.registry_v2
for name in [name for name in sys.modules if name.split(".")[0] == "leaml_plugin"]:
    del sys.modules[name]
began = time.perf_counter()
from leaml_plugin.lmms import entry
entry.guard()
entry.register()
print(1e3 * (time.perf_counter() - began))
"""

_LINE = """
import time
line = 'import sys; any(word.endswith(("lmms-eval", "lmms-eval.exe", "lmms_eval")) for word in sys.orig_argv)'
began = time.perf_counter()
exec(line)
print(1e3 * (time.perf_counter() - began))
"""


def measure(rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each round: ``hooks`` in a process of lmms-eval, ``line`` in any other."""
    out: dict[str, list[float]] = {"hooks": [], "line": []}
    for _ in range(rounds):
        for name, code in (("hooks", _HOOKS), ("line", _LINE)):
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
            out[name].append(float(done.stdout.split()[-1]))
    return out


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m leaml_plugin.lmms.startup")
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args(arguments).rounds
    report = {
        f"{name}_ms": dict(zip(("median", "min", "max"), (round(f(times), 3) for f in (statistics.median, min, max))))
        for name, times in measure(rounds).items()
    }
    print(json.dumps({**report, "rounds": rounds, "python": platform.python_version(), "machine": platform.machine()}))


if __name__ == "__main__":
    main()
