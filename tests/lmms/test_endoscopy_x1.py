"""Kvasir-VQA-x1 in its real schema, joined with the pictures of Kvasir-VQA."""

from __future__ import annotations

import pytest
import real_schema

from leaml_plugin import splits
from leaml_plugin.errors import LeamlError
from leaml_plugin.lmms import endoscopy, endoscopy_x1


@pytest.fixture(scope="module")
def x1(tmp_path_factory):
    return real_schema.write_kvasir_x1(tmp_path_factory.mktemp("x1") / "x1")


@pytest.fixture
def rows(x1, kvasir, monkeypatch):
    from datasets import load_dataset

    monkeypatch.setenv("LEAML_ENDOSCOPY_DATA", str(kvasir))
    monkeypatch.setenv("LEAML_ENDOSCOPY_X1_DATA", str(x1))
    path, kwargs = endoscopy_x1.source(str(x1))
    assert path == "parquet"
    return load_dataset(path, **kwargs)["test"]


def test_only_test_questions_about_our_test_pictures(rows):
    kept = endoscopy_x1.evaluation_rows(rows)
    assert {(row["img_id"], row["complexity"]) for row in kept} == {
        (real_schema.picture_name(i), c)
        for i in range(40)
        for c in (1, 2, 3)
        if (i + c) % 2 and splits.is_test(real_schema.picture_name(i))
    }


def test_blind_answers_come_from_the_labelled_pictures_alone(rows, monkeypatch, tmp_path):
    """The labelled answers are made to differ, so that a leak from another picture would show."""
    from datasets import Dataset, load_dataset

    monkeypatch.setenv("LEAML_LABEL_FRACTION", "0.1")
    names = [real_schema.picture_name(i) for i in range(40)]
    labelled = splits.make_split(names, label_fraction=0.1).labelled
    path, kwargs = endoscopy_x1.source()
    told = load_dataset(path, **kwargs)["test"].to_list()
    (tmp_path / "data").mkdir()
    for part in ("train", "test"):
        files = real_schema.write_kvasir_x1(tmp_path / part) / "data" / f"{part}-00000-of-00001.parquet"
        changed = [
            {**row, "answer": f"label {row['complexity']}" if row["img_id"] in labelled else "unseen"}
            for row in load_dataset("parquet", data_files=str(files))["train"].to_list()
        ]
        Dataset.from_list(changed).to_parquet(tmp_path / "data" / f"{part}-0.parquet")
        told = changed if part == "test" else told
    monkeypatch.setenv("LEAML_ENDOSCOPY_X1_DATA", str(tmp_path / "data"))
    kept = endoscopy_x1.evaluation_rows(Dataset.from_list(told))
    assert set(kept["answer"]) == {"unseen"}
    assert {answer.split()[0] for answer in kept["blind"]} == {"label"}


def test_each_question_gets_its_own_picture(rows, kvasir_dataset):
    decoded = endoscopy.check_columns(kvasir_dataset)
    by_name = {row["img_id"]: row["image"].tobytes() for row in decoded}
    for row in endoscopy_x1.evaluation_rows(rows):
        (picture,) = endoscopy_x1.pictures(row)
        assert picture.tobytes() == by_name[row["img_id"]]


def test_a_picture_that_is_missing_is_named(rows, tmp_path, monkeypatch):
    other = real_schema.write_kvasir(tmp_path / "few", pictures=2)
    monkeypatch.setenv("LEAML_ENDOSCOPY_DATA", str(other))
    with pytest.raises(LeamlError, match=r"pictures of the x1 data are not in Kvasir-VQA, the first is cl8k2u1"):
        endoscopy_x1.evaluation_rows(rows)


def test_neither_local_nor_hub_is_one_sentence(tmp_path):
    with pytest.raises(LeamlError, match="LEAML_ENDOSCOPY_X1_DATA=kvasir-vqa-x1"):
        endoscopy_x1.source()
    with pytest.raises(LeamlError, match="no parquet or JSON file"):
        endoscopy_x1.source(str(tmp_path))


def test_through_lmms_eval(x1, kvasir, tiny_models):
    pytest.importorskip("lmms_eval")
    from leaml_plugin import models
    from leaml_plugin.lmms import run

    loaded = models.load(tiny_models("qwen2_5_vl"), device="cpu")
    settings = {"endoscopy_data": kvasir, "x1_data": x1, "limit": 6, "gen_kwargs": {"max_new_tokens": 4}}
    done = run.evaluate(loaded, "leaml_endoscopy_x1,leaml_endoscopy_x1_nopicture", **settings)
    for values in done["results"].values():
        assert {"bleu", "rouge1", "rouge2", "rougeL", "meteor_stem", "complexity_1"} <= set(values)
        assert 0 <= values["rougeL"] <= 1
        assert values["blind_rougeL"] > 0.8, "of the same questions the answers differ in one word"
        assert values["above_blind"] == pytest.approx(values["rougeL"] - values["blind_rougeL"])
