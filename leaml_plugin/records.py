"""The records that cross stage boundaries: frozen, JSON-serialisable, free of torch and PIL.

Covers: what a picture reference, a labelled question, an unlabelled picture with its teacher caption,
a pseudo question and a prediction are, and their JSON form.
Does not cover: reading files (``leaml_plugin.data``) or where stages keep them (``leaml_plugin.artifacts``).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from leaml_plugin.errors import LeamlError

R = TypeVar("R")

UNREADABLE = "unreadable"
"""The reason of a pseudo-QA pair, and the name of its check, whose picture could not be opened."""


@dataclass(frozen=True)
class ImageRef:
    """Where one picture is; opened only by :func:`leaml_plugin.data.open_image`.

    ``uri`` is an absolute file path, or ``hf:<dataset dir or id>?split=<s>&row=<i>&column=<c>[&index=<j>]``
    for a picture embedded in a Hugging Face dataset.
    """

    uri: str


@dataclass(frozen=True)
class Picture:
    """An unlabelled picture (one image, or the frames of a video in order) and what the teacher said of it."""

    id: str
    images: tuple[ImageRef, ...]
    caption: str | None = None


@dataclass(frozen=True)
class QA:
    """One question about one picture with its answer: a label, or a pseudo-label.

    ``id`` is stable across runs; ``source`` is what an error message names (``train.jsonl line 12``);
    ``meta`` carries what the file said beside the triple (template, options, truth) and never reaches the model.
    """

    id: str
    images: tuple[ImageRef, ...]
    question: str
    answer: str
    source: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PseudoQA:
    """A question and answer that the QA generator wrote for an unlabelled picture.

    ``sample`` counts the draws of one picture from 0; ``logprob`` is the mean log-probability (nats per token)
    of the written text under the generator; ``text`` is what it wrote, verbatim. ``checks`` holds second answers to
    the question (stage ``verify``). ``reason`` is empty where the filter kept the pair and otherwise names the filter
    that dropped it; :data:`UNREADABLE` is set by the stage that could not open the picture, which tells why in
    ``checks``.
    """

    picture_id: str
    images: tuple[ImageRef, ...]
    sample: int
    text: str
    question: str = ""
    answer: str = ""
    logprob: float = 0.0
    checks: Mapping[str, str] = field(default_factory=dict)
    reason: str = ""

    @property
    def id(self) -> str:
        return f"{self.picture_id}#{self.sample}"

    def as_qa(self) -> QA:
        """The pair as a training record of the second stage."""
        return QA(self.id, self.images, self.question, self.answer, source=f"pseudo-QA {self.id}")


@dataclass(frozen=True)
class Skipped:
    """An unlabelled picture that a run leaves out, and why (one sentence)."""

    picture_id: str
    images: tuple[ImageRef, ...]
    reason: str


@dataclass(frozen=True)
class Prediction:
    """What a model answered to one question, and whether that was right under normalised exact match."""

    id: str
    question: str
    answer: str
    prediction: str
    correct: bool
    meta: Mapping[str, Any] = field(default_factory=dict)


def to_json(record: Any) -> dict[str, Any]:
    """A record as a plain dictionary; picture references become their uri strings."""
    out = {}
    for f in dataclasses.fields(record):
        value = getattr(record, f.name)
        if f.name == "images":
            value = [ref.uri for ref in value]
        elif isinstance(value, Mapping):
            value = dict(value)
        out[f.name] = value
    return out


def from_json(kind: type[R], data: Mapping[str, Any]) -> R:
    """The inverse of :func:`to_json`. An unknown key is an error (``TypeError``), as it is for the constructor."""
    data = dict(data)
    if "images" in data:
        data["images"] = tuple(ImageRef(uri) for uri in data["images"])
    return kind(**data)


def to_line(record: Any) -> str:
    """A record as one line of JSONL, line end included; equal records give equal lines."""
    return json.dumps(to_json(record), ensure_ascii=False, sort_keys=True) + "\n"


def from_line(kind: type[R], line: str | bytes, where: str) -> R:
    """The inverse of :func:`to_line`; ``where`` names the line in the :class:`LeamlError` of a damaged one."""
    try:
        return from_json(kind, json.loads(line))
    except (ValueError, TypeError) as error:
        raise LeamlError(f"{where} is damaged ({error}): delete the file and run again.") from error
