"""Filters against the truth: counts by hand, one set of pairs for all filters, resumption, tables and the command."""

from __future__ import annotations

import argparse
import dataclasses
import json

import pytest

from leaml_plugin import study as command
from leaml_plugin.artifacts import read_json, write_json
from leaml_plugin.errors import LeamlError
from leaml_plugin.records import QA, PseudoQA
from leaml_plugin.report.markdown import MARKS
from leaml_plugin.stages.filter import REASONS
from leaml_plugin.study import filters
from leaml_plugin.study.filters import DEFAULT, FILTERS, NONE, VARIANTS, measure
from leaml_plugin.study.protocol import Protocol

LABELS = [QA("1", (), "Is it red?", "no"), QA("2", (), "Is it red?", "yes")]


def pair(picture, sample, answer, again, question="Is it red?"):
    checks = {"round_trip": again, "blind": "?", "caption": answer}
    return PseudoQA(picture, (), sample, "", question, answer, -1.0, checks if question else {})


def test_counts_are_those_made_by_hand():
    pairs = [
        pair("a", 0, "yes", "yes"),  # right, kept
        pair("a", 1, "yes", "no"),  # right, lost by the round trip
        pair("b", 0, "no", "yes"),  # wrong, removed by it
        pair("b", 1, "no", "no"),  # wrong, kept
        pair("c", 0, "no", "no", "Is it odd?"),  # not to be told
        pair("c", 1, "", "", ""),  # malformed
    ]
    found = measure(pairs, LABELS, lambda p: None if p.picture_id == "c" else p.picture_id == "a")
    alone = {entry["filter"]: entry for entry in found["alone"]}
    assert alone[NONE]["before"] == {"pairs": 6, "checked": 4, "right": 2}
    assert alone[NONE]["after"] == {"pairs": 5, "checked": 4, "right": 2}
    assert alone["round_trip"]["before"] == alone[NONE]["after"]
    assert alone["round_trip"]["after"] == {"pairs": 3, "checked": 2, "right": 1}
    assert alone["unknown_question"]["after"] == {"pairs": 4, "checked": 4, "right": 2}
    assert alone["duplicate"]["after"] == {"pairs": 3, "checked": 2, "right": 1}
    assert alone["unanswerable"]["kept"] == alone[NONE]["kept"] != alone["duplicate"]["kept"]
    assert alone[DEFAULT]["after"] == {"pairs": 3, "checked": 2, "right": 1}
    steps = [entry["after"]["pairs"] for entry in found["sequence"]]
    assert steps == sorted(steps, reverse=True)
    assert [e["before"] for e in found["sequence"][1:]] == [e["after"] for e in found["sequence"][:-1]]

    results = [{"alone": found["alone"], "sequence": found["sequence"], "accuracy": {NONE: 0.5, "round_trip": 0.6}}] * 2
    cells = {row[0]: row for row in filters.alone_cells(results)}
    assert cells["`round_trip`"][1:] == [
        "10", "6", "50.0", "50.0", "50.0", "50.0", "60.0", "+10.0 (+10.0 to +10.0)",
    ]  # fmt: skip
    assert cells["`blind`"][-2:] == ["", ""]


def test_every_filter_is_measured():
    assert set(FILTERS) | {"malformed", "unreadable"} == set(REASONS)


@pytest.fixture(scope="module")
def measured(study, tmp_path_factory):
    directory = tmp_path_factory.mktemp("filters")
    assert filters.run(study, "endoscopy", 0.25, 0, directory)
    return directory


def test_one_set_of_pairs_is_measured_once_and_teaches_once(study, measured, monkeypatch):
    (path,) = measured.rglob("filters-*.json")
    result = read_json(path)
    assert result["written"] == 6 and result["alone"][0]["before"]["pairs"] == 6
    taught = []
    monkeypatch.setattr(type(study), "taught", lambda self, written, kept: taught.append(kept) or study._answer(
        study.base, written.world.test))  # fmt: skip
    assert not filters.run(study, "endoscopy", 0.25, 0, measured, accuracy=True, stop_after=-1) and not taught
    assert filters.run(study, "endoscopy", 0.25, 0, measured, accuracy=True)
    assert len(taught) == len({entry["kept"] for entry in result["alone"]})
    count = len(taught)
    monkeypatch.setattr(type(study), "write", lambda *a: pytest.fail("all is there already"))
    assert filters.run(study, "endoscopy", 0.25, 0, measured, accuracy=True) and len(taught) == count
    (loaded,) = filters.load(study, "endoscopy", 0.25, range(3), measured)
    assert set(loaded["accuracy"]) == {NONE, DEFAULT, *FILTERS, *VARIANTS}
    text = filters.page({"endoscopy": [loaded], "sports": []})
    assert "| `round_trip` |" in text and "sports" not in text


def test_a_filter_that_is_new_is_measured_beside_the_old(study, measured, tmp_path):
    """Under the same name: what the others taught stays valid."""
    (path,) = (p for p in measured.rglob("filters-*.json") if "alone" in read_json(p))
    old = read_json(path)
    for entry in list(old["alone"]):
        if entry["filter"] in VARIANTS:
            old["alone"].remove(entry)
    older = tmp_path / path.relative_to(measured)
    write_json(older, old)
    assert filters.run(study, "endoscopy", 0.25, 0, tmp_path)
    assert read_json(older)["alone"] == read_json(path)["alone"] != old["alone"]
    seeds = filters.load(study, "endoscopy", 0.25, [0], measured)
    cells = filters.alone_cells([{**old, "accuracy": {}}, *seeds])
    assert [row[0] for row in cells] == [row[0] for row in filters.alone_cells(seeds)]


def test_a_filtered_set_of_pairs_is_learnt_from(study):
    written = study.write("endoscopy", 0.25, 1)
    assert all(set(p.checks) == {"round_trip", "blind", "caption"} for p in written.pairs if p.question)
    right = study.taught(written, filters.kept_by(NONE, written))
    assert len(right) == len(written.world.test)


def test_the_command(study, measured, checkpoint, small, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    changed = {k: v for k, v in dataclasses.asdict(small).items() if v != getattr(Protocol(), k)}
    common = ["--results", str(measured), "--checkpoint", str(checkpoint), "--labels", "0.25", "--seeds", "2"]
    common += [part for k, v in changed.items() for part in ("--set", f"{k}={json.dumps(v)}")]
    page = tmp_path / "page.md"
    page.write_text(f"# Filters\n{MARKS[0]}\n{MARKS[1]}\n")
    options = [
        "--filters",
        "--summary",
        "--world",
        "endoscopy",
        "--page",
        str(page),
        "--json",
        str(tmp_path / "f.json"),
    ]
    assert command.main(parser.parse_args([*common, *options])) == 0
    assert "round_trip" in capsys.readouterr().out and "| `blind` |" in page.read_text()
    assert [r["seed"] for r in json.loads((tmp_path / "f.json").read_text())["endoscopy"]] == [0]
    assert command.main(parser.parse_args([*common, "--filters", "--world", "endoscopy", "--time", "0"])) == 0
    assert "the same command goes on" in capsys.readouterr().out
    with pytest.raises(LeamlError, match="--accuracy belongs to --filters"):
        command.main(parser.parse_args([*common, "--accuracy"]))
