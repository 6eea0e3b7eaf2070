"""File formats become records: labelled questions and unlabelled pictures.

Covers, for labels: JSONL, JSON and CSV with ``image``, ``question``, ``answer``; the conversations format (LLaVA,
ShareGPT); the ``messages`` format; Hugging Face dataset directories and ids with embedded pictures. For pictures: a
directory, a JSONL, a Hugging Face dataset, each with or without a file of captions. The format is recognised record by
record.
Does not cover: decoding pictures (``leaml_plugin.data.images``) and videos (give the frames: a list, or a directory).

Unlabelled pictures are read as a stream and kept in a temporary file (:mod:`leaml_plugin.sequences`), so that their
number does not matter to the memory; a ``.json`` file alone is parsed whole. Labels are few and become a list.

A relative path in a data file is looked for under ``image_root`` where given, then beside the file. What it leads to,
after all links, must lie under one of the two. Every mistake is a :class:`LeamlError` that names file, line and field.
"""

from __future__ import annotations

import csv
import heapq
import itertools
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from leaml_plugin.data import hub
from leaml_plugin.data.images import SUFFIXES, hf_uri
from leaml_plugin.errors import LeamlError
from leaml_plugin.progress import track
from leaml_plugin.records import QA, ImageRef, Picture
from leaml_plugin.sequences import Spool, text_key

# Names under which real data sets keep these; the first is ours.
_IMAGE = ("image", "images", "frames", "video", "file_name", "image_path", "img", "picture")
_QUESTION = ("question", "query", "problem", "instruction")
_ANSWER = ("answer", "response", "output", "solution")
_ID = ("id", "question_id", "qid", "sample_id", "uid")
_CAPTION = ("caption", "text", "description")
_PICTURE_ID = ("img_id", "image_id")
_OPTIONS = ("options", "choices")
_USER, _ASSISTANT = ("user", "human"), ("assistant", "gpt", "model", "bot")

_SUFFIXES_OF_RECORDS = (".jsonl", ".ndjson", ".json", ".csv")
_KNOWN_PATHS = 4096  # that are remembered, so that several questions about one picture look it up once
_SORTED_NAMES = 20_000  # names of one folder that are sorted in memory


def load_labeled(path: str | os.PathLike[str], image_root: str | os.PathLike[str] | None = None) -> list[QA]:
    """Read labelled questions.

    Args:
        path: a ``.jsonl``, ``.json`` or ``.csv`` file, a Hugging Face dataset directory, or a Hub id. A split is
            chosen by ``<path>?split=<name>``; by default the only one, or ``train``.
        image_root: where relative picture paths are looked for first, and up to where absolute ones may lead.

    Returns:
        Records in the file's order. A conversation with several questions becomes one record each. Answer options
        are appended to the question, one a line. Fields that mean nothing to us go to ``meta``.

    Raises:
        LeamlError: one sentence with file, line, field and what to do.
    """
    name, split = _split_of(path)
    out: list[QA] = []
    for record in track(_records(name, split, image_root, "questions and answers"), f"reading {name}", unit="record"):
        out.extend(_labels(record))
    if not out:
        raise LeamlError(f"{name}: has no samples; add at least one question with its answer.")
    _check_unique([(qa.id, qa.source) for qa in out])
    return out


def load_unlabeled(path: str | os.PathLike[str], captions: str | os.PathLike[str] | None = None) -> Sequence[Picture]:
    """Read unlabelled pictures, with the teacher's captions where there are any.

    Args:
        path: a directory of pictures (with all its folders), a ``.jsonl``, ``.json`` or ``.csv`` file with an
            ``image`` (and perhaps ``caption``) a record, a Hugging Face dataset directory, or a Hub id.
        captions: a file with ``image`` and ``caption`` a record, or one JSON object from image to caption. An image is
            a path, relative to the pictures' directory or to this file, or the id of a picture.

    Returns:
        Pictures in the order of their paths (directory) or of the file, in a temporary file that lasts as long as the
        sequence. The id is the relative path, or what the file says.

    Raises:
        LeamlError: one sentence with file, line, field and what to do.
    """
    name, split = _split_of(path)
    root = Path(name)
    if root.is_dir() and not hub.is_dataset_directory(root):
        pictures = _directory(root)
    else:
        pictures = _listed(name, lambda: _records(name, split, None, "pictures", share=False))
    if captions is not None:
        pictures = _with_captions(pictures, Path(captions), root if root.is_dir() else root.parent)
    return pictures


# -- records of any file ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Record:
    """One record as it stands in a file, with what is needed to read it."""

    row: Mapping[str, Any]
    source: str
    default_id: str
    paths: _Paths
    embedded: tuple[ImageRef, ...] | None = None  # pictures that came with a dataset's row
    id_names: tuple[str, ...] = _ID

    def error(self, text: str) -> LeamlError:
        return LeamlError(f"{self.source}: {text}")

    def first(self, names: Sequence[str]) -> str | None:
        """Which of the names the record has."""
        return next((n for n in names if n in self.row), None)


@dataclass(frozen=True)
class _Paths:
    """Where picture paths of one file may lead."""

    roots: tuple[Path, ...]  # in the order in which they are searched
    _known: dict[str, Path] = field(default_factory=dict)
    _folders: dict[str, str] = field(default_factory=dict)

    @cached_property
    def _inside(self) -> list[str]:
        return [os.path.realpath(root) for root in self.roots]

    def resolve(self, value: Any, source: str, field: str) -> Path:
        """The absolute path of a file or directory that ``value`` names."""
        if not isinstance(value, str) or not value.strip():
            raise LeamlError(f"{source}: field {field!r} is {_short(value)}; give the path of a picture.")
        if re.match(r"(https?|s3|gs|hf|file|data):", value, re.IGNORECASE):
            kind = "an address" if "://" in value else "inline data"
            raise LeamlError(f"{source}: field {field!r} is {kind} ({_short(value)}); store the picture in a file.")
        if "\0" in value:
            raise LeamlError(f"{source}: field {field!r} has a NUL character; correct the path.")
        if _has_surrogate(value):
            raise LeamlError(f"{source}: field {field!r} holds half a character (a lone surrogate); correct the path.")
        if not self.roots:
            raise LeamlError(
                f"{source}: field {field!r} is a path ({_short(value)}); give the image root it lies under."
            )
        if value not in self._known:
            _make_room(self._known)
            self._known[value] = self._find(value, source, field)
        return self._known[value]

    def _find(self, value: str, source: str, field: str) -> Path:
        places = [os.path.abspath(os.path.join(root, value)) for root in self.roots]
        place = next((p for p in places if os.path.exists(p)), None)
        # refused before "missing": the answer must not tell what exists outside
        real = self._real(place or places[0])
        if not any(real == root or real.startswith(root.rstrip(os.sep) + os.sep) for root in self._inside):
            allowed = " and ".join(str(r) for r in self.roots)
            raise LeamlError(
                f"{source}: field {field!r} leads outside {allowed} ({_short(value)}); "
                "move the picture there, or give the directory that it may come from as the image root."
            )
        if place is None:
            if max(map(len, value.split("/"))) > 255:
                raise LeamlError(f"{source}: field {field!r} is no path (too long a name): {_short(value)}")
            tried = " nor ".join(dict.fromkeys(places))
            raise LeamlError(f"{source}: field {field!r}: no file {tried}; correct the path or add the picture.")
        return Path(place)

    def _real(self, path: str) -> str:
        """``os.path.realpath``, with the folders looked up once."""
        if os.path.islink(path):
            return os.path.realpath(path)
        folder, name = os.path.split(path)
        if folder not in self._folders:
            _make_room(self._folders)
            self._folders[folder] = os.path.realpath(folder)
        return os.path.join(self._folders[folder], name)


def _make_room(cache: dict[str, Any]) -> None:
    if len(cache) >= _KNOWN_PATHS:
        cache.clear()


def _split_of(path: str | os.PathLike[str]) -> tuple[str, str | None]:
    text = os.fspath(path)
    if "?split=" in text and not os.path.exists(text):
        text, _, split = text.rpartition("?split=")
        return text, split
    return text, None


def _records(name: str, split: str | None, image_root: Any, what: str, share: bool = True) -> Iterator[_Record]:
    """The records of any source; ``share`` gives rows of a dataset about one picture the same references."""
    path = Path(name)
    roots = () if image_root is None else (Path(os.path.abspath(image_root)),)
    if roots and not roots[0].is_dir():
        raise LeamlError(f"{roots[0]}: no such directory; correct the image root.")
    if path.is_file():
        if path.suffix.lower() not in _SUFFIXES_OF_RECORDS:
            known = ", ".join(_SUFFIXES_OF_RECORDS)
            raise LeamlError(f"{name}: {path.suffix or 'no suffix'} is no known format; give a file in one of {known}.")
        if split is not None:
            raise LeamlError(f"{name}: a file has no splits; leave out ?split={split}.")
        yield from _file_records(path, _Paths((*roots, Path(os.path.abspath(path)).parent)))
    elif path.is_dir() and not hub.is_dataset_directory(path):
        listed = [path / n for n in ("metadata.jsonl", "metadata.csv") if (path / n).is_file()]
        if not listed:
            files = sorted(p.name for p in path.iterdir() if p.suffix.lower() in _SUFFIXES_OF_RECORDS)
            hint = f"give one of its files ({', '.join(files[:3])})" if files else f"give a file with {what}"
            raise LeamlError(f"{name}: is a directory, but no Hugging Face dataset; {hint}.")
        yield from _file_records(listed[0], _Paths((*roots, Path(os.path.abspath(path)))))
    elif path.is_dir() or _may_be_hub_id(name):
        yield from _dataset_records(name, split, roots, share)
    else:
        raise LeamlError(f"{name}: no such file; give the file with {what}.")


def _may_be_hub_id(name: str) -> bool:
    return (
        bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name))
        and not name.startswith(".")
        and Path(name).suffix
        not in (
            *_SUFFIXES_OF_RECORDS,
            ".txt",
            ".tsv",
            ".zip",
        )
    )


def _file_records(path: Path, paths: _Paths) -> Iterator[_Record]:
    suffix = path.suffix.lower()
    reader = {".csv": _csv_rows, ".json": _json_rows}.get(suffix, _jsonl_rows)
    for number, where, row in reader(path):
        if not isinstance(row, Mapping):
            raise LeamlError(f"{where}: is {_short(row)}, not an object with fields; write one {{…}} a record.")
        yield _Record(row, where, f"{path.stem}:{number}", paths)


def _cannot_read(path: Path, error: OSError) -> LeamlError:
    return LeamlError(f"{path}: cannot be read ({error.strerror}).")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _cannot_read(path, error) from error


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise LeamlError(f"{where}: byte {error.start} is no UTF-8; save the file as UTF-8.") from error


def _parse(text: str, where: str) -> Any:
    def no_constant(name: str) -> Any:
        raise ValueError(f"{name} is no JSON number")

    try:
        return json.loads(text, parse_constant=no_constant)
    except json.JSONDecodeError as error:
        line = f" line {error.lineno}" if "line" not in where else ""
        hint = "; is it JSONL? then name it .jsonl" if error.msg == "Extra data" and line else ""
        raise LeamlError(f"{where}{line}: is no valid JSON ({error.msg} at column {error.colno}){hint}.") from error
    except (ValueError, RecursionError) as error:
        raise LeamlError(f"{where}: is no valid JSON ({error}).") from error


def _jsonl_rows(path: Path) -> Iterator[tuple[int, str, Any]]:
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                where = f"{path} line {number}"
                text = _decode(line, where).strip()
                if text:
                    yield number, where, _parse(text, where)
    except OSError as error:
        raise _cannot_read(path, error) from error


def _json_rows(path: Path) -> Iterator[tuple[int, str, Any]]:
    data = _parse(_decode(_read(path), str(path)), str(path))
    if isinstance(data, Mapping):
        lists = [v for v in data.values() if isinstance(v, list)]
        if len(lists) != 1:
            raise LeamlError(f"{path}: must hold a list of records (or an object with one such list).")
        data = lists[0]
    if not isinstance(data, list):
        raise LeamlError(f"{path}: holds {_short(data)}; it must hold a list of records.")
    for number, row in enumerate(data, start=1):
        yield number, f"{path} item {number}", row


def _csv_rows(path: Path) -> Iterator[tuple[int, str, Any]]:
    number = 0
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            for row in reader:
                number = reader.line_num
                where = f"{path} line {number}"
                if None in row or None in row.values():
                    raise LeamlError(
                        f"{where}: has not as many cells as the header has columns; quote cells with commas."
                    )
                yield number, where, row
    except csv.Error as error:
        raise LeamlError(f"{path} line {reader.line_num}: is no valid CSV ({error}).") from error
    except UnicodeDecodeError as error:
        raise LeamlError(f"{path}: is no UTF-8 after line {number}; save the file as UTF-8.") from error
    except OSError as error:
        raise _cannot_read(path, error) from error


def _dataset_records(name: str, split: str | None, roots: tuple[Path, ...], share: bool) -> Iterator[_Record]:
    local = os.path.isdir(name)
    name = os.path.abspath(name) if local else name
    split, dataset = hub.open_split(name, split)
    columns = hub.picture_columns(dataset)
    chosen = [c for c in _IMAGE if c in columns] or list(columns)[:1]
    counts = {c: hub.picture_counts(dataset, c, columns[c]) for c in chosen}
    text = dataset.select_columns([c for c in dataset.column_names if c not in columns])
    paths = _Paths((*roots, Path(name)) if local else roots)
    # a published dataset cannot be corrected: an id column that names no row is not used as one
    id_names = tuple(c for c in _ID if c in text.column_names and not any(_repeats(map(_key, text[c]))))
    by_picture: dict[Any, tuple[ImageRef, ...]] = {}
    rows = text if text.column_names else ({} for _ in range(len(dataset)))
    for number, row in enumerate(rows):
        refs = tuple(
            ImageRef(hf_uri(name, split, number, c, j if columns[c] else None))
            for c in chosen
            for j in range(counts[c][number])
        )
        # rows about one picture hold a copy each; one reference means one decoding and one split
        key = next((row[k] for k in _PICTURE_ID if isinstance(row.get(k), str | int)), None) if share else None
        if key is not None:
            refs = by_picture.setdefault(key, refs)
        where, default_id = f"{name} split {split} row {number}", f"{split}:{number}"
        yield _Record(row, where, default_id, paths, refs if columns else None, id_names)


# -- fields ----------------------------------------------------------------------------------------------------------


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 60 else text[:57] + "..."


def _text(record: _Record, field: str, value: Any, what: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise record.error(f"field {field!r} is {_short(value)}; give {what} as text.")
    if isinstance(value, float):
        if not math.isfinite(value):
            raise record.error(f"field {field!r} is not a number; give {what} as text.")
        value = int(value) if value.is_integer() else value
    text = str(value).strip()
    if not text:
        raise record.error(f"field {field!r} is empty; fill in {what} or remove the record.")
    if _has_surrogate(text):
        raise record.error(f"field {field!r} holds half a character (a lone surrogate); correct the text.")
    return text


def _field(record: _Record, names: Sequence[str], what: str) -> tuple[str, Any]:
    field = record.first(names)
    if field is None:
        has = ", ".join(repr(k) for k in list(record.row)[:8]) or "none"
        raise record.error(f"field {names[0]!r} is missing (it has {has}); add {what}.")
    return field, record.row[field]


def _images(record: _Record, required: bool) -> tuple[ImageRef, ...]:
    """The record's pictures; ``null`` or an empty list says that there is none."""
    if record.embedded is not None:
        return record.embedded
    field = record.first(_IMAGE)
    if field is None:
        if required:
            _field(record, _IMAGE, "the path of the picture (null for a question without one)")
        return ()
    value = record.row[field]
    if value is None or value == []:
        return ()
    if isinstance(value, Mapping):
        value = value.get("path")
    if isinstance(value, list):
        return tuple(_picture(record, field, v.get("path") if isinstance(v, Mapping) else v) for v in value)
    path = record.paths.resolve(value, record.source, field)
    if path.is_dir():
        frames = [p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file()]
        if not frames:
            raise record.error(f"field {field!r}: the directory {path} holds no pictures; put the frames there.")
        return tuple(ImageRef(str(p)) for p in sorted(frames, key=lambda p: _natural(p.name)))
    return (_picture(record, field, value),)


def _picture(record: _Record, field: str, value: Any) -> ImageRef:
    path = record.paths.resolve(value, record.source, field)
    if path.is_dir():
        raise record.error(f"field {field!r}: {path} is a directory; give the path of a picture.")
    if path.suffix.lower() in (".mp4", ".avi", ".mov", ".mkv", ".webm"):
        raise record.error(f"field {field!r}: {path.name} is a video; extract its frames and give a list of pictures.")
    return ImageRef(str(path))


def _natural(name: str) -> list[Any]:
    """frame_2 before frame_10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]


def _record_id(record: _Record) -> str:
    field = record.first(record.id_names)
    value = record.row[field] if field else None
    if value is None or value == "":
        return record.default_id
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise record.error(f"field {field!r} is {_short(value)}; give the id as text or a whole number.")
    return _text(record, str(field), value, "the id")


def _meta(record: _Record, used: Sequence[str | None]) -> dict[str, Any]:
    skip = {*_IMAGE, *_ID, *(u for u in used if u), "conversations", "messages"}
    return {k: v for k, v in record.row.items() if k not in skip and _is_json({k: v})}


def _is_json(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(k, str) and _is_json(k) and _is_json(v) for k, v in value.items())
    if isinstance(value, list):
        return all(_is_json(v) for v in value)
    if isinstance(value, str):
        return not _has_surrogate(value)
    return value is None or isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value))


def _options(record: _Record) -> str:
    """Answer options as lines to append to the question, or nothing."""
    field = record.first(_OPTIONS)
    value = record.row[field] if field else None
    if not value:
        return ""
    if isinstance(value, list):
        value = {chr(ord("A") + i): v for i, v in enumerate(value)}
    if not isinstance(value, Mapping):
        raise record.error(
            f"field {field!r} is {_short(value)}; give a list of options or an object from letter to option."
        )
    # a dataset's table has every letter in every row, null where there is no such option
    lines = [f"{k}. {_text(record, str(field), v, 'every option')}" for k, v in value.items() if v is not None]
    return "".join("\n" + line for line in lines)


def _check_unique(items: Sequence[tuple[str, str]]) -> None:
    seen: dict[str, str] = {}
    for name, source in items:
        if name in seen:
            raise LeamlError(f"{source}: the id {name!r} is also that of {seen[name]}; give every record its own.")
        seen[name] = source


# -- labels ----------------------------------------------------------------------------------------------------------


def _labels(record: _Record) -> list[QA]:
    if record.row.get("conversations") is not None:
        return _conversation(record, "conversations", "from", "value")
    if record.row.get("messages") is not None:
        return _conversation(record, "messages", "role", "content")
    q_field, question = _field(record, _QUESTION, "the question")
    a_field, answer = _field(record, _ANSWER, "its answer")
    images = _images(record, required=True)
    text = _text(record, q_field, question, "the question") + _options(record)
    meta = _meta(record, [q_field, a_field])
    return [QA(_record_id(record), images, text, _text(record, a_field, answer, "the answer"), record.source, meta)]


def _conversation(record: _Record, field: str, role_key: str, text_key: str) -> list[QA]:
    """Pairs of user and assistant messages; every pair gets the pictures shown up to it.

    Earlier pairs of a conversation are not repeated in later ones: each becomes a question of its own.
    """
    messages = record.row[field]
    if not isinstance(messages, list) or not messages:
        raise record.error(f"field {field!r} is {_short(messages)}; give a list of messages.")
    shown: list[ImageRef] = []
    pairs: list[tuple[str, str, tuple[ImageRef, ...]]] = []
    question, marks = None, 0
    for n, message in enumerate(messages):
        at = f"{field}[{n}]"
        if not isinstance(message, Mapping) or role_key not in message or text_key not in message:
            raise record.error(f"field {at!r} is {_short(message)}; give an object with {role_key!r} and {text_key!r}.")
        role = message[role_key]
        if role == "system":
            continue
        text, images, placeholders = _content(record, message[text_key], at)
        marks += placeholders
        shown += images
        if role in _USER:
            if question is not None:
                raise record.error(f"field {at!r}: a question follows a question; add the answer between them.")
            question = _text(record, at, text, "the question")
        elif role in _ASSISTANT:
            if question is None:
                raise record.error(f"field {at!r}: an answer without a question before it; add the question.")
            pairs.append((question, _text(record, at, text, "the answer"), tuple(shown)))
            question = None
        else:
            known = ", ".join(("system", *_USER, *_ASSISTANT))
            raise record.error(f"field {at!r} has the {role_key} {_short(role)}; known are {known}.")
    if question is not None:
        raise record.error(f"field {field!r} ends with a question; add its answer.")
    if not pairs:
        raise record.error(f"field {field!r} has no question with an answer; add one.")
    listed = () if shown else _images(record, required=marks > 0)
    if marks and not shown and marks != len(listed):
        raise record.error(f"has {marks} <image> placeholder(s), but {len(listed)} picture(s); make them equal.")
    name, meta = _record_id(record), _meta(record, [field])
    many = len(pairs) > 1
    return [
        QA(f"{name}.{k}" if many else name, images or listed, question, answer, record.source, meta)
        for k, (question, answer, images) in enumerate(pairs)
    ]


def _content(record: _Record, content: Any, at: str) -> tuple[str, list[ImageRef], int]:
    """Text, pictures, and how many placeholders stand for pictures listed elsewhere."""
    if isinstance(content, str):
        return _strip_placeholders(content), [], content.count("<image>")
    if not isinstance(content, list):
        raise record.error(f"field {at!r} is {_short(content)}; give text or a list of parts.")
    texts, images, marks = [], [], 0
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text":
            texts.append(_strip_placeholders(_text(record, at, part.get("text"), "the text")))
        elif kind in ("image", "image_url"):
            value = next((part[k] for k in ("image", "path", "url", "image_url") if part.get(k) is not None), None)
            if isinstance(value, Mapping):
                value = value.get("url") or value.get("path")
            if value is None:
                marks += 1
            else:
                images.append(_picture(record, at, value.removeprefix("file://") if isinstance(value, str) else value))
        else:
            raise record.error(f"field {at!r} has the part {_short(part)}; known types are text and image.")
    return "\n".join(texts), images, marks


def _strip_placeholders(text: str) -> str:
    """Where a picture stands in the text is up to the model's chat template."""
    return re.sub(r"\s*<image>\s*", " ", text).strip()


# -- pictures --------------------------------------------------------------------------------------------------------


def _has_surrogate(text: str) -> bool:
    return any("\ud800" <= c <= "\udfff" for c in text)


def _key(value: Any) -> int:
    return text_key(value if isinstance(value, str) else repr(value))


def _repeats(keys: Iterable[int]) -> bytearray:
    """1 where an earlier item has the same key."""
    import numpy as np

    from leaml_plugin.tables import in_order, keyed

    repeats, last = bytearray(), None
    for rows in in_order(_counted(keyed(keys), repeats), ("key", "item")):
        again = np.empty(len(rows), bool)
        again[1:] = rows["key"][1:] == rows["key"][:-1]
        again[0] = rows["key"][0] == last
        last = rows["key"][-1]
        for item in rows["item"][again].tolist():
            repeats[item] = 1
    return repeats


def _counted(blocks: Iterable[Any], flags: bytearray) -> Iterator[Any]:
    """``blocks``, with a zero added to ``flags`` for each of their rows."""
    for block in blocks:
        flags.extend(bytes(len(block)))
        yield block


def _directory(root: Path) -> Sequence[Picture]:
    """Every picture under ``root``, hidden files and folders aside; links to folders are not followed."""
    other: dict[str, int] = {}
    spool = Spool(Picture)
    base = os.path.abspath(root)
    for name in track(_walk(os.fsencode(base), b"", other), f"reading {root}", unit="picture"):
        spool.append(Picture(name, (ImageRef(os.path.join(base, name)),)))
    if not len(spool):
        most = max(other, key=lambda s: other[s]) if other else None
        hint = f" (it has {other[most]} {most} files)" if most else ""
        raise LeamlError(f"{root}: has no pictures{hint}; give a directory with {', '.join(SUFFIXES)} files.")
    return spool.finish()


def _walk(root: bytes, folder: bytes, other: dict[str, int]) -> Iterator[str]:
    """Names of pictures below ``root``, relative to it, sorted; ``other`` counts the suffixes of what is none."""

    def entries() -> Iterator[bytes]:
        try:
            with os.scandir(os.path.join(root, folder)) as found:
                for entry in found:
                    if entry.is_dir():
                        if not entry.is_symlink() and not entry.name.startswith((b".", b"__MACOSX")):
                            yield entry.name + b"/"
                    elif not entry.name.startswith(b"."):
                        suffix = os.fsdecode(os.path.splitext(entry.name)[1]).lower()
                        if suffix in SUFFIXES:
                            yield entry.name
                        elif suffix:
                            other[suffix] = other.get(suffix, 0) + 1
        except PermissionError:
            pass  # as os.walk does

    # with its slash a folder sorts among the files as all the paths in it do
    for name in _sorted(entries()):
        if name.endswith(b"/"):
            yield from _walk(root, folder + name, other)
            continue
        try:
            yield (folder + name).decode()
        except UnicodeDecodeError as error:
            shown = os.path.join(root, folder, name).decode("utf-8", "replace")
            raise LeamlError(f"{shown}: the name is no UTF-8; rename the file or its folder.") from error


def _sorted(names: Iterator[bytes]) -> Iterable[bytes]:
    """File names in order; more than a few thousand are sorted in parts that go to a temporary file."""
    parts = []
    while part := sorted(itertools.islice(names, _SORTED_NAMES)):
        if not parts and len(part) < _SORTED_NAMES:
            return part
        file = tempfile.TemporaryFile(prefix="leaml-")
        file.writelines(
            name.replace(b"\n", b"\0") + b"\n" for name in part
        )  # a name has no NUL, but may have a line end
        file.seek(0)
        parts.append(file)
    return heapq.merge(*map(_names_in, parts))


def _names_in(file: Any) -> Iterator[bytes]:
    with file:
        for line in file:
            yield line[:-1].replace(b"\0", b"\n")


def _listed(name: str, records: Callable[[], Iterator[_Record]]) -> Sequence[Picture]:
    """The pictures of a file or dataset, each once."""
    from leaml_plugin.tables import Index

    spool, shared = Spool(Picture), bytearray()

    def keys() -> Iterator[int]:
        for record in track(records(), f"reading {name}", unit="record"):
            picture, may_repeat = _unlabeled(record)
            spool.append(picture)
            shared.append(may_repeat)
            yield text_key(picture.id)

    repeats = _repeats(keys())
    if not repeats:
        raise LeamlError(f"{name}: has no pictures; add at least one record with an image.")
    pictures = spool.finish()
    if not any(repeats):
        return pictures
    first = Index((picture.id for picture in pictures), lambda n: pictures[n].id)
    for n in (n for n, again in enumerate(repeats) if again):
        picture = pictures[n]
        if first.find(picture.id) == n:
            repeats[n] = 0  # only the hashes are equal
        elif not shared[n]:
            source = next(itertools.islice(records(), n, None)).source
            raise LeamlError(f"{source}: the id {picture.id!r} occurs twice; give every record its own.")
    return pictures.without(repeats)


def _unlabeled(record: _Record) -> tuple[Picture, bool]:
    """The picture, and whether other records may hold the same one."""
    images = _images(record, required=True)
    if not images:
        raise record.error("has no picture; give the path of one or remove the record.")
    field = record.first(_CAPTION)
    value = record.row[field] if field else None
    caption = None if value is None else _text(record, str(field), value, "the caption")
    key = next((record.row[k] for k in _PICTURE_ID if isinstance(record.row.get(k), str | int)), None)
    if key is not None and record.first(record.id_names) is None:
        return Picture(str(key), images, caption), True
    return Picture(_record_id(record), images, caption), False


@dataclass(frozen=True)
class _Caption:
    name: str
    text: str
    source: str


def _with_captions(pictures: Sequence[Picture], path: Path, root: Path) -> Sequence[Picture]:
    """``pictures`` with the captions of a file."""
    from leaml_plugin.tables import Index, in_order, keyed

    if not path.is_file():
        what = "is a directory" if path.is_dir() else "no such file"
        raise LeamlError(f"{path}: {what}; give the file with the captions.")
    base, root = Path(os.path.abspath(path)).parent, Path(os.path.abspath(root))
    by_place = Index((p.images[0].uri for p in pictures), lambda n: pictures[n].images[0].uri)
    by_id: Index | None = None  # captions mostly go by path
    spool = Spool(_Caption)  # captions as they come

    def matched() -> Iterator[int]:
        """The picture of each caption."""
        nonlocal by_id
        for record in track(_caption_records(path, base), f"reading {path}", unit="caption"):
            field, key = _field(record, ("image", "id", *_PICTURE_ID, *_IMAGE[1:]), "the picture's path or id")
            if isinstance(key, list) and len(key) == 1:
                key = key[0]
            name = _text(record, field, key, "the picture's path or id")
            c_field, value = _field(record, _CAPTION, "the caption")
            if value is None and record.row.get("reason"):
                continue  # a teacher's refusal, as `leaml caption` keeps it
            caption = _text(record, c_field, value, "the caption")
            places = [os.path.abspath(p / name) for p in (root, base)]
            n = next((n for n in map(by_place.find, places) if n is not None), None)
            if n is None:
                by_id = by_id or Index((p.id for p in pictures), lambda n: pictures[n].id)
                n = by_id.find(name)
            if n is None:
                # captions may cover more than the pictures chosen now, but not pictures that exist nowhere
                if any(os.path.isfile(p) for p in places):
                    continue
                raise record.error(
                    f"field {field!r}: {_short(name)} is none of the {len(pictures)} pictures; correct it."
                )
            spool.append(_Caption(name, caption, record.source))
            yield n

    blocks = in_order(keyed(matched()), ("key", "item"))
    pairs = (pair for block in blocks for pair in zip(block["key"].tolist(), block["item"].tolist()))
    following = next(pairs, None)  # the first row: now all captions are read
    if following is None:
        raise LeamlError(f"{path}: has no caption for any of the {len(pictures)} pictures; check its paths.")
    captions, out = spool.finish(), Spool(Picture)
    for n, picture in enumerate(pictures):
        first: _Caption | None = None
        while following is not None and following[0] == n:
            caption = captions[following[1]]
            first = first or caption
            if caption.text != first.text:
                raise LeamlError(
                    f"{caption.source}: another caption for {_short(caption.name)} stands at {first.source}; keep one."
                )
            following = next(pairs, None)
        out.append(picture if first is None else replace(picture, caption=first.text))
    return out.finish()


def _caption_records(path: Path, base: Path) -> Iterator[_Record]:
    if path.suffix.lower() == ".json":
        data = _parse(_decode(_read(path), str(path)), str(path))
        if isinstance(data, Mapping) and all(isinstance(v, str) for v in data.values()):
            for key, value in data.items():
                yield _Record({"image": key, "caption": value}, f"{path} entry {_short(key)}", key, _Paths((base,)))
            return
    if path.suffix.lower() not in _SUFFIXES_OF_RECORDS:
        known = ", ".join(_SUFFIXES_OF_RECORDS)
        raise LeamlError(f"{path}: {path.suffix or 'no suffix'} is no known format; give a file in one of {known}.")
    yield from _file_records(path, _Paths((base,)))
