"""SportR's pictures, for users who have been given access: questions on rule infractions in five sports.

Covers: a local copy (``LEAML_SPORTR_DATA``) that holds the questions' JSON files (open, from the authors' repository)
and the pictures ``<sport>_<number>.<png|jpg|...>`` of ``SportsImage/`` (gated: ``haotianxia/SportR`` on the Hub), both
anywhere below it; the test rows by picture; the image-blind majority; the controls without and with another picture.
Does not cover: its clips, its boxes, and scoring of its rationales.

The layout of the pictures is on the data set's page. That of the JSON files was not at hand, so several are read: a
list of entries, or a mapping from a picture's name to one entry or a list of them. An entry names its picture (one of
``PICTURE_FIELDS``, with or without folder and ending), and asks in ``question`` and ``answer`` (``Q``, ``A``; any
case), or in numbered pairs (``question_1``/``answer_1``, ``Q1``/``A1``); ``options``, where there are any, are a list
or a mapping from letters. What asks nothing or has no picture (the clips' questions) is passed over and counted.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from leaml_plugin import metrics, splits
from leaml_plugin.errors import LeamlError
from leaml_plugin.lmms.cache import build_once
from leaml_plugin.lmms.endoscopy import label_fraction, prompts
from leaml_plugin.lmms.sports import CHOOSE, LETTERS
from leaml_plugin.lmms.video import FRAME_SUFFIXES
from leaml_plugin.records import QA

HUB_ID = "haotianxia/SportR"
DATA_VARIABLE = "LEAML_SPORTR_DATA"
LICENCE = "CC BY-NC 4.0, pictures on request and for non-commercial research only; cite arXiv 2511.06499"
SPLIT = "pictures"
SPORTS = ("american_football", "badminton", "basketball", "soccer", "table_tennis")
PICTURE_FIELDS = ("image", "image_id", "image_name", "image_path", "img", "file_name", "filename", "file", "id")

# ----------------------------------------------------------------------------------------------------- the source


def data_root(location: str | None = None) -> Path:
    """The directory with SportR's files: ``location``, else ``$LEAML_SPORTR_DATA``."""
    location = location or os.environ.get(DATA_VARIABLE)
    hint = (
        f"ask for access to {HUB_ID}, download its SportsImage folder ('hf download {HUB_ID} --repo-type dataset "
        f"--local-dir sportr'), put the question files of the authors' repository beside it, and set {DATA_VARIABLE} "
        "to that directory."
    )
    if not location:
        raise LeamlError(f"{DATA_VARIABLE} is not set, and SportR is given out on request only: {hint}")
    root = Path(location).expanduser().resolve()
    if not root.is_dir():
        raise LeamlError(f"{root}: no such directory ({DATA_VARIABLE}): {hint}")
    return root


def source(root: Path) -> tuple[str, dict[str, Any]]:
    """What ``datasets.load_dataset`` takes: the rows, converted once into the cache, named by their content."""
    rows = read_rows(root)
    digest = hashlib.sha256(json.dumps([str(root), rows]).encode()).hexdigest()[:16]

    def build(directory: Path) -> None:
        from datasets import Dataset, DatasetDict

        DatasetDict({SPLIT: Dataset.from_list(rows)}).save_to_disk(directory)

    return str(build_once(f"sportr-1/{digest}", build)), {"load_from_disk": True}


def read_rows(root: Path) -> list[dict[str, Any]]:
    """Every question about a picture below ``root``, as ``id, sport, picture, question, options, answer``.

    Raises:
        LeamlError: no picture, no question about one, or a JSON file that cannot be read.
    """
    pictures = {
        path.stem.lower(): path
        for path in sorted(root.rglob("*"))
        if path.suffix.lower() in FRAME_SUFFIXES and _sport(path.stem)
    }
    if not pictures:
        raise LeamlError(
            f"{root}: no picture named <sport>_<number> in it, as SportR's SportsImage folder has; "
            f"its sports are {', '.join(SPORTS)}."
        )
    rows, seen, passed_over = [], set(), 0
    for path in sorted(root.rglob("*.json")):
        for name, entry in _entries(path):
            picture = pictures.get(name)
            pairs = list(_questions(entry)) if picture is not None else []
            passed_over += not pairs
            for question, answer, options in pairs:
                row = {
                    "id": name,
                    "sport": _sport(name),
                    "picture": str(picture),
                    "question": question,
                    "options": options,
                    "answer": answer,
                }
                key = (name, question)
                if key not in seen:  # files that repeat each other's questions
                    seen.add(key)
                    rows.append(row)
    if not rows:
        raise LeamlError(
            f"{root}: no question about any of the {len(pictures)} pictures in its JSON files ({passed_over} entries "
            f"without); an entry needs a picture's name ({', '.join(PICTURE_FIELDS[:3])}, …), a question and an answer."
        )
    return rows


def _entries(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """``(picture's name, entry)`` of every entry of a file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise LeamlError(f"{path}: cannot be read as JSON ({error}); fetch it again.") from error
    if isinstance(data, Mapping) and not _named(data):
        groups = [(_stem(name), value if isinstance(value, list) else [value]) for name, value in data.items()]
    else:
        groups = [("", data if isinstance(data, list) else [data])]
    for name, entries in groups:
        for entry in entries:
            if isinstance(entry, Mapping):
                fields = {str(key).strip().lower(): value for key, value in entry.items()}
                yield _named(fields) or name, fields


def _named(entry: Mapping[str, Any]) -> str:
    fields = {str(key).strip().lower(): value for key, value in entry.items()}
    for field in PICTURE_FIELDS:
        if isinstance(fields.get(field), str) and _sport(_stem(fields[field])):
            return _stem(fields[field])
    return ""


def _stem(name: str) -> str:
    return Path(str(name).replace("\\", "/")).stem.lower()


def _sport(stem: str) -> str:
    sport = re.sub(r"_?\d+$", "", stem.lower())
    return sport if sport in SPORTS else ""


_NUMBERED = re.compile(r"(?:question|q)_?(\d*)")


def _questions(entry: Mapping[str, Any]) -> Iterator[tuple[str, str, list[str]]]:
    """Each question of an entry with its answer and options; a letter as answer becomes the option it stands for."""
    for field, question in entry.items():
        number = _NUMBERED.fullmatch(field)
        if number is None or not isinstance(question, str) or not question.strip():
            continue
        n = number.group(1)
        found = [entry[name] for name in (f"answer{n}", f"answer_{n}", f"a{n}", f"a_{n}") if name in entry]
        answer = found[0] if found else None
        if isinstance(answer, list):
            answer = "; ".join(map(str, answer))
        if answer is None or not str(answer).strip():
            continue
        given = entry.get(f"options{n}", entry.get(f"options_{n}")) or []
        options = [str(value).strip() for value in (given.values() if isinstance(given, Mapping) else given)]
        text = str(answer).strip()
        if options and len(text) == 1 and text.upper() in LETTERS[: len(options)]:
            text = options[LETTERS.index(text.upper())]
        yield question.strip(), text, options


# -------------------------------------------------------------------------------------------------- rows and split


def evaluation_rows(dataset: Any, *, other_picture: bool = False) -> Any:
    """The rows of the test pictures with the columns ``blind`` (image-blind answer) and ``shown`` (picture's file)."""
    from datasets import Dataset

    rows = [dict(row) for row in dataset]
    parts = splits.make_split((row["id"] for row in rows), label_fraction=label_fraction())
    blind = metrics.BlindMajority((row["question"], row["answer"]) for row in rows if row["id"] in parts.labelled)
    kept = [row for row in rows if row["id"] in parts.test]
    if not kept:
        raise LeamlError(f"the SportR data have no test picture among {len(parts.pool)}; use more of them.")
    files = {row["id"]: row["picture"] for row in kept}
    ring = sorted(files, key=lambda name: (splits.bucket(name, "shuffle"), name))
    if other_picture and len(ring) < 2:
        raise LeamlError("showing other pictures needs at least two test pictures; use more data.")
    other = {name: ring[(i + 1) % len(ring)] for i, name in enumerate(ring)}
    for row in kept:
        row["blind"] = blind.answer(row["question"])
        row["family"] = metrics.family(row["question"])
        row["shown"] = files[other[row["id"]] if other_picture else row["id"]]
    return Dataset.from_list(kept)


# ---------------------------------------------------------------------------------------------- asking and scoring


def question_text(row: Mapping[str, Any]) -> str:
    lines = [row["question"], *(f"{letter}. {text}" for letter, text in zip(LETTERS, row["options"]))]
    lines += [CHOOSE] if row["options"] else []
    return prompts().vqa(QA("", (), "\n".join(lines), "")).prompt


def answer_text(prediction: str, row: Mapping[str, Any]) -> str:
    """The prediction; where the question had options and it names one, that option's text."""
    options = dict(zip(LETTERS, row["options"]))
    return options.get(metrics.choice_letter(prediction, options) or "", prediction) if options else prediction


def pictures(row: Mapping[str, Any]) -> list:
    from leaml_plugin.data import open_image
    from leaml_plugin.records import ImageRef

    return [open_image(ImageRef(row["shown"]))]
