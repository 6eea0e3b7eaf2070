"""Teachers: what writes the captions of the unlabelled pictures.

Covers: the prompt, as files with a version (``prompt``); any OpenAI-compatible server (``client``, ``pictures``); a
local transformers model (``local``); what becomes of an answer: a caption, or the reason why there is none.
Does not cover: shards, resumption and totals (``leaml_plugin.stages.caption``); captions that a file brings along
(``leaml_plugin.data.load_unlabeled``).

A teacher is a function from pictures to ``(picture, Answer | Failure)`` in any order, each as soon as it is there.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from leaml_plugin.teachers.prompt import TeacherPrompt


@dataclass(frozen=True)
class Answer:
    """What a model wrote in answer to one request.

    ``finish`` is the server's ``finish_reason`` ("stop", "length", "content_filter", ...); ``refusal`` what it said
    instead of answering. Token counts are ``None`` where they were not told. ``logprobs`` holds the log-probability
    (nats) of each written token where that was asked for. ``model`` is the name that the server gave itself.
    """

    text: str
    finish: str = "stop"
    refusal: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    logprobs: tuple[float, ...] | None = None
    model: str = ""


@dataclass(frozen=True)
class Failure:
    """Why one request has no answer: "unreadable" (the picture), "rejected" (4xx) or "failed" (all tries)."""

    kind: str
    detail: str


@dataclass(frozen=True)
class Caption:
    """The record of one picture: the caption with its provenance, or why there is none.

    Attributes:
        id: of the picture.
        caption: the text; ``None`` where it may not be used.
        reason: empty, or why there is no caption: "refused", "empty", "unreadable", "rejected" or "failed", with
            details after a colon.
        text: what the teacher wrote where that is not the caption.
        meta: teacher, model, prompt (name and version), parameters, finish_reason, prompt_tokens, completion_tokens.
    """

    id: str
    caption: str | None
    reason: str = ""
    text: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)


def seed_of(seed: int, *names: object) -> int:
    """A seed of its own for each thing that is drawn, between 0 and 2**31 - 1."""
    digest = hashlib.blake2b("\0".join(map(str, (seed, *names))).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") & 0x7FFFFFFF


def judge(answer: Answer | Failure, prompt: TeacherPrompt) -> tuple[str | None, str, str]:
    """``(caption, reason, text)`` of an answer, as in :class:`Caption`.

    Reasoning before the answer (``<think>…</think>``) is no part of a caption.
    """
    if isinstance(answer, Failure):
        return None, f"{answer.kind}: {answer.detail}", ""
    written = answer.text.strip()
    text = written
    if re.match(r"<think>", text):
        _, closed, rest = text.partition("</think>")
        text = rest.strip() if closed else ""
    if answer.refusal or answer.finish == "content_filter":
        return None, "refused: by the server", answer.refusal or written
    if not text:
        cut = "cut off while thinking; allow more tokens" if answer.finish == "length" and written else ""
        return None, f"empty: {cut}" if cut else "empty", written
    if prompt.is_refusal(text):
        return None, "refused", written
    return text, "", "" if text == written else written
