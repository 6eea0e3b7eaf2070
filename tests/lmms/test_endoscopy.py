"""Kvasir-VQA in its real schema: where it is found, what is tested, what is learnt blind, how it is asked."""

from __future__ import annotations

import pytest
import real_schema

from leaml_plugin import metrics, splits
from leaml_plugin.errors import LeamlError
from leaml_plugin.lmms import endoscopy


def test_local_parquet_directory(kvasir):
    path, kwargs = endoscopy.source(str(kvasir))
    assert path == "parquet"
    assert [file.rsplit("/", 1)[1] for file in kwargs["data_files"]["raw"]] == [
        "raw-00000-of-00002.parquet",
        "raw-00001-of-00002.parquet",
    ]


def test_variable_names_the_directory(kvasir, monkeypatch):
    monkeypatch.setenv("LEAML_ENDOSCOPY_DATA", str(kvasir))
    assert endoscopy.source()[0] == "parquet"


def test_directory_saved_to_disk(kvasir_dataset, tmp_path):
    from datasets import DatasetDict

    DatasetDict({"raw": kvasir_dataset.select(range(5))}).save_to_disk(tmp_path)
    assert endoscopy.source(str(tmp_path)) == (str(tmp_path.resolve()), {"load_from_disk": True})


@pytest.mark.parametrize(("make", "message"), [(False, "no such directory"), (True, "no parquet file")])
def test_what_is_no_data_set_is_said_so(tmp_path, make, message):
    directory = tmp_path / "nothing"
    if make:
        directory.mkdir()
    with pytest.raises(LeamlError, match=f"nothing: {message}.*parquet files of the Hub repository"):
        endoscopy.source(str(directory))


def test_neither_local_nor_hub_is_one_sentence():
    """The tests run offline, so the Hub cannot be reached."""
    with pytest.raises(LeamlError) as error:
        endoscopy.source()
    text = str(error.value)
    assert endoscopy.HUB_ID in text
    assert "LEAML_ENDOSCOPY_DATA" in text
    assert "leaml_endoscopy_synthetic" in text
    assert "\n" not in text


def test_the_test_rows_are_those_of_the_test_pictures(kvasir_dataset):
    rows = endoscopy.evaluation_rows(kvasir_dataset)
    names = {row["img_id"] for row in real_schema.kvasir_rows(40)}
    wanted = {name for name in names if splits.is_test(name)}
    assert set(rows["img_id"]) == wanted
    assert len(rows) == 19 * len(wanted)
    assert rows[0]["image"].size == (40, 32)


def test_blind_answers_come_from_the_labelled_pictures_alone(kvasir_dataset, monkeypatch):
    monkeypatch.setenv("LEAML_LABEL_FRACTION", "0.2")
    raw = real_schema.kvasir_rows(40)
    split = splits.make_split((row["img_id"] for row in raw), label_fraction=0.2)
    blind = metrics.BlindMajority((row["question"], row["answer"]) for row in raw if row["img_id"] in split.labelled)
    rows = endoscopy.evaluation_rows(kvasir_dataset)
    assert rows["blind"][:] == [blind.answer(question) for question in rows["question"]]


@pytest.mark.parametrize("family", metrics.FAMILIES)
def test_families_partition_the_test_rows(kvasir_dataset, family):
    rows = endoscopy.evaluation_rows(kvasir_dataset, family)
    assert set(rows["family"]) == {family}
    counts = [len(endoscopy.evaluation_rows(kvasir_dataset, name)) for name in metrics.FAMILIES]
    assert sum(counts) == len(endoscopy.evaluation_rows(kvasir_dataset))


def test_shuffled_pictures_are_never_the_own(kvasir_dataset):
    rows = endoscopy.evaluation_rows(kvasir_dataset)
    other = endoscopy.evaluation_rows(kvasir_dataset, shuffle_pictures=True)
    own = {row["img_id"]: row["image"].tobytes() for row in rows}
    shown: dict[str, bytes] = {}
    for row in other:
        picture = row["image"].tobytes()
        assert picture != own[row["img_id"]]
        assert shown.setdefault(row["img_id"], picture) == picture, "one picture for all questions of a picture"
    assert sorted(shown.values()) == sorted(own.values()), "every test picture is shown as often as before"
    assert "image" not in other.remove_columns("image")[0]


def test_a_missing_column_is_named(kvasir_dataset):
    with pytest.raises(LeamlError, match="no column img_id"):
        endoscopy.evaluation_rows(kvasir_dataset.remove_columns("img_id"))


def test_too_few_pictures_are_refused(kvasir_dataset):
    first = kvasir_dataset[0]["img_id"]
    few = kvasir_dataset.select([i for i, name in enumerate(kvasir_dataset["img_id"]) if name == first])
    with pytest.raises(LeamlError, match=r"no test picture|too small"):
        endoscopy.evaluation_rows(few)


def test_a_model_is_asked_as_it_was_trained(kvasir, tmp_path, monkeypatch):
    from leaml_plugin.data import Prompts
    from leaml_plugin.records import QA

    doc = {"question": "Is there text?"}
    assert endoscopy.question_text(doc) == Prompts.load().vqa(QA("", (), "Is there text?", "")).prompt
    (tmp_path / "vqa.txt").write_text("Look: {question}")
    monkeypatch.setenv("LEAML_PROMPTS", str(tmp_path))
    assert endoscopy.question_text(doc) == "Look: Is there text?"


@pytest.mark.parametrize("text", ["many", "1,5"])
def test_a_label_fraction_that_is_no_number(monkeypatch, text):
    monkeypatch.setenv("LEAML_LABEL_FRACTION", text)
    with pytest.raises(LeamlError, match="LEAML_LABEL_FRACTION must be a number"):
        endoscopy.label_fraction()
