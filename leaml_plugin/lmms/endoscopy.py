"""Kvasir-VQA, for the tasks and for ``leaml data endoscopy``: where it is, how it is split, how a row is asked.

Covers: the data set on the Hub, a local copy (``LEAML_ENDOSCOPY_DATA``), the synthetic world of the same schema; the
test rows by picture; the image-blind majority learnt from the labelled pictures; the controls without the picture and
with another row's picture. Columns: ``image, source, question, answer, img_id``, split ``raw``.
Does not cover: Kvasir-VQA-x1 (:mod:`leaml_plugin.lmms.endoscopy_x1`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from leaml_plugin import metrics, splits
from leaml_plugin.data.prompts import Prompts
from leaml_plugin.errors import LeamlError
from leaml_plugin.lmms.cache import build_once
from leaml_plugin.lmms.hub import hub_source
from leaml_plugin.records import QA

HUB_ID = "SimulaMet-HOST/Kvasir-VQA"
LICENCE = "CC BY-NC 4.0 (no commercial use); cite arXiv 2409.01437"
SPLIT = "raw"
COLUMNS = ("image", "question", "answer", "img_id")
DATA_VARIABLE = "LEAML_ENDOSCOPY_DATA"
LABEL_VARIABLE = "LEAML_LABEL_FRACTION"
SYNTHETIC_PICTURES = 1000

# ----------------------------------------------------------------------------------------------------- the source


def source(location: str | None = None) -> tuple[str, dict[str, Any]]:
    """What ``datasets.load_dataset`` takes: a path and keyword arguments.

    ``location`` is a local directory or ``None`` for ``$LEAML_ENDOSCOPY_DATA``, else the Hub. A directory may hold
    parquet files (as the Hub repository does) or a data set saved with ``save_to_disk``. Raises :class:`LeamlError`
    in one sentence where neither the directory nor the Hub can be had.
    """
    location = location or os.environ.get(DATA_VARIABLE)
    if not location:
        return hub_source(
            HUB_ID,
            f"download it with 'hf download {HUB_ID} --repo-type dataset --local-dir kvasir-vqa' where there is a "
            f"network and set {DATA_VARIABLE}=kvasir-vqa, or use the task leaml_endoscopy_synthetic.",
        )
    return local_source(Path(location))


def synthetic_source(pictures: int | None = None, seed: int = 0) -> tuple[str, dict[str, Any]]:
    """The embedded endoscopy-like world in the Kvasir-VQA schema, made on first use, the same on every machine."""
    pictures = pictures or synthetic_pictures()

    def build(directory: Path) -> None:
        from leaml_plugin.worlds import export

        export("endoscopy", directory, pictures=pictures, seed=seed, schema="kvasir")

    return local_source(build_once(f"{world_version()}/endoscopy-{pictures}-seed{seed}", build))


def synthetic_pictures() -> int:
    """How many pictures the synthetic worlds have: ``$LEAML_SYNTHETIC_PICTURES``, 1000 by default."""
    text = os.environ.get("LEAML_SYNTHETIC_PICTURES", str(SYNTHETIC_PICTURES))
    if not text.isdecimal() or int(text) < 10:
        raise LeamlError(f"LEAML_SYNTHETIC_PICTURES must be a number of pictures, at least 10, got {text!r}.")
    return int(text)


def world_version() -> str:
    """Names the generated data in the cache, so that another release's pictures are never taken for this one's."""
    from leaml_plugin import __version__

    return f"worlds-{__version__}"


def local_source(directory: Path) -> tuple[str, dict[str, Any]]:
    directory = directory.expanduser().resolve()
    hint = "it should hold the parquet files of the Hub repository or a data set saved with save_to_disk."
    if not directory.is_dir():
        raise LeamlError(f"{directory}: no such directory ({DATA_VARIABLE}); {hint}")
    if (directory / "dataset_dict.json").is_file():
        return str(directory), {"load_from_disk": True}
    files = sorted(str(path) for path in directory.rglob("*.parquet"))
    if not files:
        raise LeamlError(f"{directory}: no parquet file and no dataset_dict.json in it; {hint}")
    return "parquet", {"data_files": {SPLIT: files}}


def label_fraction() -> float:
    """The share of the training pictures whose labels the image-blind majority may learn from."""
    text = os.environ.get(LABEL_VARIABLE, str(splits.LABEL_FRACTION))
    try:
        return float(text)
    except ValueError:
        raise LeamlError(f"{LABEL_VARIABLE} must be a number such as 0.01, got {text!r}.") from None


# -------------------------------------------------------------------------------------------------- rows and split


def check_columns(dataset: Any) -> Any:
    """The data set with ``image`` decoded as pictures; :class:`LeamlError` where a column of the schema is missing."""
    from datasets import Image

    missing = [name for name in COLUMNS if name not in dataset.column_names]
    if missing:
        raise LeamlError(
            f"the endoscopy data have no column {', '.join(missing)}; Kvasir-VQA has image, source, question, answer, "
            f"img_id, and these have {', '.join(dataset.column_names)}."
        )
    if not isinstance(dataset.features["image"], Image):
        dataset = dataset.cast_column("image", Image())
    return dataset


def split(dataset: Any, fraction: float | None = None) -> splits.Split:
    """The split of a data set's pictures; only the column ``img_id`` is read."""
    return splits.make_split(map(str, column(dataset, "img_id")), label_fraction=fraction or label_fraction())


def column(dataset: Any, name: str) -> list:
    return dataset.select_columns([name]).with_format(None)[:][name]


def evaluation_rows(dataset: Any, family: str | None = None, shuffle_pictures: bool = False) -> Any:
    """The rows of the test pictures with the columns ``blind`` (image-blind answer) and ``family`` added.

    ``family`` keeps one question family. ``shuffle_pictures`` shows each question another test picture, chosen by
    hash, never its own: what a model still scores then it owes to the questions alone.
    """
    dataset = check_columns(dataset)
    ids = [str(name) for name in column(dataset, "img_id")]
    questions, answers = column(dataset, "question"), column(dataset, "answer")
    parts = splits.make_split(ids, label_fraction=label_fraction())
    blind = metrics.BlindMajority(
        (question, answer) for name, question, answer in zip(ids, questions, answers) if name in parts.labelled
    )
    families = [metrics.family(question) for question in questions]
    # columns are added before rows are selected: the other way round the pictures would be copied
    dataset = dataset.add_column("blind", [blind.answer(question) for question in questions])
    dataset = dataset.add_column("family", families)
    rows = [i for i, name in enumerate(ids) if name in parts.test and family in (None, families[i])]
    if not rows:
        what = f"question of the family {family!r}" if family else "test picture"
        raise LeamlError(f"the endoscopy data have no {what} among {len(set(ids))} pictures; use more of them.")
    selected = dataset.select(rows)
    return _with_other_pictures(dataset, selected, rows, ids) if shuffle_pictures else selected


def _with_other_pictures(dataset: Any, selected: Any, rows: list[int], ids: list[str]) -> Any:
    first = {}
    for row in rows:
        first.setdefault(ids[row], row)
    ring = sorted(first, key=lambda name: (splits.bucket(name, "shuffle"), name))
    if len(ring) < 2:
        raise LeamlError("shuffling pictures needs at least two test pictures; use more data.")
    other = {name: first[ring[(i + 1) % len(ring)]] for i, name in enumerate(ring)}
    pictures = dataset.select_columns(["image"])

    def swap(batch: dict[str, list]) -> dict[str, list]:
        if "image" in batch:  # lmms-eval scores with the picture column removed
            batch["image"] = [pictures[other[str(name)]]["image"] for name in batch["img_id"]]
        return batch

    return selected.with_transform(swap)


# ---------------------------------------------------------------------------------------------- asking and scoring


def prompts() -> Prompts:
    """The prompts of ``leaml adapt``, so that a model is asked as it was trained; ``$LEAML_PROMPTS`` replaces them."""
    return Prompts.load(os.environ.get("LEAML_PROMPTS") or None)


def question_text(doc: Mapping[str, Any]) -> str:
    return prompts().vqa(QA("", (), doc["question"], "")).prompt


def pictures(doc: Mapping[str, Any]) -> list:
    return [doc["image"].convert("RGB")]


def no_pictures(doc: Mapping[str, Any]) -> list:
    return []
