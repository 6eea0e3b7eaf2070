"""What our hooks add to a start of lmms-eval, and to that of any other Python process: medians over fresh processes.

    python -m leaml_plugin.lmms.startup [--rounds 15]

Covers, in milliseconds of processor time and of the clock:

- ``lmms_eval``: all that a start of lmms-eval does for us: the start-up hook, the entry point (lmms-eval's own registry
  is imported before), and our tasks in the index of one task manager;
- ``elsewhere``: the line of the start-up file in any other process, with the import of its module;
- ``peft``: what follows the import of PEFT there, the registration of our method.

Prints one JSON line with the machine. Does not cover: how long lmms-eval and PEFT themselves take.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys

_TIMED = """
import sys, time
def begin():
    for name in [name for name in sys.modules if name.split(".")[0] in ("leaml_plugin", "leaml_plugin_startup")]:
        del sys.modules[name]
    sys.meta_path[:] = [f for f in sys.meta_path if type(f).__module__ != "leaml_plugin_startup"]
    global began
    began = time.process_time(), time.perf_counter()
def end():
    print(1e3 * (time.process_time() - began[0]), 1e3 * (time.perf_counter() - began[1]))
"""
_HOOK = "import leaml_plugin_startup; leaml_plugin_startup.install()"
_CODE = {
    "lmms_eval": f"""
import types, importlib.util
spec = importlib.util.find_spec("lmms_eval")
package = types.ModuleType("lmms_eval.models")
package.__path__ = [spec.submodule_search_locations[0] + "/models"]
sys.modules["lmms_eval.models"] = package
import lmms_eval.models.registry_v2
sys.orig_argv.append("lmms-eval")
begin()
{_HOOK}
from leaml_plugin.lmms import entry
entry.register()
entry.task_index()
end()
""",
    "elsewhere": f"""
begin()
{_HOOK}
end()
""",
    "peft": """
sys.meta_path[:] = [f for f in sys.meta_path if type(f).__module__ != "leaml_plugin_startup"]  # or it were done by now
import peft
begin()
import leaml_plugin.tuner
end()
""",
}


def measure(rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Milliseconds (processor, clock) of each round for each of the three."""
    out: dict[str, list[tuple[float, float]]] = {name: [] for name in _CODE}
    for _ in range(rounds):
        for name, code in _CODE.items():
            command = [sys.executable, "-c", _TIMED + code]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            processor, clock = done.stdout.split()[-2:]
            out[name].append((float(processor), float(clock)))
    return out


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m leaml_plugin.lmms.startup")
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args(arguments).rounds
    report = {}
    for name, times in measure(rounds).items():
        for kind, values in zip(("processor", "clock"), zip(*times)):
            summary = (round(f(values), 3) for f in (statistics.median, min, max))
            report.setdefault(name, {})[f"{kind}_ms"] = dict(zip(("median", "min", "max"), summary))
    print(json.dumps({**report, "rounds": rounds, "python": platform.python_version(), "machine": platform.machine()}))


if __name__ == "__main__":
    main()
