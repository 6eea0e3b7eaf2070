"""``leaml adapt`` with its generator elsewhere: on a server, and in a stand-in for vLLM."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "teachers"))
from fake_server import FakeServer, Reply, serving
from test_backends import fake_vllm, write
from test_pipeline import arguments, make_project, tree

from leaml_plugin import cli
from leaml_plugin.artifacts import read_records
from leaml_plugin.records import PseudoQA

# what the stand-ins write is no pair, so the filter keeps nothing and fine-tuning has the labels alone
SERVER = ["generate.backend=server", "generate.engine.server.backoff=0.01", "generate.engine.server.wait=0"]


@pytest.fixture
def project(tmp_path, pictures):
    return make_project(tmp_path, pictures)


def sets(*settings: str) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def pairs(run: Path) -> list[PseudoQA]:
    return [p for shard in sorted((run / "stages" / "generate").glob("part-*")) for p in read_records(shard, PseudoQA)]


def test_a_run_stops_until_its_generator_is_served_and_goes_on(project, tiny_models, capsys):
    model = tiny_models("llava")
    words = arguments(project, model, "run", *sets(*SERVER, "generate.engine.url=http://127.0.0.1:9/v1"))
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert "no connection" in said and "vllm serve" in said and "Then repeat the command" in said
    generator = Path(said.partition("The generator lies in ")[2].partition(";")[0])
    name = said.partition("--served-model-name ")[2].split()[0]
    assert json.loads((generator / "config.json").read_text())["model_type"] == "llava"

    broken = []

    def once(body, number):
        if number == 5 and not broken:
            broken.append(True)
            return Reply(401, {})
        return write(body, number)

    with serving(FakeServer(once, (name,))) as server:
        words = arguments(project, model, "run", *sets(*SERVER, f"generate.engine.url={server.url}"))
        assert cli.main(words) == 2
        assert "API key" in capsys.readouterr().err
        assert cli.main(words) == 0
        done = pairs(project / "run")
        assert [p.id for p in done] == [f"{n}.jpg#{s}" for n in range(6) for s in range(2)]
        assert {p.logprob for p in done} == {-1.0}
        # another shard size asks the same with the same seeds
        other = arguments(project, model, "other", *sets(*SERVER, f"generate.engine.url={server.url}"))
        assert cli.main([*other, *sets("generate.shard_size=5", f"generate.engine.model={name}")]) == 0
    assert pairs(project / "other") == done
    assert not (project / "run" / "stages" / "generate" / "work").exists()


def test_vllm_in_process(project, tiny_models, monkeypatch, capsys):
    model = tiny_models("llava")
    monkeypatch.setitem(sys.modules, "vllm", None)
    words = arguments(
        project, model, "run", *sets("generate.backend=vllm", 'generate.engine.options={"max_model_len": 512}')
    )
    assert cli.main(words) == 2
    assert "pip install vllm" in capsys.readouterr().err and not (project / "run").exists()
    module = fake_vllm()
    monkeypatch.setitem(sys.modules, "vllm", module)
    assert cli.main(words) == 0
    (engine,) = module.engines
    assert engine.ended and engine.options["max_model_len"] == 512 and engine.options["dtype"] == "float32"
    assert engine.model.endswith("generate/work/rank-0/generator")
    assert [p.id for p in pairs(project / "run")] == [f"{n}.jpg#{s}" for n in range(6) for s in range(2)]
    before = tree(project / "run")
    assert cli.main(words) == 0 and tree(project / "run") == before and len(module.engines) == 1


def test_filters_by_likelihood_need_log_probabilities(project, tiny_models, capsys):
    settings = [*SERVER, "generate.engine.url=http://h", "generate.engine.logprobs=false", "filter.min_logprob=-3"]
    assert cli.main(arguments(project, tiny_models("llava"), "run", *sets(*settings))) == 2
    assert "need generate.engine.logprobs=true" in capsys.readouterr().err
