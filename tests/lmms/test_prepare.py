"""``leaml data``: the tasks' split, pictures byte for byte, captions kept, nothing written over, killed and resumed."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import real_schema

from leaml_plugin import splits
from leaml_plugin.data import load_labeled, load_unlabeled
from leaml_plugin.errors import LeamlError
from leaml_plugin.lmms import endoscopy, prepare, sports


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def endo(kvasir, tmp_path):
    return prepare.endoscopy_files(tmp_path / "endo", data=str(kvasir), labels=0.2)


def test_counts_add_up(endo):
    raw = {row["img_id"] for row in real_schema.kvasir_rows(40)}
    split = splits.make_split(raw, label_fraction=0.2)
    assert endo.counts == {
        "labelled_pictures": len(split.labelled),
        "labelled_questions": 19 * len(split.labelled),
        "unlabelled_pictures": len(split.unlabelled),
        "captions": 0,
        "test_pictures": len(split.test),
        "test_questions": 19 * len(split.test),
    }


def test_the_test_part_is_the_tasks(endo, kvasir_dataset):
    rows = endoscopy.evaluation_rows(kvasir_dataset)
    task = [(row["img_id"], row["question"], row["answer"]) for row in rows]
    ours = [(line["id"].split("#")[0], line["question"], line["answer"]) for line in lines(endo.test)]
    assert ours == task


def test_no_picture_has_two_roles(endo):
    def pictures(path):
        return {line["image"] for line in lines(path)}

    parts = [pictures(endo.train), pictures(endo.test), pictures(endo.unlabelled)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 40


def test_pictures_are_copied_byte_for_byte(endo):
    by_name = {row["img_id"]: row["image"]["bytes"] for row in real_schema.kvasir_rows(40)}
    for path in (endo.train.parent / "pictures").iterdir():
        assert path.read_bytes() == by_name[path.stem]


def test_what_is_written_loads(endo):
    qas = load_labeled(endo.train)
    assert len(qas) == endo.counts["labelled_questions"]
    assert Path(qas[0].images[0].uri).is_file()
    assert len(load_unlabeled(endo.unlabelled)) == endo.counts["unlabelled_pictures"]
    assert len(load_labeled(endo.test)) == endo.counts["test_questions"]


def test_captions_are_matched_by_name_and_hand_written_ones_stay(endo, kvasir, tmp_path):
    first, second = (line["image"] for line in lines(endo.unlabelled)[:2])
    entries = lines(endo.captions)
    entries[1]["caption"] = "by hand"
    endo.captions.write_text("\n".join(map(json.dumps, entries)) + "\n\n")
    again = prepare.endoscopy_files(tmp_path / "endo", data=str(kvasir), labels=0.2)
    assert again.counts["captions"] == 1
    taught = {"image": f"other/{Path(first).stem}.png", "caption": "teacher"}
    (tmp_path / "teacher.jsonl").write_text(json.dumps(taught))
    again = prepare.endoscopy_files(
        tmp_path / "endo", data=str(kvasir), labels=0.2, captions=tmp_path / "teacher.jsonl"
    )
    assert {line["image"]: line["caption"] for line in lines(again.captions)} == {first: "teacher", second: "by hand"}
    pictures = load_unlabeled(again.unlabelled, captions=again.captions)
    assert sum(bool(picture.caption) for picture in pictures) == 2


def test_repeating_changes_nothing(endo, kvasir, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "endo").rglob("*")}
    assert prepare.endoscopy_files(tmp_path / "endo", data=str(kvasir), labels=0.2) == endo
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "endo").rglob("*")} == before


def test_an_interrupted_run_is_taken_up(kvasir, tmp_path, monkeypatch):
    whole = prepare.endoscopy_files(tmp_path / "whole", data=str(kvasir), labels=0.2)
    written = prepare._Writer.picture
    calls = 0

    def dies(self, *args):
        nonlocal calls
        calls += 1
        if calls == 7:
            raise KeyboardInterrupt
        return written(self, *args)

    monkeypatch.setattr(prepare._Writer, "picture", dies)
    with pytest.raises(KeyboardInterrupt):
        prepare.endoscopy_files(tmp_path / "cut", data=str(kvasir), labels=0.2)
    monkeypatch.undo()
    cut = prepare.endoscopy_files(tmp_path / "cut", data=str(kvasir), labels=0.2)
    for name in ("train", "test", "unlabelled", "captions"):
        assert getattr(cut, name).read_bytes() == getattr(whole, name).read_bytes()
    names = [sorted(p.name for p in (tmp_path / d / "pictures").iterdir()) for d in ("cut", "whole")]
    assert names[0] == names[1]


def test_other_settings_or_other_files_are_not_written_over(endo, kvasir, tmp_path):
    with pytest.raises(LeamlError, match=r"another labels \(0\.2\)"):
        prepare.endoscopy_files(tmp_path / "endo", data=str(kvasir), labels=0.3)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(LeamlError, match="is not empty"):
        prepare.endoscopy_files(tmp_path / "mine", data=str(kvasir))


def test_budgets_nest_and_limits_hold(kvasir, tmp_path):
    small = prepare.endoscopy_files(tmp_path / "small", data=str(kvasir), labels=0.1, max_unlabelled=5)
    large = prepare.endoscopy_files(tmp_path / "large", data=str(kvasir), labels=0.5)
    assert {line["id"] for line in lines(small.train)} < {line["id"] for line in lines(large.train)}
    assert small.test.read_bytes() == large.test.read_bytes()
    assert small.counts["unlabelled_pictures"] == 5


@pytest.mark.parametrize("name", ["../../etc/passwd", "/abs", ".hidden", "a/b", "ü", "", "x" * 300])
def test_no_name_leaves_the_directory(name):
    file = prepare._file_name(name)
    assert "/" not in file
    assert not file.startswith(".")
    assert 0 < len(file) < 120


def test_names_that_differ_only_in_strange_characters_stay_apart():
    assert len({prepare._file_name(name) for name in ("a/b", "a_b", "a b", "a:b")}) == 4


def test_a_damaged_picture_is_named(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = real_schema.kvasir_rows(20)
    bad = rows[19 * 3]["img_id"]
    for row in rows:
        if row["img_id"] == bad:
            row["image"] = {"bytes": row["image"]["bytes"][:40], "path": "x.jpg"}
    (tmp_path / "data").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data" / "raw.parquet")
    with pytest.raises(LeamlError, match=f"row 58 .img_id {bad}.: its picture cannot be read"):
        prepare.endoscopy_files(tmp_path / "out", data=str(tmp_path / "data"), labels=1.0)


def test_sports_files(sportu, tmp_path):
    done = prepare.sports_files(tmp_path / "sports", data=str(sportu), labels=0.2, frames=3)
    train, test = lines(done.train), lines(done.test)
    assert all(len(line["images"]) == 3 for line in train + test)
    scenes = [{splits.scene(line["id"].split("#")[0]) for line in part} for part in (train, test)]
    assert not scenes[0] & scenes[1]
    assert all(line["answer"] in "ABCD" for line in train)
    qas = load_labeled(done.train)
    assert qas[0].question == train[0]["question"]
    assert len(qas[0].images) == 3
    assert len(load_unlabeled(done.unlabelled)) == done.counts["unlabelled_pictures"]


def test_sports_are_trained_as_they_are_asked(sportu, tmp_path):
    from datasets import load_from_disk

    done = prepare.sports_files(tmp_path / "sports", data=str(sportu), labels=0.2, frames=2)
    asked = sports.evaluation_rows(load_from_disk(sports.source("mc", sportu)[0])["mc"])
    task = [(row["id"], sports.choice_question(row), row["answer"]) for row in asked]
    assert [(line["id"].split("#")[0], line["question"], line["answer"]) for line in lines(done.test)] == task


def test_command_shows_the_licence_first_and_the_next_command_last(kvasir, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    prepare.add_arguments(parser)
    args = ["endoscopy", "--data", str(kvasir), "--labels", "0.2", "--output", str(tmp_path / "out")]
    assert prepare.main(parser.parse_args(args)) == 0
    out = capsys.readouterr().out
    assert out.startswith("licence: Kvasir-VQA: CC BY-NC 4.0")
    assert "leaml adapt --model MODEL --labeled" in out
    with pytest.raises(LeamlError, match=r"unknown dataset 'endoscopi'; did you mean 'endoscopy'"):
        prepare.main(parser.parse_args(["endoscopi", "--output", "x"]))
