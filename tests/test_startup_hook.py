"""The start-up hook: PEFT knows our adapters in a process that never names us, and nobody else notices."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def site(tmp_path) -> Path:
    """A folder that Python treats like site-packages at its start, with the hook and stand-ins for PEFT and for us."""
    folder = tmp_path / "site"
    for package, text in {
        "peft": "import sys\nprint('peft executed', __spec__.loader is __loader__, type(__loader__).__name__)\n",
        "leaml_plugin": "",
        "leaml_plugin/tuner": "import peft\nprint('registered after', peft.__name__)\n",
    }.items():
        (folder / package).mkdir(parents=True)
        (folder / package / "__init__.py").write_text(text)
    for name in ("leaml_plugin_startup.pth", "leaml_plugin_startup.py"):
        shutil.copy(ROOT / name, folder)
    start = tmp_path / "start"
    start.mkdir()
    (start / "sitecustomize.py").write_text(f"import site; site.addsitedir({str(folder)!r})")
    return folder


def python(site: Path, code: str, *options: str, **environment: str) -> tuple[list[str], str]:
    """Lines of stdout, and stderr, of a fresh process in which only ``site`` is installed."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "LEAML_STARTUP")}
    # without site-packages: sitecustomize brings the stand-ins alone
    begin = "" if "-S" in options else "import sitecustomize\n"
    done = subprocess.run(
        [sys.executable, "-S", *options, "-c", begin + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        cwd="/",
        env={**env, "PYTHONPATH": str(site.parent / "start"), **environment},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), done.stderr


EXECUTED = "peft executed True SourceFileLoader"
BOTH = [EXECUTED, "registered after peft"]


def test_peft_is_left_as_it_is_and_followed_by_our_registration(site):
    out, err = python(
        site,
        """
        import importlib.util, inspect, sys
        from importlib.machinery import SourceFileLoader
        finders = [f for f in sys.meta_path if type(f).__name__ == "PeftFinder"]
        assert len(finders) == 1 and not {"leaml_plugin", "peft", "typing", "pathlib"} & set(sys.modules)
        assert importlib.util.find_spec("peft").origin.endswith("__init__.py"), "looked for, not imported"
        assert importlib.util.find_spec("peft").loader.is_package("peft")
        assert importlib.util.find_spec("nothing") is None
        import peft
        assert type(peft.__loader__) is SourceFileLoader and peft.__spec__.loader is peft.__loader__
        assert "peft executed" in inspect.getsource(peft)
        assert finders[0] not in sys.meta_path
        import importlib
        assert importlib.reload(peft) is peft
        """,
    )
    assert (out, err) == ([*BOTH, EXECUTED], "")


def test_our_package_first_and_peft_by_way_of_it(site):
    assert python(site, "import leaml_plugin.tuner") == (BOTH, "")
    assert python(site, "from peft import __name__ as name") == (BOTH, "")


@pytest.mark.parametrize("position", [0, 1], ids=["in front", "behind"])
@pytest.mark.parametrize("answers", [False, True], ids=["passes", "wraps"])
def test_beside_another_finder(site, position, answers):
    """One that looks and passes, and one that wraps the loader as wrapt and coverage tools do."""
    out, err = python(
        site,
        f"""
        import importlib.util, sys
        class Finder:
            busy = False
            def find_spec(self, name, path=None, target=None):
                if name != "peft" or self.busy:
                    return None
                print("asked")
                if not {answers}:
                    return None
                self.busy = True
                spec = importlib.util.find_spec(name)
                self.busy = False
                execute = spec.loader.exec_module
                spec.loader.exec_module = lambda module: (execute(module), print("theirs"))
                return spec
        sys.meta_path.insert({position}, Finder())
        import peft
        """,
    )
    assert set(out) == {"asked", *BOTH, *(["theirs"] if answers else [])} and err == ""
    assert out.count(EXECUTED) == out.count(BOTH[1]) == 1


def test_an_import_that_fails_may_be_tried_again(site):
    (site / "peft" / "__init__.py").write_text("import sys\nif not hasattr(sys, 'ready'): raise ImportError('not yet')")
    code = """
        import sys
        try:
            import peft
        except ImportError as error:
            print(error)
        sys.ready = True
        import peft
    """
    assert python(site, code) == (["not yet", "registered after peft"], "")
    shutil.rmtree(site / "peft")
    code = """
        try:
            import peft
        except ModuleNotFoundError as error:
            print(error)
    """
    assert python(site, code) == (["No module named 'peft'"], "")


def test_a_failure_of_ours_is_one_line_and_not_theirs(site):
    (site / "leaml_plugin" / "tuner" / "__init__.py").write_text("raise RuntimeError('unfit torch')")
    out, err = python(site, "import peft; print(peft.__name__)")
    assert out == [EXECUTED, "peft"]
    assert err == "leaml: PEFT does not know LEAML adapters: RuntimeError('unfit torch')\n"


def test_a_failing_guard_of_lmms_eval_is_one_line(site):
    out, err = python(site, "print('started')", "-X", "lmms-eval")  # the command line names it
    assert out == ["started"]
    assert err.startswith("leaml: the start-up hook failed: ModuleNotFoundError(") and err.count("\n") == 1


def test_switched_off_and_without_site(site):
    code = "import sys; print([f for f in sys.meta_path if type(f).__name__ == 'PeftFinder'])"
    assert python(site, code, LEAML_STARTUP="0") == (["[]"], "")
    assert python(site, code, "-S") == (["[]"], "")
    assert python(site, "import peft", LEAML_STARTUP="0") == ([EXECUTED], "")


def test_twice_is_once(site):
    code = "import sys; import leaml_plugin_startup as s; s.install(); print(sum(isinstance(f, s.PeftFinder) for f in "
    assert python(site, code + "sys.meta_path))") == (["1"], "")


@pytest.mark.slow
def test_peft_and_transformers_load_our_adapter_in_a_process_that_never_names_us(tmp_path):
    """And without the hook PEFT's own error comes, and the line that docs/adapters.md names is the remedy."""
    sys.path.insert(0, str(ROOT / "tests" / "tuner"))
    try:
        from tiny_llama import build, load
    finally:
        sys.path.pop(0)
    from peft import get_peft_model

    from leaml_plugin import LeamlConfig

    base = build(tmp_path / "base")
    config = LeamlConfig(target_modules=["up_proj"], density=0.2, init_weights=False, task_type="CAUSAL_LM")
    get_peft_model(load(base), config).save_pretrained(tmp_path / "adapter")

    def run(code: str, **environment: str) -> list[str]:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", **environment}
        begin = f"base, adapter = {base!r}, {str(tmp_path / 'adapter')!r}\n"
        code = begin + textwrap.dedent(code)
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd="/", env=env, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    # where this checkout is not installed, only on the path, there would be no hook
    (tmp_path / "sitecustomize.py").write_text(f"import site; site.addsitedir({str(ROOT)!r})")
    hooked = """
        import torch
        from transformers import AutoModelForCausalLM
        ids = torch.arange(1, 9)[None]
        plain = AutoModelForCausalLM.from_pretrained(base)
        before = plain(ids).logits
        plain.load_adapter(adapter)
        from peft import AutoPeftModelForCausalLM, PeftModel
        one = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
        two = AutoPeftModelForCausalLM.from_pretrained(adapter)
        found = [model(ids).logits for model in (plain, one, two)]
        print(all(torch.equal(found[0], logits) for logits in found), torch.equal(before, found[0]))
        print(one.peft_config["default"].peft_type.value)
    """
    assert run(hooked) == ["True False", "LEAML"]
    unhooked = """
        from peft import PeftConfig
        try:
            PeftConfig.from_pretrained(adapter)
        except KeyError as error:
            print(error)
        import leaml_plugin.tuner
        print(PeftConfig.from_pretrained(adapter).peft_type.value)
    """
    assert run(unhooked, LEAML_STARTUP="0") == ["'LEAML'", "LEAML"]
