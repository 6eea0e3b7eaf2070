"""Kvasir-VQA-x1: open questions of three degrees of complexity about the pictures of Kvasir-VQA.

Covers: the questions on the Hub or as a local copy (``LEAML_ENDOSCOPY_X1_DATA``), joined by ``img_id`` with the
pictures of Kvasir-VQA, which x1 does not repeat. Its own train and test parts share pictures, so of its test questions
those are asked whose picture is a test picture of ``leaml_endoscopy`` too: a model adapted on the files of
``leaml data endoscopy`` has seen none of them. Beside each score stands that of an image-blind answer, learnt from x1's
answers about the labelled pictures (of its train and test files alike).
Does not cover: the augmented pictures of its robustness track.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from leaml_plugin import metrics, splits
from leaml_plugin.errors import LeamlError
from leaml_plugin.lmms import endoscopy
from leaml_plugin.lmms.hub import hub_source

HUB_ID = "SimulaMet/Kvasir-VQA-x1"
DATA_VARIABLE = "LEAML_ENDOSCOPY_X1_DATA"
SPLIT = "test"
COLUMNS = ("img_id", "complexity", "question", "answer")


def source(location: str | None = None) -> tuple[str, dict[str, Any]]:
    """What ``datasets.load_dataset`` takes: the Hub's questions, or the parquet or JSON files of a local copy."""
    return _source(location, SPLIT)


def _source(location: str | None, split: str) -> tuple[str, dict[str, Any]]:
    location = location or os.environ.get(DATA_VARIABLE)
    if not location:
        return hub_source(
            HUB_ID,
            f"download it with 'hf download {HUB_ID} --repo-type dataset --local-dir kvasir-vqa-x1' where there is a "
            f"network and set {DATA_VARIABLE}=kvasir-vqa-x1.",
        )
    directory = Path(location).expanduser().resolve()
    if not directory.is_dir():
        raise LeamlError(f"{directory}: no such directory ({DATA_VARIABLE}); it should hold the files of {HUB_ID}.")
    for builder, suffixes in (("parquet", (".parquet",)), ("json", (".json", ".jsonl"))):
        files = sorted(str(path) for path in directory.rglob("*") if path.suffix in suffixes)
        files = [file for file in files if split in Path(file).name.lower()] or files
        if files:
            return builder, {"data_files": {split: files}}
    raise LeamlError(f"{directory}: no parquet or JSON file in it; it should hold the files of {HUB_ID}.")


def evaluation_rows(dataset: Any) -> Any:
    """The questions about test pictures, with the column ``blind``: what an image-blind predictor answers ("" if it has
    no label to learn from). Every picture is looked up before anything is asked."""
    missing = [name for name in COLUMNS if name not in dataset.column_names]
    if missing:
        raise LeamlError(f"the x1 data have no column {', '.join(missing)} but {', '.join(dataset.column_names)}.")
    names = [str(name) for name in endoscopy.column(dataset, "img_id")]
    rows = [i for i, name in enumerate(names) if splits.is_test(name)]
    if not rows:
        raise LeamlError(f"the x1 data have no question about a test picture among {len(set(names))} pictures.")
    known = _rows_by_name()
    unknown = sorted({names[i] for i in rows} - known.keys())
    if unknown:
        raise LeamlError(
            f"{len(unknown)} pictures of the x1 data are not in Kvasir-VQA, the first is {unknown[0]}; the pictures "
            f"come from {endoscopy.DATA_VARIABLE} or the Hub."
        )
    blind = _blind(dataset, splits.make_split(known, label_fraction=endoscopy.label_fraction()).labelled)
    chosen = dataset.select(rows)
    answers = [blind.answer(row["question"], _kind(row)) or "" for row in _plain(chosen)]
    return chosen.add_column("blind", answers)


def _blind(dataset: Any, labelled: frozenset[str]) -> metrics.BlindText:
    """What x1's answers about the labelled pictures teach: those of its train part, and of its test part's others."""
    from datasets import load_dataset

    path, kwargs = _source(None, "train")
    rows = [*_plain(load_dataset(path, split="train", **kwargs)), *_plain(dataset)]
    # a local copy without a train file gives the same rows twice
    known = dict.fromkeys(
        (str(row["question"]), _kind(row), str(row["answer"])) for row in rows if str(row["img_id"]) in labelled
    )
    return metrics.BlindText(known)


def _plain(dataset: Any) -> list[dict[str, Any]]:
    names = [name for name in (*COLUMNS, "question_class") if name in dataset.column_names]
    return dataset.select_columns(names).with_format(None).to_list()


def _kind(row: Mapping[str, Any]) -> str:
    """The classes of x1's question and its complexity, as one name."""
    classes = row.get("question_class") or []
    classes = [classes] if isinstance(classes, str) else sorted(map(str, classes))
    return f"{row['complexity']} {' '.join(classes)}"


def pictures(doc: Mapping[str, Any]) -> list:
    return [_pictures()[_rows_by_name()[str(doc["img_id"])]]["image"].convert("RGB")]


@functools.lru_cache(maxsize=1)
def _load(location: str | None) -> Any:
    from datasets import load_dataset, load_from_disk

    path, kwargs = endoscopy.source(location)
    stored = load_from_disk(path) if kwargs.get("load_from_disk") else load_dataset(path, **kwargs)
    return endoscopy.check_columns(stored[endoscopy.SPLIT]).select_columns(["image", "img_id"])


def _pictures() -> Any:
    return _load(os.environ.get(endoscopy.DATA_VARIABLE))


def _rows_by_name() -> dict[str, int]:
    return _index(os.environ.get(endoscopy.DATA_VARIABLE))


@functools.lru_cache(maxsize=1)
def _index(location: str | None) -> dict[str, int]:
    first: dict[str, int] = {}
    for row, name in enumerate(endoscopy.column(_load(location), "img_id")):
        first.setdefault(str(name), row)
    return first
