"""Hugging Face datasets with embedded pictures: save_to_disk, parquet, splits, shared pictures."""

from __future__ import annotations

import dataclasses
import json

import pytest
from PIL import Image as Pillow

datasets = pytest.importorskip("datasets", reason="Hugging Face datasets are an extra of this package")

from leaml_plugin.data.formats import load_labeled, load_unlabeled  # noqa: E402
from leaml_plugin.data.images import check_images, open_image  # noqa: E402
from leaml_plugin.errors import LeamlError  # noqa: E402
from leaml_plugin.records import ImageRef  # noqa: E402


@pytest.fixture(scope="module")
def kvasir(pictures):
    """Rows in the manner of Kvasir-VQA: a picture repeated for each of its questions."""
    rows = {
        "image": [str(pictures[i // 2]) for i in range(6)],
        "source": ["normal"] * 6,
        "question": [f"Question {i}?" for i in range(6)],
        "answer": [f"answer {i}" for i in range(6)],
        "img_id": [f"img{i // 2}" for i in range(6)],
    }
    return datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())


@pytest.fixture(scope="module")
def on_disk(kvasir, tmp_path_factory):
    path = tmp_path_factory.mktemp("disk") / "kvasir"
    datasets.DatasetDict({"raw": kvasir}).save_to_disk(path)
    return path


@pytest.fixture(scope="module")
def in_parquet(kvasir, tmp_path_factory):
    path = tmp_path_factory.mktemp("parquet") / "kvasir"
    (path / "data").mkdir(parents=True)
    table = kvasir.cast_column("image", datasets.Image(decode=False))
    rows = [{**row, "image": {"bytes": open(row["image"]["path"], "rb").read(), "path": None}} for row in table]
    embedded = datasets.Dataset.from_list(rows, features=kvasir.features)
    embedded.select(range(4)).to_parquet(path / "data" / "train-00000-of-00001.parquet")
    embedded.select(range(4, 6)).to_parquet(path / "data" / "test-00000-of-00001.parquet")
    return path


def test_save_to_disk(on_disk, pictures):
    out = load_labeled(on_disk)
    assert [(qa.id, qa.question, qa.answer) for qa in out][:2] == [
        ("raw:0", "Question 0?", "answer 0"),
        ("raw:1", "Question 1?", "answer 1"),
    ]
    assert out[0].images == out[1].images != out[2].images  # one reference a picture
    assert check_images(out, progress=False) == 3
    for qa, path in zip(out[::2], pictures):
        assert open_image(qa.images[0]).tobytes() == Pillow.open(path).convert("RGB").tobytes()
    assert out[0].meta == {"source": "normal", "img_id": "img0"}


def test_parquet_splits(in_parquet):
    assert [qa.answer for qa in load_labeled(in_parquet)] == [f"answer {i}" for i in range(4)]
    out = load_labeled(f"{in_parquet}?split=test")
    assert [qa.answer for qa in out] == ["answer 4", "answer 5"]
    assert open_image(out[0].images[0]).size == (30, 70)
    with pytest.raises(LeamlError, match="did you mean 'test'"):
        load_labeled(f"{in_parquet}?split=tests")


def test_unlabeled_pictures_of_a_dataset_are_each_there_once(on_disk, tmp_path):
    out = load_unlabeled(on_disk)
    assert [p.id for p in out] == ["img0", "img1", "img2"]
    captions = tmp_path / "captions.jsonl"
    captions.write_text(json.dumps({"img_id": "img1", "caption": "a red tube"}))
    assert [p.caption for p in load_unlabeled(on_disk, captions=captions)] == [None, "a red tube", None]


def test_lists_of_pictures_and_messages(pictures, tmp_path):
    rows = {
        "images": [[str(pictures[0]), str(pictures[1])], [str(pictures[2])]],
        "messages": [
            [{"role": "user", "content": "<image><image>Which?"}, {"role": "assistant", "content": "one"}],
            [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "two"}],
        ],
    }
    dataset = datasets.Dataset.from_dict(rows)
    dataset = dataset.cast_column("images", datasets.List(datasets.Image()))
    dataset.save_to_disk(tmp_path / "ds")
    out = load_labeled(tmp_path / "ds")
    assert [(qa.question, qa.answer, len(qa.images)) for qa in out] == [("Which?", "one", 2), ("What?", "two", 1)]
    assert open_image(out[0].images[1]).size == Pillow.open(pictures[1]).size


def test_an_id_column_that_names_no_row_is_not_used(pictures, tmp_path):
    rows = {"image": [str(p) for p in pictures[:2]], "question": ["a", "b"], "answer": ["c", "d"], "id": ["x", "x"]}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).save_to_disk(tmp_path / "ds")
    assert [qa.id for qa in load_labeled(tmp_path / "ds")] == ["train:0", "train:1"]


def test_bad_datasets_are_one_sentence(on_disk, in_parquet, pictures, tmp_path):
    [qa, *_] = load_labeled(on_disk)
    uri = qa.images[0].uri
    for bad, words in [
        (uri.replace("row=0", "row=99"), "has 6 rows"),
        (uri.replace("column=image", "column=imag"), "did you mean 'image'"),
        (uri.replace("column=image", "column=answer"), "has no picture"),
        ("hf:x?row=y", "is no picture of a dataset"),
    ]:
        with pytest.raises(LeamlError, match=words):
            open_image(ImageRef(bad))
    rows = {"image": [str(pictures[0])], "question": ["q"]}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).save_to_disk(tmp_path / "ds")
    with pytest.raises(LeamlError, match=r"split train row 0: field 'answer' is missing"):
        load_labeled(tmp_path / "ds")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "x.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(LeamlError, match=r"broken: the dataset cannot be read"):
        load_labeled(tmp_path / "broken")


def test_an_embedded_path_may_not_leave_the_dataset(pictures, tmp_path):
    feature = datasets.Features({"image": datasets.Image(decode=False)})
    rows = [{"image": {"bytes": None, "path": str(pictures[0])}}]
    (tmp_path / "ds").mkdir()
    datasets.Dataset.from_list(rows, features=feature).to_parquet(tmp_path / "ds" / "train.parquet")
    [picture] = load_unlabeled(tmp_path / "ds")
    try:
        image = open_image(picture.images[0])
    except LeamlError as error:
        assert "lies outside the dataset" in str(error)
    else:  # the writer embedded the bytes
        assert image.size == Pillow.open(pictures[0]).size
    assert dataclasses.is_dataclass(picture)
