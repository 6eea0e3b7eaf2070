"""What ends up in the wheel and the sdist, and that the wheel works outside the checkout."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A wheel without the compiled part (it is tested elsewhere and takes minutes) and an sdist."""
    out = tmp_path_factory.mktemp("dist")
    copy = out / "checkout"
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in filter(None, files):
        if (ROOT / name).exists():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    env = {**os.environ, "LEAML_NATIVE": "0"}
    for build in ("build_sdist", "build_wheel", "build_editable"):
        script = f"from setuptools import build_meta; build_meta.{build}({str(out)!r})"
        subprocess.run([sys.executable, "-c", script], cwd=copy, env=env, check=True, capture_output=True)
    editable = next(out.glob("*editable*.whl"))
    (wheel,) = set(out.glob("*.whl")) - {editable}
    return wheel, next(out.glob("*.tar.gz")), editable


def test_the_wheel_holds_tasks_prompts_and_worlds(built):
    names = set(zipfile.ZipFile(built[0]).namelist())
    tracked = subprocess.run(
        ["git", "ls-files", "tasks", "leaml_plugin"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    for name in tracked:
        inside = f"leaml_plugin/{name}" if name.startswith("tasks/") else name
        assert inside in names, f"{name} is not in the wheel"
    assert "leaml_plugin/tasks/endoscopy/_default_template_yaml" in names
    (entry,) = (n for n in names if n.endswith("entry_points.txt"))
    text = zipfile.ZipFile(built[0]).read(entry).decode()
    assert "leaml = leaml_plugin.cli:main" in text
    assert "[lmms_eval.models]" in text
    (licence,) = (n for n in names if n.endswith("LICENSE"))
    assert b"Apache License" in zipfile.ZipFile(built[0]).read(licence)


@pytest.mark.parametrize("number", [0, 2], ids=["wheel", "editable"])
def test_the_start_up_hook_lies_beside_the_package(built, number):
    """At the top of the wheel is site-packages; recorded, so that uninstalling takes it away."""
    wheel = zipfile.ZipFile(built[number])
    if number == 0:
        assert wheel.read("leaml_plugin_startup.py") == (ROOT / "leaml_plugin_startup.py").read_bytes()
    assert wheel.read("leaml_plugin_startup.pth") == (ROOT / "leaml_plugin_startup.pth").read_bytes()
    (record,) = (n for n in wheel.namelist() if n.endswith("RECORD"))
    lines = wheel.read(record).decode().splitlines()
    assert any(line.startswith("leaml_plugin_startup.pth,sha256=") for line in lines)


def test_the_sdist_holds_all_sources(built):
    names = {n.split("/", 1)[1] for n in tarfile.open(built[1]).getnames() if "/" in n}
    tracked = subprocess.run(
        ["git", "ls-files", "csrc", "tasks", "leaml_plugin"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert set(tracked) - names == set()
    assert {"setup.py", "pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff"} <= names
    assert {"leaml_plugin_startup.pth", "leaml_plugin_startup.py"} <= names


def test_the_wheel_works_outside_the_checkout(built, tmp_path):
    target = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), str(built[0])], check=True
    )
    code = (
        "import leaml_plugin, sys; from leaml_plugin.lmms import entry;"
        f"assert leaml_plugin.__file__.startswith({str(target)!r}), leaml_plugin.__file__;"
        "from pathlib import Path; tasks = Path(entry.tasks_directory());"
        "assert (tasks / 'endoscopy' / 'leaml_endoscopy.yaml').exists();"
        "from leaml_plugin.cli import main; sys.exit(main(['doctor']))"
    )
    env = {**os.environ, "PYTHONPATH": str(target)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=True, stdout=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """An environment in which the wheel is installed; everything else is read from this one, but for its own hooks."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=False, symlinks=True)
    interpreter = home / "bin" / "python"
    (site,) = home.glob("lib/python*/site-packages")
    (site / "zz_rest.pth").write_text(sysconfig.get_path("purelib") + "\n")  # after ours, and with no .pth file of it
    command = [sys.executable, "-m", "pip", "--python", str(interpreter), "install", "-q", "--no-deps", str(built[0])]
    subprocess.run(command, check=True)
    return interpreter


@pytest.mark.parametrize("built, compiler, stamped", [(True, True, True), (False, True, False), (False, False, True)])
def test_a_failed_build_is_told_and_tried_again(built, compiler, stamped, tmp_path):
    """scripts/environment.sh marks the extension as done where it was built, or where nothing can build it."""
    checkout, tools, venv_bin = tmp_path / "checkout", tmp_path / "tools", tmp_path / "venv" / "bin"
    for directory in (checkout / "scripts", checkout / "csrc", checkout / "leaml_plugin", tools, venv_bin):
        directory.mkdir(parents=True)
    inputs = ("constraints.txt", "pyproject.toml", "setup.py", "leaml_plugin/__init__.py", "leaml_plugin_startup.pth")
    for name in (*inputs, "scripts/environment.sh"):
        shutil.copy(ROOT / name, checkout / name)
    (checkout / "csrc" / "a.cpp").touch()
    for tool in ("bash", "cat", "cut", "dirname", "env", "find", "grep", "rm", "sha256sum", "sort", "touch", "xargs"):
        (tools / tool).symlink_to(shutil.which(tool))
    (tools / "python3").symlink_to(sys.executable)
    warning = "setup.py:9: UserWarning: leaml_plugin._C was not built, its reference kernels stay: no such header"
    pip = f"touch {checkout}/ran" + ("; touch leaml_plugin/_C.abi3.so" if built else f"; echo '  {warning}' >&2")
    scripts = {venv_bin / "pip": pip, venv_bin / "python": ":"} | ({tools / "c++": ":"} if compiler else {})
    for path, text in scripts.items():
        path.write_text(f"#!{shutil.which('bash')}\n{text}\n")
        path.chmod(0o755)
    packages = hashlib.sha256(b"".join((checkout / name).read_bytes() for name in inputs[:2])).hexdigest()
    (venv_bin.parent / ".leaml-packages").write_text(packages)
    env = {"PATH": str(tools), "VENV": str(venv_bin.parent)}
    for again in (False, True):
        (checkout / "ran").unlink(missing_ok=True)
        script = checkout / "scripts" / "environment.sh"
        result = subprocess.run([str(tools / "bash"), str(script)], env=env, capture_output=True, text=True, check=True)
        assert (checkout / "ran").exists() == (not again or not stamped)
        assert ("tries again" in result.stderr) == (not stamped)
        if (checkout / "ran").exists():
            assert (warning in result.stderr) == (not built)


def test_lmms_eval_runs_from_the_installed_wheel(installed, tiny_models, tmp_path):
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed")
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "LEAML_STARTUP")}
    env |= {"OMP_NUM_THREADS": "1", "LEAML_CACHE": str(tmp_path / "cache"), "LEAML_SYNTHETIC_PICTURES": "40"}
    env |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}

    def run(*words) -> str:
        done = subprocess.run([installed, *map(str, words)], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout + done.stderr

    code = "import leaml_plugin, sys; print(leaml_plugin.__file__, type(sys.meta_path[0]).__name__)"
    place, finder = run("-c", code).split()
    assert Path(place).is_relative_to(installed.parents[1]) and finder == "PeftFinder"
    listed = run("-m", "lmms_eval", "--tasks", "list")
    for name in ("leaml_endoscopy", "leaml_endoscopy_families", "leaml_sports", "leaml_sports_synthetic"):
        assert f" - {name}\n" in listed
    words = ["--model", "leaml", "--model_args", f"pretrained={tiny_models('qwen2_5_vl')}", "--limit", "2"]
    words += ["--tasks", "leaml_endoscopy_synthetic", "--output_path", tmp_path / "out", "--log_samples"]
    run("-m", "lmms_eval", *words)
    (file,) = (tmp_path / "out").rglob("*_results.json")
    found = json.loads(file.read_text())
    assert 0 <= found["results"]["leaml_endoscopy_synthetic"]["exact_match,none"] <= 1
    (samples,) = (tmp_path / "out").rglob("*_samples_leaml_endoscopy_synthetic.jsonl")
    assert len(samples.read_text().splitlines()) == 2
