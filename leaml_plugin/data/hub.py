"""Hugging Face datasets: which splits there are, which columns hold pictures, and the bytes of one picture.

Covers: ``save_to_disk`` directories, directories of parquet files, ids on the Hub. Pictures are never decoded here and
stay in the dataset's files until one is asked for.
Does not cover: datasets with loading scripts (``datasets`` runs none any more), audio and video columns.
"""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leaml_plugin.errors import LeamlError, unknown_name

if TYPE_CHECKING:
    from datasets import Dataset


def is_dataset_directory(path: Path) -> bool:
    """Whether ``path`` was written by ``save_to_disk`` or holds parquet files."""
    if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return True
    return any(path.rglob("*.parquet"))


def open_split(name: str, split: str | None) -> tuple[str, Dataset]:
    """The split ``split`` of a dataset directory or Hub id; by default its only split, or ``train``.

    Raises:
        LeamlError: no such dataset or split; several splits without ``train`` and none chosen.
    """
    splits = _open(name)
    if split is None:
        if len(splits) > 1 and "train" not in splits:
            raise LeamlError(f"{name}: has the splits {', '.join(splits)}; choose one with {name}?split={min(splits)}")
        split = "train" if "train" in splits else next(iter(splits))
    if split not in splits:
        raise unknown_name(f"split of {name}", split, splits)
    return split, splits[split]


def picture_columns(dataset: Dataset) -> dict[str, bool]:
    """Columns with embedded pictures; true where a row holds a list of them."""
    found = {}
    for name, feature in dataset.features.items():
        inner = getattr(feature, "feature", None)
        if _is_picture(feature):
            found[name] = False
        elif inner is not None and _is_picture(inner):
            found[name] = True
    return found


def picture_counts(dataset: Dataset, column: str, many: bool) -> list[int]:
    """How many pictures ``column`` has in each row, without reading them."""
    import pyarrow.compute as pc

    data = dataset.data.column(column)
    counts = pc.list_value_length(data) if many else pc.cast(pc.is_valid(data), "int64")
    return pc.fill_null(counts, 0).to_pylist()


def embedded_bytes(name: str, split: str, row: int, column: str, index: int | None = None) -> bytes:
    """The encoded picture in a row of a dataset.

    Raises:
        LeamlError: there is none, or it is a link that leaves the dataset's directory.
    """
    where = f"{name} split {split} row {row}"
    view = _column(name, split, column)
    if not 0 <= row < len(view):
        raise LeamlError(f"{where}: the dataset has {len(view)} rows; was it changed since it was read?")
    value = view[row][column]
    if index is not None:
        value = value[index] if value is not None and index < len(value) else None
    if isinstance(value, dict):
        data, path = value.get("bytes"), value.get("path")
    else:
        data, path = value, None
    if data is None and path:
        root, real = os.path.realpath(name), os.path.realpath(path)
        if not os.path.isdir(root) or os.path.commonpath([root, real]) != root:
            raise LeamlError(f"{where}: its picture {path} lies outside the dataset; embed it or move it inside.")
        try:
            return Path(real).read_bytes()
        except OSError as error:
            raise LeamlError(f"{where}: its picture {path} cannot be read ({error.strerror}).") from error
    if not isinstance(data, bytes):
        raise LeamlError(f"{where}: column {column!r} has no picture; remove the row or fill it in.")
    return data


@functools.lru_cache(maxsize=64)
def _column(name: str, split: str, column: str) -> Dataset:
    _, dataset = open_split(name, split)
    if column not in dataset.column_names:
        raise unknown_name(f"column of {name}", column, dataset.column_names)
    return _undecoded(dataset.select_columns([column]))


def _undecoded(dataset: Dataset) -> Dataset:
    """``dataset`` with its pictures as bytes; decoding is ours alone (:mod:`leaml_plugin.data.images`)."""
    from datasets import Image

    for name, many in picture_columns(dataset).items():
        if isinstance(dataset.features[name], Image):
            dataset = dataset.cast_column(name, Image(decode=False))
        elif many and isinstance(dataset.features[name].feature, Image):
            dataset = dataset.cast_column(name, type(dataset.features[name])(Image(decode=False)))
    return dataset


def _is_picture(feature: Any) -> bool:
    from datasets import Image

    if isinstance(feature, Image):
        return True
    return isinstance(feature, dict) and set(feature) == {"bytes", "path"}  # parquet without feature metadata


@functools.lru_cache(maxsize=8)
def _open(name: str) -> dict[str, Dataset]:
    try:
        import datasets
    except ImportError as error:
        raise LeamlError(f"{name}: reading Hugging Face datasets needs `pip install datasets`.") from error
    directory = Path(name)
    try:
        if directory.is_dir():
            if (directory / "dataset_dict.json").is_file() or (directory / "state.json").is_file():
                found = datasets.load_from_disk(name)
            else:
                found = datasets.load_dataset("parquet", data_files=_parquet_files(directory))
        else:
            found = datasets.load_dataset(name)
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if directory.is_dir():
            raise LeamlError(f"{name}: the dataset cannot be read ({first})") from error
        raise LeamlError(
            f"{name}: is neither a file, a directory, nor a dataset that can be fetched from the Hub ({first})"
        ) from error
    return dict(found) if isinstance(found, dict) else {"train": found}


def _parquet_files(directory: Path) -> dict[str, list[str]]:
    """Splits by the Hub's file names (``data/test-00000-of-00002.parquet``) or folders (``test/x.parquet``)."""
    splits: dict[str, list[str]] = {}
    for path in sorted(directory.rglob("*.parquet")):
        match = re.match(r"(.+)-\d{5}-of-\d{5}(-\w+)?$", path.stem)
        folder = path.parent.name if path.parent != directory else ""
        if match:
            split = match[1]
        elif path.stem in ("train", "test", "validation", "val", "dev", "raw"):
            split = path.stem
        elif folder in ("train", "test", "validation", "val", "dev", "raw"):
            split = folder
        else:
            split = "train"
        splits.setdefault(re.sub(r"\W", "_", split), []).append(str(path))
    return splits
