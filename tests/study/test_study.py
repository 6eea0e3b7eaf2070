"""The study end to end on a random checkpoint: every method, resumption, tables, page, plot and the command."""

from __future__ import annotations

import dataclasses
import json

import pytest

from leaml_plugin import study as command
from leaml_plugin.errors import LeamlError
from leaml_plugin.report.markdown import MARKS
from leaml_plugin.study import summary, tuning
from leaml_plugin.study.protocol import (
    GRID,
    LEARNING_RATES,
    METHODS,
    ORDER,
    VQA_RATES,
    Protocol,
    budget_of,
    check_methods,
    learning_rate,
    trained,
    tuned,
    vqa_rate,
)
from leaml_plugin.study.runner import Job, identity, load_results, resolve, result_path, run_all


@pytest.fixture(scope="module")
def results(study, tmp_path_factory):
    directory = tmp_path_factory.mktemp("results")
    jobs = [Job("endoscopy", method, budget_of(method, 0.25), seed) for method in ORDER for seed in (0, 1)]
    paths, left = run_all(study, jobs, directory)
    assert left == 0 and len(paths) == 2 * len(ORDER)
    return directory, paths


def test_every_method_runs_and_says_what_it_did(results):
    for result in load_results(results[1]):
        spec = METHODS[result["method"]]
        assert 0 <= result["accuracy"] <= 1 and result["questions"]["count"] == 12
        assert result["label_pictures"] == {"all-labels": 12, "zero-shot": 0}.get(result["method"], 3)
        assert (result["forgetting"] is None) == (spec.kind == "blind")
        assert bool(result.get("pseudo")) == (spec.kind == "pseudo")
        assert set(result["code"]) == {"version", "commit", "sources", "torch"}
        stages = result["config"]["stages"]
        steps = {name: stages[name]["train"]["steps"] for name in ("generator", "joint", "finetune") if name in stages}
        generator = steps.pop("generator", 0)
        assert list(steps.values()) == ([4 + 2 * spec.longer] if trained(result["method"]) else []), "equal steps"
        assert generator == (2 if spec.kind == "pseudo" else 0)


def test_ablations_differ_where_they_should(study):
    def stages(method):
        return resolve(study.protocol, method, 0, 1e-3, 1e-3)["stages"]

    ours = stages("leaml")
    assert stages("no-distillation")["generator"]["caption_weight"] == 0 < ours["generator"]["caption_weight"]
    for method, choice in (("all-neurons", "all"), ("random-neurons", "random")):
        other = stages(method)
        assert other["relevance"]["choice"] == choice
        other["relevance"]["choice"] = ours["relevance"]["choice"]
        assert other == ours


def test_methods_that_differ_from_leaml_in_one_thing(study):
    def stages(method):
        return resolve(study.protocol, method, 0, 1e-3, None)["stages"]

    ours, lora = stages("leaml"), stages("leaml-lora")
    assert (ours["finetune"]["mode"], lora["finetune"]["mode"]) == ("full", "lora")
    assert ours["finetune"]["train"]["lr"] == VQA_RATES["full"] != lora["finetune"]["train"]["lr"] == VQA_RATES["lora"]
    assert {k: v for k, v in lora.items() if k != "finetune"} == {k: v for k, v in ours.items() if k != "finetune"}
    for method in ("leaml-rounds", "right-pairs", "right-answers", "right-questions"):
        assert stages(method) == ours
        assert resolve(study.protocol, method, 0, None, None)["method"] != METHODS["leaml"]


def test_methods_with_the_same_pairs_share_them(study, monkeypatch, one_thread):
    from leaml_plugin.stages import train_generator

    def fresh(method):
        study._pairs.clear()
        return study.run("endoscopy", method, 0.25, 0)

    def plain(result):
        return {name: value for name, value in result.items() if "seconds" not in name}

    alone = [plain(fresh(method)) for method in ("leaml-lora", "random-neurons")]
    fresh("leaml")
    trained = []
    original = train_generator.run
    monkeypatch.setattr(train_generator, "run", lambda config, *a, **k: trained.append(1) or original(config, *a, **k))
    assert plain(study.run("endoscopy", "leaml-lora", 0.25, 0)) == alone[0] and not trained
    assert plain(study.run("endoscopy", "random-neurons", 0.25, 0)) == alone[1]
    assert trained, "other neurons write other pairs"


def test_two_rounds_train_two_generators(study):
    result = study.run("endoscopy", "leaml-rounds", 0.25, 0)
    assert len(result["pseudo"]["before"]) == 1 and result["config"]["method"]["rounds"] == 2


def test_a_method_moves_what_it_says(study):
    import torch

    def changed(method):
        world, budget = study.world("endoscopy"), study.world("endoscopy").labels(0.25, 0)
        tuned, _ = study._adapt(world, METHODS[method], budget, 0, method, 1e-2, 1e-2)
        before = dict(study.base.model.named_parameters())
        after = dict(tuned.model.named_parameters())
        return {n for n, p in before.items() if n in after and not torch.equal(p, after[n])}, set(after) - set(before)

    moved, new = changed("attention")
    assert moved and not new and all(".self_attn." in n and n.endswith("_proj.weight") for n in moved)
    moved, new = changed("lora")
    assert not moved and any("lora_A" in n for n in new)
    moved, _ = changed("full")
    assert moved and not any(".visual." in n for n in moved)
    assert any(".visual." in n for n in changed("full-vision")[0])


@pytest.fixture
def one_thread():
    """Sums over several threads may round differently from run to run."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_equal_runs_give_equal_results(study, one_thread):
    twice = []
    for _ in range(2):
        study._pairs.clear()
        twice.append(study.run("endoscopy", "leaml", 0.25, 0))
    for result in twice:
        for name in ("seconds", "train_seconds"):
            del result[name]
    assert twice[0] == twice[1]


def test_results_are_skipped_when_there_and_half_files_never_are(study, results, monkeypatch):
    directory, paths = results
    before = {path: path.stat().st_mtime_ns for path in paths}
    monkeypatch.setattr(study, "run", lambda **job: pytest.fail(f"{job} was run again"))
    again, left = run_all(study, [Job("endoscopy", "full", 0.25, 0), Job("endoscopy", "leaml", 0.25, 1)], directory)
    assert not left and set(again) <= set(paths)
    assert before == {path: path.stat().st_mtime_ns for path in paths}

    def killed(**job):
        raise KeyboardInterrupt

    monkeypatch.setattr(study, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        run_all(study, [Job("endoscopy", "full", 0.25, 7)], directory)
    assert sorted(directory.rglob("*")) == sorted(
        {*paths, *(p for q in paths for p in q.parents if directory in p.parents)}
    )
    assert run_all(study, [Job("endoscopy", "full", 0.25, 7)], directory, stop_after=-1) == ([], 1)


def test_a_changed_setting_is_another_result(study, tmp_path):
    def path(method, seed=0, **changes):
        protocol = dataclasses.replace(study.protocol, **changes)
        config = resolve(protocol, method, seed, None, None)
        return result_path(tmp_path, identity("c" * 64, "endoscopy", method, 0.01, seed, config))

    assert path("leaml") != path("leaml", density=0.3)
    assert path("full") == path("full", density=0.3), "what a method does not use does not name its results"
    assert path("full") != path("full", steps=6)
    one, two = (
        identity("c", "endoscopy", "leaml", 0.01, s, resolve(study.protocol, "leaml", s, None, None)) for s in (0, 1)
    )
    assert one["setting"] == two["setting"]


def test_rows_pair_seeds_and_questions(results):
    loaded = load_results(results[1])
    table = summary.rows(loaded)
    assert sorted(r.method for r in table) == sorted(ORDER) and all(r.seeds == [0, 1] for r in table)
    assert [r.labels for r in table] == [0.0, *[0.25] * (len(ORDER) - 2), 1.0]
    data = summary.summary(loaded)
    for row in data["rows"]:
        assert set(row) >= {"world", "method", "labels", "seeds", "accuracy", "ci95", "blind_majority", "forgetting"}
    assert {c["other"] for c in data["comparisons"]} == set(ORDER) - {"leaml"}
    json.dumps(data, allow_nan=False)


def test_results_under_two_settings_are_two_rows(results):
    loaded = load_results(results[1])
    other = [{**r, "setting": "another"} for r in loaded if r["method"] == "leaml"]
    assert len(summary.rows([*loaded, *other])) == len(ORDER) + 1


def fake(method, seed, marks, labels=0.01):
    from leaml_plugin.study.statistics import pack_bits

    share = sum(marks) / len(marks)
    pictures = [i // 2 for i in range(len(marks))]
    return {
        "world": "endoscopy", "method": method, "labels": labels, "seed": seed, "setting": method,
        "checkpoint": "c" * 64, "accuracy": share, "interval": [0.0, 1.0], "blind": {"labels": 0.2, "oracle": 0.3},
        "label_questions": round(16000 * labels), "by_template": {"polyps": {"accuracy": share, "n": len(marks)}},
        "forgetting": None if method == "blind" else {"qa_points": 0.5, "caption_loss": 0.1},
        "pseudo": {"accuracy": 0.6} if method == "leaml" else None,
        "questions": {"hash": "h", "count": len(marks), "pictures": pictures, "correct": pack_bits(marks)},
    }  # fmt: skip


def test_the_verdict_names_the_best_baseline_and_the_goals():
    def marks(n):
        return [i < n for i in range(100)]

    loaded = [
        fake(method, seed, marks(n + seed), budget_of(method, 0.01))
        for method, n in (("blind", 30), ("full", 50), ("joint", 55), ("leaml", 70), ("all-labels", 75))
        for seed in range(3)
    ]
    table = summary.rows(loaded)
    assert summary.best_baseline(table, "endoscopy", 0.01).method == "joint"
    text = summary.page(loaded)
    assert (
        "+15.0 points" in text and METHODS["joint"].title in text and "93.4 % of all labels (goal: 90 %, met)" in text
    )
    assert "0.5 points (goal: at most 1, met)" in text
    lost = summary.page([r for r in loaded if r["method"] != "leaml"] + [fake("leaml", s, marks(40)) for s in range(3)])
    assert "-16.0 points" in lost and "missed" in lost


def test_the_plot_is_written_and_repeats(tmp_path):
    pytest.importorskip("matplotlib", reason="the plot is optional: pip install 'leaml_plugin[report]'")
    from leaml_plugin.study.plot import draw

    loaded = [
        fake(method, seed, [i % 3 < 2 for i in range(60 + seed)], budget_of(method, labels))
        for method in ("blind", "full", "leaml", "all-labels")
        for seed in range(2)
        for labels in (0.01, 0.1)
    ]
    for name in ("a.svg", "b.svg"):
        draw(loaded, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert b"LEAML" in (tmp_path / "a.svg").read_bytes() or (tmp_path / "a.svg").stat().st_size > 10_000
    with pytest.raises(LeamlError, match="no results"):
        draw([], tmp_path / "c.svg")


def test_tuning_covers_every_trained_method_alike(study):
    jobs = tuning.jobs(ORDER, 0.01, [0], study.protocol)
    assert {job.world for job in jobs} == {"garden"} and len(jobs) == len(set(jobs))
    for method in filter(tuned, ORDER):
        own = [job for job in jobs if job.method == method]
        if METHODS[method].kind != "pseudo":
            assert sorted(job.rate for job in own) == sorted(GRID)
            continue
        vqa = vqa_rate(study.protocol, method)
        assert sorted(job.rate for job in own if job.finetune_rate == vqa) == sorted(GRID)
        assert sorted(job.finetune_rate for job in own if job.rate == learning_rate(method)) == sorted(GRID)
    assert set(LEARNING_RATES) <= set(filter(tuned, ORDER)) and set(LEARNING_RATES.values()) <= set(GRID)
    assert set(VQA_RATES.values()) <= set(GRID)


def test_rates_of_generator_and_vqa_model_are_told_apart(study):
    def result(rate, vqa, accuracy):
        stages = resolve(study.protocol, "leaml", 0, rate, vqa)["stages"]
        return {"method": "leaml", "config": {"stages": stages}, "accuracy": accuracy}

    own, vqa = learning_rate("leaml"), vqa_rate(study.protocol)
    found = tuning.outcome([result(own, vqa, 0.5), result(own, 1e-2, 0.7), result(3e-4, vqa, 0.3)], study.protocol)
    assert found == {"leaml": {3e-4: 0.3, own: 0.5}, "leaml" + tuning.VQA: {vqa: 0.5, 1e-2: 0.7}}


def test_the_best_rate_is_the_most_accurate_one():
    found = {"full": {1e-3: 0.5, 3e-3: 0.6, 3e-4: 0.6}}
    assert tuning.best(found) == {"full": 3e-4}


def arguments(*more):
    import argparse

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(list(more))


def settings(protocol):
    changed = {k: v for k, v in dataclasses.asdict(protocol).items() if v != getattr(Protocol(), k)}
    return [part for k, v in changed.items() for part in ("--set", f"{k}={json.dumps(v)}")]


def test_the_command_resumes_summarises_and_writes_the_page(results, checkpoint, small, tmp_path, capsys):
    directory, _ = results
    page = tmp_path / "study.md"
    page.write_text(f"# Study\n{MARKS[0]}\nold\n{MARKS[1]}\nThe end.\n")
    common = ["--results", str(directory), "--checkpoint", str(checkpoint), "--labels", "0.25", "--seeds", "2"]
    common += [*settings(small), "--world", "endoscopy", "--methods", "leaml", "full"]
    assert command.main(arguments(*common, "--summary", "--json", str(tmp_path / "s.json"), "--page", str(page))) == 0
    out = capsys.readouterr().out
    assert "LEAML" in out and "Full fine-tuning" in out
    assert {row["method"] for row in json.loads((tmp_path / "s.json").read_text())["rows"]} == {"leaml", "full"}
    text = page.read_text()
    assert "old" not in text and "| LEAML |" in text and text.endswith("The end.\n")
    assert command.main(arguments(*common, "--time", "-1")) == 0, "all is there already"
    assert "left" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--world", "garden"], "unknown world to report on 'garden'"),
        (["--methods", "laeml"], "did you mean 'leaml'"),
        (["--seeds", "0"], "at least 1"),
        (["--set", "density=high"], "study.density"),
        (["--set", "steps=1"], "steps must be at least 2"),
        (["--checkpoint", "nowhere"], "no model.safetensors"),
    ],
)
def test_bad_input_is_told_in_a_sentence(checkpoint, options, message):
    with pytest.raises(LeamlError, match=message):
        command.main(arguments("--checkpoint", str(checkpoint), *options))


def test_a_setting_added_later_leaves_older_results_comparable():
    """The hashes that result files of the first protocol have, which knew neither caption check nor target mix."""
    first = {"leaml": (3e-3, "73855571b0"), "lora": (3e-3, "d1210abf0e"), "joint": (1e-3, "b2c83c74b5")}
    for method, (rate, setting) in first.items():
        config = resolve(Protocol(mode="lora"), method, 0, rate, 3e-3)
        assert identity("", "", method, 0.01, 0, config)["setting"] == setting
    changed = resolve(dataclasses.replace(Protocol(), mix="labels", caption=True), "leaml", 0, None, None)["stages"]
    assert changed["generate"]["mix"] == "labels" and changed["filter"]["caption"] and changed["verify"]["caption"]


def test_a_second_round_starts_from_the_first_vqa_model(study, monkeypatch):
    import torch

    starts, tuned = [], []
    real = type(study)._write_pairs

    def write(self, configs, selection, budget, stages, generator):
        starts.append({name: value.clone() for name, value in generator.model.state_dict().items()})
        return real(self, configs, selection, budget, stages, generator)

    answer = type(study)._answer
    monkeypatch.setattr(type(study), "_write_pairs", write)
    monkeypatch.setattr(
        type(study), "_answer", lambda self, t, questions: tuned.append(t) or answer(self, t, questions)
    )
    study._pairs.clear()
    one = study.run("endoscopy", "leaml", 0.25, 0)
    study._pairs.clear()
    monkeypatch.setattr(study, "protocol", dataclasses.replace(study.protocol, rounds=2))
    two = study.run("endoscopy", "leaml", 0.25, 0)
    assert one["setting"] != two["setting"] and two["pseudo"]["before"] == [one["pseudo"]["accuracy"]]
    base, first, second = study.base.model.state_dict(), *starts[1:]
    assert all(torch.equal(base[name], first[name]) for name in base)
    merged = study._copy(tuned[0]).model.state_dict()  # what one round ends with is what the second starts from
    assert all(torch.equal(merged[name], second[name]) for name in base)
    assert any(not torch.equal(base[name], second[name]) for name in base)


def test_methods_come_in_the_studys_order():
    assert check_methods(["leaml", "blind"]) == ["blind", "leaml"]
    assert set(ORDER) == set(METHODS)
