"""``leaml adapt --teacher``: the captions come first, the rest of the run is that of a captions file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "teachers"))
from fake_server import FakeServer, Reply, describe, serving
from test_pipeline import FAST, make_project, tree

from leaml_plugin import cli
from leaml_plugin.artifacts import read_records
from leaml_plugin.records import Picture

QUICK = ["--set", "caption.server.backoff=0.01", "--set", "caption.server.wait=2", "--set", "caption.encoding=png"]


@pytest.fixture
def project(tmp_path, pictures):
    return make_project(tmp_path, pictures)


def arguments(project: Path, model: Path, output: str, *more: str) -> list[str]:
    return [
        "adapt", "--model", str(model), "--labeled", str(project / "train.jsonl"),
        "--unlabeled", str(project / "images"), "--output", str(project / output), *FAST, *more,
    ]  # fmt: skip


def test_a_server_as_teacher(project, tiny_models, capsys, monkeypatch):
    """The same adapter as with a file that holds the server's captions; a finished run asks nobody."""
    monkeypatch.setenv("LEAML_API_KEY", "sk-adapt-secret")
    model = tiny_models("llava")
    with serving(FakeServer(lambda body, n: describe(body))) as server:
        words = arguments(project, model, "run", "--teacher", server.url, *QUICK)
        assert cli.main(words) == 0
        assert "6 captions of 6 pictures" in capsys.readouterr().err
        port = server.url
    assert cli.main(words) == 0  # nobody is there any more
    run = project / "run"
    pictures = list(read_records(run / "stages" / "caption" / "pictures.jsonl", Picture))
    assert [p.caption[:12] for p in pictures] == ["A picture of"] * 6
    assert "teacher" in json.loads((run / "config.json").read_text())["config"]["caption"]
    assert port not in (run / "config.json").read_text()  # the server may move
    assert b"sk-adapt-secret" not in b"".join(tree(run).values())
    assert "A picture of" in (run / "report.html").read_text()

    captions = [{"id": p.id, "caption": p.caption} for p in pictures]
    (project / "own.jsonl").write_text("".join(json.dumps(c) + "\n" for c in captions))
    assert cli.main(arguments(project, model, "file", "--captions", str(project / "own.jsonl"))) == 0
    assert tree(run / "adapter") == tree(project / "file" / "adapter")


def test_only_pictures_without_caption_are_asked_about(project, tiny_models):
    some = (project / "captions.jsonl").read_text().splitlines()[:4]
    (project / "some.jsonl").write_text("\n".join(some))
    captions = ["--captions", str(project / "some.jsonl")]
    with serving(FakeServer(lambda body, n: describe(body))) as server:
        words = arguments(project, tiny_models("llava"), "run", "--teacher", server.url, *captions, *QUICK)
        assert cli.main(words) == 0
        assert len(server.requests) == 2
    found = list(read_records(project / "run" / "stages" / "caption" / "pictures.jsonl", Picture))
    assert found[0].caption == "A spot on ground number 0." and found[5].caption.startswith("A picture of")


def test_a_server_that_is_not_there_ends_the_run_before_anything_is_trained(project, tiny_models, capsys):
    words = arguments(project, tiny_models("llava"), "run", "--teacher", "http://127.0.0.1:9/v1", *QUICK)
    assert cli.main([*words, "--set", "caption.server.wait=0"]) == 2
    assert "start the server, or correct the address" in capsys.readouterr().err
    with serving(FakeServer(lambda body, n: Reply(401, {}))) as server:
        words[words.index("http://127.0.0.1:9/v1")] = server.url
        assert cli.main(words) == 2
        assert "an API key is wanted" in capsys.readouterr().err
        assert not (project / "run" / "stages" / "relevance").exists()
        server.answer = lambda body, n: describe(body)
        assert cli.main(words) == 0  # another address and other server settings are no other run


def test_a_local_model_as_teacher(project, tiny_models, capsys, monkeypatch):
    monkeypatch.setattr("leaml_plugin.teachers.prompt.TeacherPrompt.is_refusal", lambda self, text: False)
    teacher = ["--teacher", f"model:{tiny_models('qwen2_5_vl')}", "--set", "caption.max_tokens=5"]
    assert cli.main(arguments(project, tiny_models("llava"), "run", *teacher)) == 0
    assert "captions of 6 pictures" in capsys.readouterr().err
    assert cli.main(arguments(project, tiny_models("llava"), "no", "--teacher", "model:nowhere/at-all")) == 2
    assert "nowhere/at-all" in capsys.readouterr().err and not (project / "no").exists()


def test_without_teacher_or_captions_the_run_does_not_begin(project, tiny_models, capsys):
    assert cli.main(arguments(project, tiny_models("llava"), "run")) == 2
    assert "give --captions or --teacher" in capsys.readouterr().err
