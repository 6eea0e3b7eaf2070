"""Worlds as files, in our plain format or in the exact schemas of the real data sets; where the checkpoint lies.

Covers ``plain`` (pictures and JSONL), ``kvasir`` (the parquet columns of ``SimulaMet-HOST/Kvasir-VQA``) and ``sportu``
(``SportU_Video_mc.json`` with frame directories). Every export has ``captions.jsonl``, the words of the noisy generic
teacher, or of a larger model of ours (``teacher``).
Pictures are PNG: the pixels that a loader decodes are the rendered ones.
Does not cover splitting: that is by picture, downstream.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leaml_plugin.errors import LeamlError, unknown_name
from leaml_plugin.progress import track
from leaml_plugin.worlds import WORLDS
from leaml_plugin.worlds.scenes import Scene, render

SCHEMAS = ("plain", "kvasir", "sportu")


@dataclass(frozen=True)
class ExportedWorld:
    """What an export wrote: the directory, the file with questions, the file with captions, and how many of each."""

    directory: Path
    labels: Path
    captions: Path
    pictures: int
    questions: int

    def __str__(self) -> str:
        return f"{self.directory}: {self.pictures} pictures, {self.questions} questions in {self.labels.name}"


def checkpoint_path() -> Path:
    """The directory of the shipped tiny Qwen2.5-VL with its processor."""
    return Path(__file__).parent / "checkpoint"


def prompts_path() -> Path:
    """A directory of prompt texts (``vqa.txt``, ``generate.txt``, ...) in the words that the checkpoint knows."""
    return Path(__file__).parent / "prompts"


def export(
    world: str,
    out_dir: str | os.PathLike[str],
    *,
    pictures: int,
    seed: int = 0,
    start: int = 0,
    schema: str = "plain",
    teacher: str | os.PathLike[str] | None = None,
) -> ExportedWorld:
    """Write pictures ``start`` to ``start + pictures - 1`` of a world into a new or empty directory.

    Args:
        teacher: checkpoint directory of the model that writes the captions (``leaml_plugin.worlds.teacher`` makes
            one); ``None``: the world's noisy generator.

    Raises:
        LeamlError: unknown world or schema, a schema that cannot hold the world (``kvasir`` holds single pictures,
            ``sportu`` clips under multiple choice), a directory with other things in it, a teacher without weights, a
            missing pyarrow.
    """
    if world not in WORLDS:
        raise unknown_name("world", world, WORLDS)
    if schema not in SCHEMAS:
        raise unknown_name("schema", schema, SCHEMAS)
    if pictures < 1:
        raise LeamlError(f"pictures must be at least 1, got {pictures}.")
    if (schema == "kvasir" and world not in ("endoscopy", "garden")) or (schema == "sportu" and world != "sports"):
        fitting = "sportu or plain" if world == "sports" else "plain" if world == "general" else "kvasir or plain"
        raise LeamlError(f"the world {world!r} cannot be written in the schema {schema!r}; use {fitting}.")
    if teacher is not None and not (Path(teacher) / "model.safetensors").is_file():
        raise LeamlError(f"{teacher}: has no model.safetensors; make a teacher with 'make teacher'.")
    out = Path(out_dir)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise LeamlError(f"{out}: is not an empty directory; choose another one.")
    out.mkdir(parents=True, exist_ok=True)
    scenes: Iterable[Scene] = (render(world, index, seed) for index in range(start, start + pictures))
    if teacher is not None:
        from leaml_plugin.worlds.teacher import described

        scenes = described(scenes, Path(teacher))
    return _WRITERS[schema](track(scenes, f"drawing {world}", pictures, unit="picture"), out)


def png(frame: Any) -> bytes:
    """A frame as PNG bytes. The pixels are exact; the bytes may differ between versions of Pillow."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "PNG", compress_level=4)
    return buffer.getvalue()


def _jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _plain(scenes: Any, out: Path) -> ExportedWorld:
    images = out / "images"
    images.mkdir()
    labels, captions = [], []
    for scene in scenes:
        names = (
            [f"{scene.id}.png"] if len(scene.frames) == 1 else [f"{scene.id}_{i}.png" for i in range(len(scene.frames))]
        )
        for name, frame in zip(names, scene.frames):
            (images / name).write_bytes(png(frame))
        paths = [f"images/{name}" for name in names]
        shown = {"image": paths[0]} if len(paths) == 1 else {"images": paths}
        for number, qa in enumerate(scene.qas):
            row = {"id": f"{scene.id}#{number}", **shown, "question": qa.question, "answer": qa.reply}
            row |= {"options": qa.options} if qa.options else {}
            row |= {"template": qa.template} | ({"level": qa.level} if qa.level else {})
            labels.append(row)
        captions.append({"id": scene.id, **shown, "caption": scene.caption})
    _jsonl(out / "qa.jsonl", labels)
    _jsonl(out / "captions.jsonl", captions)
    return ExportedWorld(out, out / "qa.jsonl", out / "captions.jsonl", len(captions), len(labels))


def _kvasir(scenes: Any, out: Path) -> ExportedWorld:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise LeamlError(
            "the schema 'kvasir' is parquet and needs pyarrow; pip install 'leaml_plugin[eval]'."
        ) from error
    columns: dict[str, list] = {"image": [], "source": [], "question": [], "answer": [], "img_id": []}
    captions = []
    for scene in scenes:
        picture = {"bytes": png(scene.frames[0]), "path": f"{scene.id}.png"}
        for qa in scene.qas:
            row = {"image": picture, "source": f"leaml-{scene.world}", "question": qa.question, "answer": qa.answer}
            for key, value in {**row, "img_id": scene.id}.items():
                columns[key].append(value)
        captions.append({"image": scene.id, "caption": scene.caption})
    features = {k: {"_type": "Image"} if k == "image" else {"dtype": "string", "_type": "Value"} for k in columns}
    schema = pa.schema(
        [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))]
        + [(k, pa.string()) for k in list(columns)[1:]],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    (out / "data").mkdir()
    path = out / "data" / "raw-00000-of-00001.parquet"
    # the dictionary keeps one copy of a picture that many rows share
    table = pa.table(columns, schema=schema)
    pq.write_table(table, path, compression="zstd", dictionary_pagesize_limit=1 << 30, row_group_size=4096)
    _jsonl(out / "captions.jsonl", captions)
    return ExportedWorld(out, path, out / "captions.jsonl", len(captions), table.num_rows)


def clip_name(scene: Scene) -> str:
    """SPORTU's way: sport, number of the scene, number of the view."""
    return f"{scene.facts['sport'].replace(' ', '_')}_{scene.index}_{scene.seed}"


def _sportu(scenes: Any, out: Path) -> ExportedWorld:
    labels, captions = [], []
    for scene in scenes:
        name = clip_name(scene)
        directory = out / "videos" / name
        directory.mkdir(parents=True)
        for number, frame in enumerate(scene.frames):
            (directory / f"frame_{number:03d}.png").write_bytes(png(frame))
        for qa in scene.qas:
            row = {"id": name, "question": qa.question, "options": qa.options, "answer": qa.answer}
            labels.append({**row, "difficulty level": qa.level})
        captions.append({"image": name, "caption": scene.caption})
    path = out / "SportU_Video_mc.json"
    path.write_text(json.dumps(labels, indent=1), encoding="utf-8")
    _jsonl(out / "captions.jsonl", captions)
    return ExportedWorld(out, path, out / "captions.jsonl", len(captions), len(labels))


_WRITERS = {"plain": _plain, "kvasir": _kvasir, "sportu": _sportu}
