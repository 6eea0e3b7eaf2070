"""Back ends of the QA generator: vLLM by a stand-in module of its documented interface, servers by a small one."""

from __future__ import annotations

import json
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent / "teachers"))
from fake_server import FakeServer, Reply, completion, picture_of, serving

from leaml_plugin import backends, models
from leaml_plugin.backends import EngineConfig, model_directory, name_of, opened
from leaml_plugin.data import Collator, Prompts
from leaml_plugin.data.prompts import Turn
from leaml_plugin.errors import LeamlError
from leaml_plugin.inference import Generated, Sampling
from leaml_plugin.records import ImageRef
from leaml_plugin.teachers.client import ServerConfig

SERVER = ServerConfig(concurrency=3, backoff=0.01, max_backoff=0.05, wait=2.0, timeout=10.0, retries=1)
SAMPLING = Sampling(temperature=0.8, top_p=0.9, seed=5)


@pytest.fixture(scope="module")
def turns(tmp_path_factory) -> list[Turn]:
    root = tmp_path_factory.mktemp("pictures")
    out = []
    for n in range(5):
        path = root / f"{n}.png"
        Image.new("RGB", (30 + n, 40), (50 * n, 20, 90)).save(path)
        out.append(Turn(f"p{n}", (ImageRef(str(path)),), "Ask and answer.", source=f"picture p{n}"))
    return out


@pytest.fixture
def weights(tiny_models) -> dict[str, Any]:
    return {"path": tiny_models("llava")}


# -- a stand-in for vLLM ---------------------------------------------------------------------------------------------


@dataclass
class Logprob:
    logprob: float


@dataclass
class Output:
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: Any
    finish_reason: str = "stop"


def fake_vllm(total: bool = True, longest: int = 10**6) -> types.ModuleType:
    """A module with vLLM's ``LLM`` and ``SamplingParams``; a text depends on prompt, picture and seed alone."""
    module = types.ModuleType("vllm")
    module.engines = []
    known = {"n", "temperature", "top_p", "seed", "max_tokens", "logprobs", "stop_token_ids"}

    class SamplingParams:
        def __init__(self, **options):
            assert set(options) <= known
            self.__dict__.update({"seed": None, "logprobs": None, **options})

    class LLM:
        def __init__(self, model, **options):
            self.model, self.options, self.calls, self.ended = model, options, [], False
            module.engines.append(self)

        def generate(self, prompts, sampling_params, *, use_tqdm=True):
            assert len(prompts) == len(sampling_params) and not use_tqdm
            self.calls.append((prompts, sampling_params))
            for prompt in prompts:
                if len(prompt["prompt"]) > longest:
                    raise ValueError("The decoder prompt is longer than the maximum model length.")
            return [types.SimpleNamespace(outputs=[self.write(*pair)]) for pair in zip(prompts, sampling_params)]

        def write(self, prompt, params):
            width = prompt["multi_modal_data"]["image"][0].width
            text = f" wide {width} seed {params.seed}"
            ids = list(range(7, 7 + len(text.split())))
            steps = [{i: Logprob(-0.25)} for i in ids] if params.logprobs is not None else None
            sums = -0.25 * len(ids) if total and steps else None
            return Output(text, ids, sums, steps, "length" if params.max_tokens < 4 else "stop")

        def shutdown(self):
            self.ended = True

    module.LLM, module.SamplingParams = LLM, SamplingParams
    return module


def run(name: str, config: EngineConfig, weights, turns, tmp_path, **options) -> list[Generated]:
    with opened(
        name, config, load=None, collator=None, prompts=Prompts.load(), weights=weights, work=tmp_path
    ) as write:
        return list(write(turns, progress=False, **options))


@pytest.mark.parametrize("total", [True, False])
def test_vllm(turns, weights, tmp_path, monkeypatch, total):
    module = fake_vllm(total)
    monkeypatch.setitem(sys.modules, "vllm", module)
    config = EngineConfig(options={"gpu_memory_utilization": 0.5})
    options = {"sampling": SAMPLING, "num_samples": 2, "return_logprobs": True, "batch_size": 4, "max_new_tokens": 20}
    texts = run("vllm", config, weights, turns, tmp_path, **options)
    (engine,) = module.engines
    assert engine.model == str(weights["path"]) and engine.ended
    assert engine.options["limit_mm_per_prompt"] == {"image": 1} and engine.options["gpu_memory_utilization"] == 0.5
    assert engine.options["trust_remote_code"] is False
    prompts, parameters = engine.calls[0]
    loaded = models.load_processor(weights["path"])
    assert prompts[0]["prompt"] == Collator(loaded).prompt_text(turns[0])
    assert prompts[0]["prompt"].count("<image>") == 1 and "Ask and answer." in prompts[0]["prompt"]
    assert (parameters[0].temperature, parameters[0].top_p, parameters[0].max_tokens) == (0.8, 0.9, 20)
    assert parameters[0].stop_token_ids == [loaded.tokenizer.eos_token_id]
    assert [(t.id, t.sample) for t in texts] == [(f"p{n}", s) for n in range(5) for s in range(2)]
    assert texts[0].text.startswith("wide 30 seed ") and texts[0].tokens == 4 and texts[0].finished
    assert [t.logprob for t in texts] == pytest.approx([-0.25] * 10)
    assert len({t.text.split()[-1] for t in texts}) == 10

    shuffled = run("vllm", config, weights, turns[::-1], tmp_path, **{**options, "batch_size": 1})
    assert sorted(shuffled, key=lambda t: (t.id, t.sample)) == texts


def test_vllm_greedy_prefixes_and_what_it_refuses(turns, weights, tmp_path, monkeypatch):
    module = fake_vllm(longest=400)
    monkeypatch.setitem(sys.modules, "vllm", module)
    bad = Turn("bad", (ImageRef(str(tmp_path / "missing.png")),), "Ask.")
    long = Turn("long", turns[0].images, "x" * 500)
    begun = Turn("begun", turns[0].images, "Ask.", prefixes=("Question: How many", ""))
    failed: list[tuple[str, str]] = []
    texts = run(
        "vllm",
        EngineConfig(),
        weights,
        [bad, long, begun, turns[1]],
        tmp_path,
        sampling=SAMPLING,
        num_samples=2,
        max_new_tokens=21,
        on_error=lambda turn, error: failed.append((turn.id, str(error))),
    )
    assert [t.id for t in texts] == ["begun", "begun", "p1", "p1"]
    assert texts[0].text.startswith("Question: How many wide 30") and texts[1].text.startswith("wide 30")
    assert [f[0] for f in failed] == ["bad", "long"] and "longer than the maximum" in failed[1][1]
    forced = len(" Question: How many")  # a token a byte
    prompts, parameters = module.engines[0].calls[-4]
    assert prompts[0]["prompt"].endswith("Question: How many") and parameters[0].max_tokens == 21 - forced
    assert texts[0].tokens == forced + 4
    with pytest.raises(LeamlError, match=r"picture p0: .*refuses it"):
        run("vllm", EngineConfig(), weights, [Turn("p0", turns[0].images, "x" * 500, source="picture p0")], tmp_path)
    greedy = run("vllm", EngineConfig(), weights, turns[:1], tmp_path, max_new_tokens=3)
    assert greedy[0].text == "wide 30 seed None" and greedy[0].logprob == 0.0 and not greedy[0].finished
    assert all(engine.ended for engine in module.engines)


def test_vllm_before_shutdown_had_a_name(turns, weights, tmp_path, monkeypatch):
    module = fake_vllm()
    ended = []
    core = types.SimpleNamespace(shutdown=lambda: ended.append(True))
    del module.LLM.shutdown
    module.LLM.llm_engine = types.SimpleNamespace(engine_core=core)
    monkeypatch.setitem(sys.modules, "vllm", module)
    run("vllm", EngineConfig(), weights, turns[:1], tmp_path)
    assert ended == [True]


def test_vllm_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(LeamlError, match="pip install vllm"):
        EngineConfig().check("vllm")
    monkeypatch.setitem(sys.modules, "vllm", fake_vllm())
    EngineConfig().check("vllm")


# -- a server --------------------------------------------------------------------------------------------------------


def write(body: dict[str, Any], number: int) -> dict[str, Any]:
    begun = body["messages"][-1]["content"] if body["messages"][-1]["role"] == "assistant" else ""
    picture = picture_of({"messages": [m for m in body["messages"] if m["role"] == "user"]})
    said = completion(f"{' many? ' if begun else ''}wide {picture.width} seed {body.get('seed')}")
    if body.get("logprobs"):
        said["choices"][0]["logprobs"] = {"content": [{"token": "x", "logprob": -0.5}, {"token": "y", "logprob": -1.5}]}
    return said


def engine(url: str, **options) -> EngineConfig:
    return EngineConfig(**{"url": url, "model": "tiny", "server": SERVER, **options})


def test_a_server(turns, weights, tmp_path):
    options = {"sampling": SAMPLING, "num_samples": 3, "return_logprobs": True, "max_new_tokens": 20}
    with serving(FakeServer(write)) as server:
        texts = run("server", engine(server.url, extra={"top_k": -1}), weights, turns, tmp_path, **options)
        bodies = {(picture_of(b).width, b["seed"]) for b in server.requests}
        assert {b["max_tokens"] for b in server.requests} == {20} and {b["top_k"] for b in server.requests} == {-1}
        assert len(bodies) == 15 and picture_of(server.requests[0]).format == "PNG"
        again = run("server", engine(server.url), weights, turns[::-1], tmp_path, **options)
    assert [(t.id, t.sample) for t in texts] == [(f"p{n}", s) for n in range(5) for s in range(3)]
    assert texts[0].text.startswith("wide 30 seed ") and texts[0].logprob == -1.0 and texts[0].tokens == 4
    assert sorted(again, key=lambda t: (t.id, t.sample)) == texts


def test_a_server_goes_on_from_a_given_beginning(turns, weights, tmp_path):
    turn = Turn("p", turns[0].images, "Ask.", prefixes=("Question: How",))
    with serving(FakeServer(write)) as server:
        (text,) = run("server", engine(server.url), weights, [turn], tmp_path)
        body = server.requests[0]
    assert body["messages"][-1] == {"role": "assistant", "content": "Question: How"}
    assert body["continue_final_message"] is True and body["add_generation_prompt"] is False
    assert text.text == "Question: How many? wide 30 seed None"


def test_a_picture_that_the_server_refuses_fails_alone(turns, weights, tmp_path):
    def answer(body, number):
        return Reply(400, {"error": {"message": "too large"}}) if picture_of(body).width == 32 else write(body, number)

    bad = Turn("bad", (ImageRef(str(tmp_path / "missing.png")),), "Ask.")
    failed: list[tuple[str, str]] = []
    with serving(FakeServer(answer)) as server:
        texts = run(
            "server",
            engine(server.url),
            weights,
            [bad, *turns],
            tmp_path,
            sampling=SAMPLING,
            num_samples=2,
            on_error=lambda turn, error: failed.append((turn.id, str(error))),
        )
    assert [t.id for t in texts[::2]] == ["p0", "p1", "p3", "p4"]
    assert [f[0] for f in failed] == ["bad", "p2"] and "too large" in failed[1][1]


def test_a_server_without_log_probabilities(turns, weights, tmp_path):
    def silent(body, number):
        said = write(body, number)
        said["choices"][0].pop("logprobs", None)
        return said

    wanted = r"generate\.engine\.logprobs=false"
    with serving(FakeServer(silent)) as server, pytest.raises(LeamlError, match=wanted):
        run("server", engine(server.url), weights, turns, tmp_path, return_logprobs=True)
    with serving(FakeServer(silent)) as server:
        options = engine(server.url, logprobs=False)
        assert run("server", options, weights, turns[:1], tmp_path, return_logprobs=True)[0].logprob == 0.0
        assert "logprobs" not in server.requests[0]


def test_the_server_must_hold_this_generator(turns, weights, tmp_path):
    """Unless told otherwise, the name that a run gives its generator keeps another run's server from being used."""
    name = name_of(weights["path"])
    assert name.startswith("leaml-") and len(name) == len("leaml-") + 8
    config = {"model": "", "server": ServerConfig(wait=0.0)}
    with serving(FakeServer(write, ("leaml-00000000",))) as server:
        with pytest.raises(LeamlError, match=rf"serves no model {name} \(it has leaml-0+\).*vllm serve .*{name}"):
            run("server", engine(server.url, **config), weights, turns, tmp_path)
        assert not server.requests
        server.models = (name,)
        assert len(run("server", engine(server.url, **config), weights, turns, tmp_path)) == 5
    with pytest.raises(LeamlError, match=r"no connection .*vllm serve"):
        run("server", engine("http://127.0.0.1:9", **config), weights, turns, tmp_path)


LAUNCHED = """
import sys
sys.path.insert(0, {tests!r})
from fake_server import FakeServer, completion, serving
with serving(FakeServer(lambda body, n: completion("from " + sys.argv[1]), (sys.argv[2],)), int(sys.argv[3])):
    import time
    time.sleep(60)
"""


def test_a_server_that_the_run_starts_itself(turns, weights, tmp_path):
    script = tmp_path / "serve.py"
    script.write_text(LAUNCHED.format(tests=str(Path(__file__).parent / "teachers")))
    command = f"{sys.executable} {script} {{model}} {{name}} {{port}}"
    config = EngineConfig(launch=command, server=SERVER)
    started: list[Any] = []
    real = backends.subprocess.Popen
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends.subprocess, "Popen", lambda *a, **k: started.append(real(*a, **k)) or started[0])
        (text,) = run("server", config, weights, turns[:1], tmp_path)
    assert text.text == f"from {weights['path']}"
    assert started[0].poll() is not None  # it ended with the stage
    broken = EngineConfig(launch=f"{sys.executable} -c 'raise SystemExit(3)' {{model}} {{port}}", server=SERVER)
    with pytest.raises(LeamlError, match="ended with code 3 before it answered"):
        run("server", broken, weights, turns[:1], tmp_path)
    with pytest.raises(LeamlError, match="'no-such-program' is no program here"):
        run("server", EngineConfig(launch="no-such-program {model} {port}"), weights, turns, tmp_path)


# -- settings and weights --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"url": "ftp://x"}, "no address of a server"),
        ({"launch": "vllm serve --port {port}"}, "must contain {model}"),
        ({"launch": "vllm serve {model}"}, "must contain {port}"),
        ({"encoding": "gif"}, "known are png and jpeg"),
    ],
)
def test_impossible_settings(options, words):
    with pytest.raises(LeamlError, match=words):
        EngineConfig(**options)


def test_unknown_back_ends_and_servers_without_address():
    with pytest.raises(LeamlError, match="did you mean 'vllm'"):
        EngineConfig().check("vlm")
    with pytest.raises(LeamlError, match=r"needs engine\.url"):
        EngineConfig().check("server")


def test_what_decides_the_texts():
    there = EngineConfig(url="http://a", server=ServerConfig(concurrency=1), options={"seed": 1})
    moved = EngineConfig(url="http://b", launch="x {model} {port}", options={"seed": 2})
    assert there.identity("server") == moved.identity("server") != EngineConfig(extra={"top_k": 1}).identity("server")
    assert there.identity("transformers") == moved.identity("transformers") == {}
    assert there.identity("vllm") != moved.identity("vllm")


def test_an_adapter_is_merged_into_a_directory(tiny_models, tmp_path):
    """The merged directory answers as base and adapter do."""
    import torch
    from peft import LoraConfig, get_peft_model

    base = tiny_models("qwen2_5_vl")
    torch.manual_seed(0)
    loaded = models.load(base, dtype="float32", device="cpu")
    tuned = get_peft_model(loaded.model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "adapter")
    merged = model_directory({"path": base, "adapter": tmp_path / "adapter"}, tmp_path / "work")
    assert merged == tmp_path / "work" / "generator" and json.loads((merged / "config.json").read_text())
    from leaml_plugin.tuner import max_logit_difference

    again = models.load(merged, dtype="float32", device="cpu")
    assert max_logit_difference(tuned, again.model) < 1e-4
    assert name_of(merged) != name_of(base)
    assert model_directory({"path": base}, tmp_path) == base
