"""Pictures by the ten thousand in one page: an index in the page, texts and thumbnails in chunks beside it.

Covers: thumbnails through :func:`leaml_plugin.data.open_image`, chunks as scripts (a page opened from disk may not
fetch JSON, but may load a script), the index that the page filters by.
Does not cover: drawing; ``page.js`` fills the same card that the template shows for the first page.

The name of a chunk carries the hash of its content. A report that is killed leaves the old page with its old chunks;
the next one removes what no page names.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from leaml_plugin.artifacts import write_text
from leaml_plugin.data import open_image
from leaml_plugin.errors import LeamlError
from leaml_plugin.progress import Progress
from leaml_plugin.records import ImageRef
from leaml_plugin.report.facts import Shown
from leaml_plugin.report.words import FAMILY_NAMES, without_machine

PER_PAGE, TEXTS, THUMBS = 24, 200, 40
SIDE = 200  # of a thumbnail, in pixels
MOST_FRAMES = 4
LONGEST = 4000  # characters of one text; a page is no place for a runaway generation
_FOLDERS = re.compile(r"(?<![\w.])/(?:[^\s/:;,]+/)+")
_CHUNK = re.compile(r"\.?[a-z]+-(?:text|pictures)-\d{4,}\.[0-9a-f]{12}\.js(?:\.\d+\.tmp)?")


@dataclass(frozen=True)
class Thumbnail:
    """A picture as a ``data:`` address, or why there is none (``src`` empty)."""

    src: str
    width: int = 0
    height: int = 0
    problem: str = ""


@lru_cache(maxsize=2048)
def thumbnail(images: tuple[ImageRef, ...]) -> Thumbnail:
    """The picture, or the first, last and evenly chosen frames of a video side by side, as a small JPEG."""
    if not images:
        return Thumbnail("", problem="no picture is recorded for it")
    step = max(1, (len(images) - 1) / (MOST_FRAMES - 1))
    frames = [images[min(round(i * step), len(images) - 1)] for i in range(min(MOST_FRAMES, len(images)))]
    side = SIDE if len(frames) == 1 else SIDE // 2
    parts = []
    for ref in frames:
        try:
            part = open_image(ref)
        except LeamlError as error:
            return Thumbnail("", problem=_problem(str(error), ref))
        part.thumbnail((side, side), reducing_gap=2.0)
        parts.append(part)
    gap = 2 if len(parts) > 1 else 0
    whole = parts[0]
    if gap:
        whole = Image.new("RGB", (sum(p.width + gap for p in parts) - gap, max(p.height for p in parts)), "white")
        x = 0
        for part in parts:
            whole.paste(part, (x, 0))
            x += part.width + gap
    data = io.BytesIO()
    whole.save(data, "JPEG", quality=80)
    return Thumbnail("data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode(), *whole.size)


def _problem(message: str, ref: ImageRef) -> str:
    """The sentence without the folders of the machine on which it was said."""
    name = "the data set" if ref.uri.startswith("hf:") else Path(ref.uri).name
    return _FOLDERS.sub("", message.replace(ref.uri, name))


def _finite(value: float | None) -> float | None:
    return round(value, 3) if value is not None and math.isfinite(value) else None


def cut(text: str) -> str:
    return text if len(text) <= LONGEST else text[:LONGEST] + " …"


@dataclass(frozen=True)
class Gallery:
    """What the template needs: the first page in full, and the index for the script."""

    name: str
    statuses: Sequence[tuple[str, str, int]]  # key, words, pictures
    families: Sequence[tuple[str, str, int]]
    first: Sequence[Mapping[str, Any]]
    index: Mapping[str, Any]
    shown: int
    total: int
    pages: int
    per_page: int = PER_PAGE


def build(
    name: str, entries: Sequence[Shown], total: int, statuses: Mapping[str, str], folder: Path, written: set[str]
) -> Gallery | None:
    """Write the chunks of a gallery and return its index; None where there is nothing to show.

    Args:
        name: distinguishes the galleries of one page; part of the files' names.
        statuses: key -> words, for every status that a row may have, in the order in which a reader chooses.
        folder: for the chunks; created when needed.
        written: the names of the chunks are added to it.
    """
    if not entries:
        return None
    thumbnail.cache_clear()  # a file may have changed since the last report
    keys, families = list(statuses), list(FAMILY_NAMES)
    texts, masks, cards = [], [], []
    for entry in entries:
        rows = [
            [
                keys.index(row.status),
                families.index(row.family),
                cut(row.question),
                cut(row.answer),
                [[name, cut(text)] for name, text in row.notes],
                _finite(row.logprob),
            ]
            for row in entry.rows
        ]
        source = _FOLDERS.sub("", cut(entry.source))
        texts.append([without_machine(entry.id), cut(entry.caption), len(entry.images), rows, source])
        masks.append(sorted({row[0] * len(families) + row[1] for row in rows}))
    text_files = [
        _chunk(f"{name}-text-{i // TEXTS:04d}", texts[i : i + TEXTS], folder, written)
        for i in range(0, len(texts), TEXTS)
    ]
    thumb_files = []
    bar = Progress(f"report: {name}", len(entries), unit="picture")
    for i in range(0, len(entries), THUMBS):
        block = []
        for n, entry in enumerate(entries[i : i + THUMBS], i):
            thumb = thumbnail(entry.images)
            if n < PER_PAGE:
                cards.append(_card(texts[n], thumb, keys, families, statuses))
            block.append([thumb.src, thumb.width, thumb.height] if thumb.src else thumb.problem)
            bar.update()
        thumb_files.append(_chunk(f"{name}-pictures-{i // THUMBS:04d}", block, folder, written))
    bar.close()
    by_status = [sum(any(m // len(families) == k for m in mask) for mask in masks) for k in range(len(keys))]
    by_family = [sum(any(m % len(families) == k for m in mask) for mask in masks) for k in range(len(families))]
    return Gallery(
        name=name,
        statuses=[(str(k), statuses[key], by_status[k]) for k, key in enumerate(keys) if by_status[k]],
        families=[(str(k), FAMILY_NAMES[f], by_family[k]) for k, f in enumerate(families) if by_family[k]],
        first=cards,
        index={
            "name": name,
            "statuses": [[key, statuses[key]] for key in keys],
            "families": [FAMILY_NAMES[f] for f in families],
            "masks": masks,
            "perPage": PER_PAGE,
            "textSize": TEXTS,
            "thumbSize": THUMBS,
            "texts": text_files,
            "thumbs": thumb_files,
        },
        shown=len(entries),
        total=total,
        pages=-(-len(entries) // PER_PAGE),
    )


def _card(
    text: Sequence[Any], thumb: Thumbnail, keys: Sequence[str], families: Sequence[str], statuses: Mapping[str, str]
) -> dict[str, Any]:
    id_, caption, frames, rows, source = text
    return {
        "id": id_,
        "caption": caption,
        "source": source,
        "frames": frames,
        "thumb": thumb,
        "rows": [
            {
                "key": keys[s],
                "status": statuses[keys[s]],
                "question": q,
                "answer": a,
                "notes": notes,
                "logprob": logprob,
            }
            for s, _, q, a, notes, logprob in rows
        ],
    }


def script_json(data: Any) -> str:
    """JSON that may stand inside a script element and in a script file: no ``<``, no line separators, only ASCII."""
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _chunk(name: str, data: Any, folder: Path, written: set[str]) -> str:
    text = f'leamlChunk("{name}",{script_json(data)});\n'
    file = f"{name}.{hashlib.sha256(text.encode()).hexdigest()[:12]}.js"
    path = folder / file
    if not (path.is_file() and path.read_bytes() == text.encode()):
        write_text(path, text)
    written.add(file)
    return file


def sweep(folder: Path, written: Iterable[str]) -> None:
    """Remove chunks that the page just written does not name, and what a kill left of one; nothing else."""
    keep = set(written)
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if path.is_file() and path.name not in keep and _CHUNK.fullmatch(path.name):
            path.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()
