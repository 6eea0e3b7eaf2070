"""What Python runs at its start wherever leaml_plugin is installed, by the line in ``leaml_plugin_startup.pth``.

Covers two things that neither PEFT nor lmms-eval has an entry point for:

- PEFT knows the method LEAML as soon as ``peft`` has been imported, so that ``PeftModel.from_pretrained``,
  ``AutoPeftModel*`` and transformers' ``load_adapter`` read an adapter of ours in a process that never names us;
- in a process whose command line is lmms-eval's, its plugins load each by itself (``leaml_plugin.lmms.entry.guard``).

In every other process: one finder on ``sys.meta_path``, which answers to the name ``peft`` alone. Imports nothing but
``os`` and ``sys``, which Python has loaded by then; never raises: a failure is one line on stderr.
``LEAML_STARTUP=0`` switches all of it off.

Does not cover: ``python -S`` and packages found by ``PYTHONPATH`` or put somewhere by ``pip install --target``, where
Python reads no ``.pth`` file; and a finder in front that answers for ``peft`` without asking those behind it.
``import leaml_plugin.tuner`` does the same there.
"""

import os
import sys

_COMMANDS = ("lmms-eval", "lmms-eval.exe", "lmms_eval")


def install():
    """Called from the ``.pth`` file; there may be several, where one environment builds on another."""
    if os.environ.get("LEAML_STARTUP") == "0":
        return
    try:
        if "peft" not in sys.modules and not any(isinstance(finder, PeftFinder) for finder in sys.meta_path):
            sys.meta_path.insert(0, PeftFinder())
        if any(word.endswith(_COMMANDS) for word in sys.orig_argv):
            from leaml_plugin.lmms.entry import guard

            guard()
    except Exception as error:  # Python must start, whatever is wrong here
        print(f"leaml: the start-up hook failed: {error!r}", file=sys.stderr)


class PeftFinder:
    """Finds ``peft`` as the finders behind it do, with a loader that registers our method afterwards.

    Stays on the import path until ``peft`` has been executed: many programs look whether PEFT is there
    (``importlib.util.find_spec``) long before they import it, and an import may fail and be tried again.
    """

    def find_spec(self, name, path=None, target=None):
        if name != "peft" or self not in sys.meta_path:
            return None
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            spec = finder.find_spec(name, path, target) if hasattr(finder, "find_spec") else None
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = _Registering(spec.loader, self)
                return spec
        return None


class _Registering:
    """A loader that hands everything to the real one, steps aside for it, and registers our method after it."""

    def __init__(self, loader, finder):
        self._loader, self._finder = loader, finder

    def __getattr__(self, name):
        return getattr(self._loader, name)

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        module.__loader__ = module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        try:
            # Where our package is what imports peft, this is a module half imported, which registers when it is done.
            import leaml_plugin.tuner  # noqa: F401
        except Exception as error:  # of an unfit torch or PEFT; who uses PEFT without us must be able to go on
            print(f"leaml: PEFT does not know LEAML adapters: {error!r}", file=sys.stderr)
