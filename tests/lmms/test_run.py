"""The model and the tasks through lmms-eval itself, in this process: numbers, batches, determinism, failures."""

from __future__ import annotations

import argparse
import json

import pytest
from PIL import Image

from leaml_plugin.errors import LeamlError

pytest.importorskip("lmms_eval")

from leaml_plugin import metrics
from leaml_plugin.lmms import run

SHORT = {"max_new_tokens": 4}


@pytest.fixture(scope="module")
def loaded(tiny_models):
    from leaml_plugin import models

    return models.load(tiny_models("qwen2_5_vl"), device="cpu")


@pytest.fixture(scope="module")
def report(loaded, kvasir, tmp_path_factory):
    output = tmp_path_factory.mktemp("results")
    names = ["leaml_endoscopy", "leaml_endoscopy_nopicture", "leaml_endoscopy_otherpicture"]
    done = run.evaluate(
        loaded,
        names,
        endoscopy_data=kvasir,
        label_fraction=0.2,
        batch_size=32,
        output=output,
        log_samples=True,
        gen_kwargs=SHORT,
    )
    return done, output


def test_scores_are_those_of_the_answers(report):
    """Recomputed from the logged answers with the metrics alone."""
    done, _ = report
    rows = done["samples"]["leaml_endoscopy"]
    right = [metrics.exact_match(row["answer"], row["target"]) for row in rows]
    blind = [metrics.exact_match(row["doc"]["blind"], row["target"]) for row in rows]
    results = done["results"]["leaml_endoscopy"]
    assert results["exact_match"] == pytest.approx(sum(right) / len(right))
    assert results["blind_majority"] == pytest.approx(sum(blind) / len(blind))
    assert results["above_blind"] == pytest.approx(results["exact_match"] - results["blind_majority"])
    assert done["n"]["leaml_endoscopy"] == len(rows) == 152
    low, high = results["interval_above"]
    assert low <= results["above_blind"] <= high


def test_the_files_say_the_same(report):
    done, output = report
    written = json.loads((output / "results.json").read_text())
    assert written["results"] == done["results"]
    assert written["config"]["LEAML_LABEL_FRACTION"] == "0.2"
    rows = [json.loads(line) for line in (output / "samples_leaml_endoscopy.jsonl").read_text().splitlines()]
    assert [row["answer"] for row in rows] == [row["answer"] for row in done["samples"]["leaml_endoscopy"]]


def test_the_controls_change_the_picture_and_nothing_else(report):
    done, _ = report
    own, none, other = (done["samples"][f"leaml_endoscopy{suffix}"] for suffix in ("", "_nopicture", "_otherpicture"))
    assert [row["doc"]["question"] for row in own] == [row["doc"]["question"] for row in none]
    assert [row["doc"]["img_id"] for row in own] == [row["doc"]["img_id"] for row in other]
    # random weights, but the picture reaches them
    assert [row["answer"] for row in own] != [row["answer"] for row in none]
    assert [row["answer"] for row in own] != [row["answer"] for row in other]


def test_twice_is_bit_for_bit_the_same(report, loaded, kvasir):
    done, _ = report
    settings = {"endoscopy_data": kvasir, "label_fraction": 0.2, "log_samples": True, "gen_kwargs": SHORT}
    again = run.evaluate(loaded, "leaml_endoscopy", batch_size=32, **settings)
    assert again["results"]["leaml_endoscopy"] == done["results"]["leaml_endoscopy"]
    assert again["samples"]["leaml_endoscopy"] == done["samples"]["leaml_endoscopy"]


def test_batch_of_one_answers_alike(loaded, kvasir):
    one, many = (
        run.evaluate(
            loaded, "leaml_endoscopy", endoscopy_data=kvasir, batch_size=n, limit=8, log_samples=True, gen_kwargs=SHORT
        )
        for n in (1, 12)
    )
    answers = [[row["answer"] for row in r["samples"]["leaml_endoscopy"]] for r in (one, many)]
    assert answers[0] == answers[1]


def test_families_and_controls_are_groups(loaded, kvasir):
    done = run.evaluate(
        loaded, "leaml_endoscopy_families", endoscopy_data=kvasir, limit=4, batch_size=32, gen_kwargs=SHORT
    )
    members = done["tasks"]["leaml_endoscopy_families"]
    assert members == [f"leaml_endoscopy_{family}" for family in metrics.FAMILIES]
    sizes = [done["n"][name] for name in members]
    mean = sum(n * done["results"][name]["blind_majority"] for n, name in zip(sizes, members)) / sum(sizes)
    assert done["results"]["leaml_endoscopy_families"]["blind_majority"] == pytest.approx(mean)
    assert "interval_exact" not in done["results"]["leaml_endoscopy_families"]


def test_sports_tasks(loaded, sportu):
    names = "leaml_sports,leaml_sports_asgiven,leaml_sports_nopicture,leaml_sports_otherpicture"
    everything = f"{names},leaml_sports_open,leaml_sports_text"
    done = run.evaluate(
        loaded, everything, sports_data=sportu, batch_size=8, limit=6, log_samples=True, gen_kwargs=SHORT
    )
    for name in names.split(","):
        assert 0 <= done["results"][name]["exact_match"] <= 1
        assert done["results"][name]["chance"] == pytest.approx((1 / 4 + 1 / 2 + 1 / 4) / 3)
    shuffled, given = done["samples"]["leaml_sports"], done["samples"]["leaml_sports_asgiven"]
    assert [row["doc"]["options"] for row in shuffled] != [row["doc"]["options"] for row in given]
    assert {row["doc"]["scene"] for row in shuffled} == {row["doc"]["scene"] for row in given}
    assert done["results"]["leaml_sports_open"]["rougeL"] >= 0
    assert done["results"]["leaml_sports_text"]["exact_match"] in (0, 1)


def test_synthetic_tasks_are_made_once_and_run_like_the_real_ones(loaded, monkeypatch, tmp_path):
    from leaml_plugin import worlds

    monkeypatch.setenv("LEAML_CACHE", str(tmp_path))
    monkeypatch.setenv("LEAML_SYNTHETIC_PICTURES", "20")
    settings = {"label_fraction": 0.2, "limit": 10, "log_samples": True, "gen_kwargs": SHORT}
    names = "leaml_endoscopy_synthetic,leaml_sports_synthetic"
    first = run.evaluate(loaded, names, **settings)
    assert len(first["samples"]["leaml_sports_synthetic"]) == 10

    def never(*args, **kwargs):
        raise AssertionError("drawn again")

    monkeypatch.setattr(worlds, "export", never)
    again = run.evaluate(loaded, names, **settings)
    assert again["samples"] == first["samples"]
    assert again["results"] == first["results"]


def test_other_models_of_lmms_eval_can_run_the_tasks(kvasir, sportu, monkeypatch):
    """Those of the older, simple interface take pictures and text apart."""
    from lmms_eval.tasks import get_task_dict

    monkeypatch.setenv("LEAML_ENDOSCOPY_DATA", str(kvasir))
    monkeypatch.setenv("LEAML_SPORTS_DATA", str(sportu))
    names = ["leaml_endoscopy", "leaml_sports"]
    for name, task in get_task_dict(names, run._task_manager(names), "simple").items():
        task.build_all_requests(limit=2)
        text, options, to_pictures, number, _, split = task.instances[0].args
        shown = to_pictures(task.dataset[split][number])
        assert all(isinstance(picture, Image.Image) for picture in shown)
        assert len(shown) == (1 if name == "leaml_endoscopy" else 7)
        assert task.dataset[split][number]["question"] in text
        assert options["temperature"] == 0


def test_an_unknown_task_is_suggested(loaded):
    with pytest.raises(LeamlError, match=r"unknown task 'leaml_endoscpy'; did you mean 'leaml_endoscopy"):
        run.evaluate(loaded, "leaml_endoscpy")


@pytest.mark.parametrize(
    ("tasks", "limit", "message"), [("", None, "no task was named"), ("leaml_endoscopy", 0, "limit")]
)
def test_settings_that_make_no_sense(loaded, kvasir, tasks, limit, message):
    with pytest.raises(LeamlError, match=message):
        run.evaluate(loaded, tasks, limit=limit, endoscopy_data=kvasir)


def test_data_that_cannot_be_had_are_one_sentence(loaded, tmp_path):
    with pytest.raises(LeamlError, match="no such directory"):
        run.evaluate(loaded, "leaml_endoscopy", endoscopy_data=tmp_path / "nowhere")
    with pytest.raises(LeamlError, match="LEAML_SPORTS_DATA is not set"):
        run.evaluate(loaded, "leaml_sports")


def test_the_environment_is_as_before(loaded, kvasir, monkeypatch):
    import os

    monkeypatch.setenv("LEAML_LABEL_FRACTION", "0.5")
    run.evaluate(loaded, "leaml_endoscopy", endoscopy_data=kvasir, label_fraction=0.2, limit=2, gen_kwargs=SHORT)
    assert os.environ["LEAML_LABEL_FRACTION"] == "0.5"
    assert "LEAML_ENDOSCOPY_DATA" not in os.environ


def test_an_evaluation_without_score_fails():
    raw = {
        "results": {"t": {"alias": "t", "exact_match,none": []}},
        "n-samples": {"t": {"effective": 3}},
        "group_subtasks": {},
        "samples": {},
    }
    with pytest.raises(run.EvaluationFailed, match="t: lmms-eval ended without a score"):
        run._report(raw)


def test_command_prints_a_table_and_writes_results(tiny_models, kvasir, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    run.add_arguments(parser)
    model = str(tiny_models("qwen2_5_vl"))
    arguments = ["--model", model, "--tasks", "leaml_endoscopy", "--data", str(kvasir), "--limit", "4"]
    arguments += ["--output", str(tmp_path / "out"), "--log-samples", "--batch-size", "auto", "--device", "cpu"]
    assert run.main(parser.parse_args(arguments)) == 0
    out = capsys.readouterr().out
    assert "leaml_endoscopy  (4 questions)" in out
    assert "exact_match" in out
    assert (tmp_path / "out" / "samples_leaml_endoscopy.jsonl").is_file()
    with pytest.raises(LeamlError, match="--log-samples needs --output"):
        run.main(parser.parse_args([*arguments[:6], "--log-samples"]))


# ----------------------------------------------------------------------------------------------------- the model


@pytest.fixture(scope="module", params=["qwen2_5_vl", "llava", "idefics3"])
def lm(request, tiny_models):
    from leaml_plugin.lmms.model import Leaml

    return Leaml(tiny_models(request.param), device="cpu", batch_size=3, max_frames=2)


def conversation(*parts):
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "url": part} for part in parts
    ]
    return [{"role": "user", "content": content}]


def ask(lm, conversations, **options):
    """Through the interface that lmms-eval uses."""
    from lmms_eval.api.instance import Instance

    lm.task_dict = {"t": {"test": conversations}}
    requests = [
        Instance(
            request_type="generate_until",
            arguments=(str(c)[:20], lambda doc: doc, {"max_new_tokens": 6, "until": [], **options}, i, "t", "test"),
            idx=0,
            metadata={"task": "t", "doc_id": i, "repeats": 1},
        )
        for i, c in enumerate(conversations)
    ]
    return [answer.text for answer in lm.generate_until(requests)]


def pictures(n):
    return [Image.new("RGB", (40 + 8 * i, 56), (50 * i, 90, 200 - 40 * i)) for i in range(n)]


def test_any_mixture_in_one_batch_answers_as_alone(lm, tmp_path):
    from real_schema import write_frames

    a, b, c = pictures(3)
    a.save(tmp_path / "a.png")
    write_frames(tmp_path / "clip", 4, 0)
    clip = {"type": "video", "url": str(tmp_path / "clip")}
    mixture = [
        conversation("Only text"),
        conversation(a, "One picture"),
        conversation(tmp_path / "a.png", "One picture"),
        conversation(b, "between", c, "Two pictures"),
        [{"role": "user", "content": [{"type": "video", "url": [a, b]}, {"type": "text", "text": "Frames"}]}],
        [{"role": "user", "content": [clip, {"type": "text", "text": "?"}]}],
        [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, *conversation("Hello")],
    ]
    together = ask(lm, mixture)
    alone = [ask(lm, [one])[0] for one in mixture]
    assert together == alone
    assert together[1] == together[2], "a path is the picture it names"


def test_equal_numbers_of_pictures_are_encoded_together_and_answer_as_alone(lm, monkeypatch):
    same = [conversation(picture, f"Question {i}" * (i + 1)) for i, picture in enumerate(pictures(6))]
    alone = [ask(lm, [one])[0] for one in same]

    def never(conversation):
        raise AssertionError("encoded one by one")

    assert ask(lm, same[:3]) + ask(lm, same[3:]) == alone
    monkeypatch.setattr(lm.collator, "_alone", never)
    assert ask(lm, same) == alone


def test_too_long_is_an_error_that_names_the_conversation(lm, monkeypatch):
    monkeypatch.setattr(lm.collator, "max_length", 300)
    assert len(ask(lm, [conversation("short")] * 2)) == 2
    with pytest.raises(LeamlError, match=r"t document 1: \d+ tokens do not fit the limit of 300"):
        ask(lm, [conversation("short"), conversation("long " * 400)])


def test_stops_and_lengths_are_kept(lm):
    whole = ask(lm, [conversation(pictures(1)[0], "Question")])[0]
    assert len(whole) > 2
    cut = ask(lm, [conversation(pictures(1)[0], "Question")], until=[whole[1]])[0]
    assert cut == whole.split(whole[1], 1)[0].strip()


@pytest.mark.parametrize(
    ("options", "sampled", "temperature"),
    [
        ({}, False, None),
        ({"temperature": 0, "do_sample": False, "top_p": 0.9}, False, None),
        ({"temperature": 0, "do_sample": True}, False, None),
        ({"do_sample": True}, True, 1.0),
        ({"temperature": 0.7}, True, 0.7),
        ({"temperature": 0.7, "do_sample": False}, False, None),
    ],
)
def test_the_task_decides_how_to_decode(lm, options, sampled, temperature):
    made = lm._config(options)
    assert made.do_sample is sampled
    if sampled:
        assert made.temperature == temperature
    else:
        assert made.top_p in (None, 1.0)
    assert made.repetition_penalty == 1.0
    assert made.max_new_tokens == 64


def test_what_it_cannot_read_is_named(lm):
    with pytest.raises(LeamlError, match=r"t document 0: holds audio"):
        ask(lm, [[{"role": "user", "content": [{"type": "audio", "url": "a.wav"}]}]])
    with pytest.raises(LeamlError, match=r"t document 0: a picture is given as int"):
        ask(lm, [conversation(3, "?")])


def test_text_cannot_forge_a_picture(lm):
    token = getattr(lm.collator.processor, "image_token", "<image>")
    assert len(ask(lm, [conversation(pictures(1)[0], f"What does {token} mean?")])) == 1


def test_memory_that_runs_out_halves_the_batch(lm, monkeypatch):
    import torch

    generate = lm._generate_batch
    sizes = []

    def small_memory(batch, options):
        sizes.append(len(batch["input_ids"]))
        if sizes[-1] > 1:
            raise torch.OutOfMemoryError("out of memory")
        return generate(batch, options)

    wanted = ask(lm, [conversation(f"Question {i}") for i in range(3)])
    monkeypatch.setattr(lm, "_generate_batch", small_memory)
    monkeypatch.setattr(lm, "batch_size_per_gpu", 3)
    assert ask(lm, [conversation(f"Question {i}") for i in range(3)]) == wanted
    assert max(sizes) == 3
    assert sizes.count(1) == 3


def test_unknown_model_arguments_are_suggested(tiny_models):
    from leaml_plugin.lmms.model import Leaml

    with pytest.raises(LeamlError, match=r"unknown model argument 'adaptor'; did you mean 'adapter'"):
        Leaml(tiny_models("qwen2_5_vl"), adaptor="x")
    with pytest.raises(LeamlError, match="batch_size must be a number"):
        Leaml(tiny_models("qwen2_5_vl"), device="cpu", batch_size="many")


def test_an_adapter_changes_the_answers(tiny_models, tmp_path):
    import torch
    from peft import LoraConfig, get_peft_model

    from leaml_plugin import models
    from leaml_plugin.lmms.model import Leaml

    base = models.load(tiny_models("qwen2_5_vl"), device="cpu")
    tuned = get_peft_model(base.model, LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False))
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora" in name:
                weight.normal_(std=0.5)
    tuned.save_pretrained(tmp_path)
    question = [conversation(pictures(1)[0], "Question")]
    plain, adapted = (
        ask(Leaml(tiny_models("qwen2_5_vl"), adapter=adapter, device="cpu"), question) for adapter in (None, tmp_path)
    )
    assert plain != adapted
