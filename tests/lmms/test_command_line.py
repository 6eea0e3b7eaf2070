"""Plain ``lmms-eval`` in processes of its own: found without a flag, two ranks like one, other plugins' failures."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lmms_eval")
pytestmark = pytest.mark.slow

HOOK = Path(__file__).parents[2] / "leaml_plugin_startup.pth"


def lmms_eval(cwd: Path, *arguments: str, ranks: int = 1, **environment: str) -> subprocess.CompletedProcess:
    launcher = [sys.executable, "-m"]
    if ranks > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        launcher += ["torch.distributed.run", f"--nproc_per_node={ranks}", f"--master_port={port}", "-m"]
    return subprocess.run(
        [*launcher, "lmms_eval", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment},
        check=False,
    )


def results(directory: Path) -> tuple[dict, list[dict]]:
    (file,) = directory.rglob("*_results.json")
    (samples,) = directory.rglob("*_samples_leaml_endoscopy.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    return json.loads(file.read_text())["results"]["leaml_endoscopy"], sorted(rows, key=lambda row: row["doc_id"])


def test_one_rank_two_ranks_and_in_process_agree_bit_for_bit(tiny_models, kvasir, tmp_path):
    from leaml_plugin.lmms import run

    model = str(tiny_models("qwen2_5_vl"))
    arguments = ["--model", "leaml", "--model_args", f"pretrained={model}", "--tasks", "leaml_endoscopy"]
    arguments += ["--batch_size", "8", "--gen_kwargs", "max_new_tokens=4", "--log_samples", "--limit", "60"]
    (tmp_path / "leaml_endoscopy").mkdir()  # lmms-eval would look for task files in it
    found = []
    for ranks in (1, 2):
        out = tmp_path / f"out{ranks}"
        done = lmms_eval(tmp_path, *arguments, "--output_path", str(out), ranks=ranks, LEAML_ENDOSCOPY_DATA=str(kvasir))
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(results(out))
    (one, one_rows), (two, two_rows) = found
    answers = [[row["filtered_resps"] for row in rows] for rows in (one_rows, two_rows)]
    assert len(one_rows) == len(two_rows) == 60
    assert answers[0] == answers[1]
    numbers = [name for name in one if "," in name and "stderr" not in name]
    assert {name: one[name] for name in numbers} == {name: two[name] for name in numbers}
    report = run.evaluate(
        model,
        "leaml_endoscopy",
        endoscopy_data=kvasir,
        batch_size=8,
        limit=60,
        device="cpu",
        gen_kwargs={"max_new_tokens": 4},
    )
    assert report["results"]["leaml_endoscopy"] == {name.split(",")[0]: one[name] for name in numbers}


def test_without_data_the_last_words_say_how_to_get_them(tiny_models, tmp_path):
    model = str(tiny_models("qwen2_5_vl"))
    done = lmms_eval(tmp_path, "--model", "leaml", "--model_args", f"pretrained={model}", "--tasks", "leaml_endoscopy")
    assert "set LEAML_ENDOSCOPY_DATA=kvasir-vqa, or use the task leaml_endoscopy_synthetic" in done.stdout + done.stderr


BROKEN = "def register():\n    raise RuntimeError('another plugin fails')\n"


@pytest.fixture
def broken_plugin(tmp_path) -> dict[str, str]:
    """The environment of a process in which another package's plugin comes before ours and fails.

    The start-up hook is the file that an installation puts beside the package (``tests/test_packaging.py``).
    """
    site = tmp_path / "site"
    info = site / "broken_plugin-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "broken_plugin.py").write_text(BROKEN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken_plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[lmms_eval.models]\nbroken = broken_plugin:register\n")
    shutil.copy(HOOK, site)
    (site / "sitecustomize.py").write_text(f"import site; site.addsitedir({str(site)!r})")
    return {"PYTHONPATH": str(site)}


def test_another_plugins_failure_leaves_leaml_eval_whole(tmp_path, tiny_models, kvasir, broken_plugin):
    arguments = ["eval", "--model", str(tiny_models("qwen2_5_vl")), "--tasks", "leaml_endoscopy", "--data", str(kvasir)]
    arguments += ["--limit", "2", "--device", "cpu"]
    code = f"import sys; from leaml_plugin.cli import main; sys.exit(main({arguments!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, **broken_plugin},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "another plugin fails" in done.stdout + done.stderr
    assert "leaml_endoscopy  (2 questions)" in done.stdout


def test_plain_lmms_eval_lists_the_tasks_whatever_fails_and_whatever_lies_in_the_working_directory(
    tmp_path, broken_plugin
):
    for name in ("endoscopy", "sports", "tasks"):
        (tmp_path / name).mkdir()
    done = lmms_eval(tmp_path, "--tasks", "list", **broken_plugin)
    assert "plugin 'broken' (broken_plugin:register) failed and is left out" in done.stderr
    for name in ("leaml_endoscopy", "leaml_endoscopy_families", "leaml_sports", "leaml_sports_synthetic"):
        assert f" - {name}\n" in done.stdout + done.stderr


def test_commands_that_read_no_plugins_know_the_tasks(tmp_path, broken_plugin):
    done = lmms_eval(tmp_path, "tasks", "list", **broken_plugin)
    assert "leaml_endoscopy" in done.stdout + done.stderr


def test_the_hook_is_for_lmms_eval_alone(tmp_path, broken_plugin):
    code = "import sys; print('leaml_plugin' in sys.modules)"
    env = {**os.environ, **broken_plugin}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert done.stdout.split()[0] == "False"
    assert done.stderr == ""
