"""Exports have the schemas of the real data sets, and a loader gets back the pixels that were rendered."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image

from leaml_plugin.errors import LeamlError
from leaml_plugin.worlds import export, render
from leaml_plugin.worlds.files import clip_name


def pixels(data) -> np.ndarray:
    return np.asarray(Image.open(data).convert("RGB"))


def test_plain(tmp_path):
    done = export("general", tmp_path / "out", pictures=9, seed=4, start=2)
    rows = [json.loads(line) for line in done.labels.read_text().splitlines()]
    captions = [json.loads(line) for line in done.captions.read_text().splitlines()]
    assert len(captions) == done.pictures == 9 and len(rows) == done.questions > 50
    assert {"image", "images"} == {k for c in captions for k in c if k.startswith("image")}
    for row in rows:
        files = row.get("images") or [row["image"]]
        assert all((done.directory / f).is_file() for f in files)
        assert row["question"] and row["answer"] and row["id"].startswith("general-4-")
        assert not row.get("options") or row["answer"] in row["options"].values()
    first = render("general", 2, 4)
    path = (captions[0].get("images") or [captions[0]["image"]])[0]
    assert np.array_equal(pixels(done.directory / path), first.frames[0])
    assert captions[0]["caption"] == first.caption


def test_kvasir(tmp_path):
    datasets = pytest.importorskip("datasets", reason="the parquet schema is checked with datasets")
    done = export("endoscopy", tmp_path / "out", pictures=12, seed=4, schema="kvasir")
    data = datasets.load_dataset(
        "parquet", data_files={"raw": str(done.labels)}, split="raw", cache_dir=str(tmp_path / "cache")
    )
    assert data.column_names == ["image", "source", "question", "answer", "img_id"]
    assert isinstance(data.features["image"], datasets.Image)
    scenes = {s.id: s for s in (render("endoscopy", i, 4) for i in range(12))}
    assert len(data) == done.questions == sum(len(s.qas) for s in scenes.values())
    assert {row["img_id"] for row in data} == set(scenes)
    row = data[len(data) - 1]
    scene = scenes[row["img_id"]]
    assert np.array_equal(np.asarray(row["image"].convert("RGB")), scene.frames[0])
    assert (row["question"], row["answer"]) == (scene.qas[-1].question, scene.qas[-1].answer)
    taught = [json.loads(line) for line in done.captions.read_text().splitlines()]
    assert {t["image"]: t["caption"] for t in taught} == {k: s.caption for k, s in scenes.items()}
    # pictures that several rows share are stored once
    raw = sum(
        len(data.cast_column("image", datasets.Image(decode=False))[i]["image"]["bytes"]) for i in range(len(data))
    )
    assert done.labels.stat().st_size < raw / 3


def test_sportu(tmp_path):
    done = export("sports", tmp_path / "out", pictures=6, seed=2, schema="sportu")
    assert done.labels.name == "SportU_Video_mc.json"
    rows = json.loads(done.labels.read_text())
    assert len(rows) == done.questions
    scenes = {clip_name(s): s for s in (render("sports", i, 2) for i in range(6))}
    for row in rows:
        assert set(row) == {"id", "question", "options", "answer", "difficulty level"}
        assert row["answer"] in row["options"] and row["id"] in scenes
        frames = sorted((done.directory / "videos" / row["id"]).iterdir())
        assert len(frames) == 3
    name, scene = next(iter(scenes.items()))
    data = io.BytesIO((done.directory / "videos" / name / "frame_001.png").read_bytes())
    assert np.array_equal(pixels(data), scene.frames[1])


@pytest.mark.parametrize(
    ("world", "schema", "words"),
    [
        ("sports", "kvasir", "use sportu or plain"),
        ("endoscopy", "sportu", "use kvasir or plain"),
        ("general", "parquet", "unknown schema"),
        ("zoo", "plain", "unknown world"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, world, schema, words):
    with pytest.raises(LeamlError, match=words):
        export(world, tmp_path / "out", pictures=2, schema=schema)
    assert not (tmp_path / "out").exists()


def test_a_directory_with_other_things_in_it_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(LeamlError, match="not an empty directory"):
        export("garden", tmp_path, pictures=1)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_the_function_is_not_shadowed_by_a_module_of_its_name():
    """``export`` stays the function after any other public name was resolved first."""
    import subprocess
    import sys

    first = "import leaml_plugin.worlds as w; w.checkpoint_path(); assert callable(w.export)"
    every = (
        "import leaml_plugin.worlds as w, types;"
        "assert not any(isinstance(getattr(w, n), types.ModuleType) for n in w.__all__)"
    )
    for code in (first, every):
        subprocess.run([sys.executable, "-c", code], check=True)
