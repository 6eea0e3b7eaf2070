"""What the model is asked, and what it should say: records become turns of a conversation.

Covers: :class:`Turn`, the one thing that collation and generation read; :class:`Prompts`, the versioned texts with
which questions, question generation and captions are asked for; reading a generated question and answer back.
Does not cover: chat templates and tokens (``leaml_plugin.data.collate``).

The texts are files. The defaults lie in ``default_prompts/``; a directory given by the user replaces any of them:

==============  =======================================================  ======================
file            what it is                                               placeholders
==============  =======================================================  ======================
``name.txt``    the name under which the set is reported                 none
``system.txt``  system message; empty: none is sent                      none
``vqa.txt``     asks a question about the picture                        ``{question}``
``generate.txt``  asks for a question about the picture and its answer   none
``pair.txt``    the form in which the two are written                    ``{question} {answer}``
``caption.txt``  asks for a description of the picture                   none
``context.txt``  stands before a question that is asked about the        ``{caption}``
                teacher's caption, the picture unseen
==============  =======================================================  ======================
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from leaml_plugin.errors import LeamlError, unknown_name
from leaml_plugin.records import QA, ImageRef, Picture

_DEFAULTS = Path(__file__).parent / "default_prompts"
_PLACEHOLDERS = {
    "name": (),
    "system": (),
    "vqa": ("question",),
    "generate": (),
    "pair": ("question", "answer"),
    "caption": (),
    "context": ("caption",),
}


@dataclass(frozen=True)
class Turn:
    """One exchange: pictures and a prompt go in, ``target`` should come out.

    ``images`` may be empty (text only) or hold several pictures (a video is its frames in order). ``target`` is
    ``None`` where the model is to answer freely. ``source`` is what an error message names. ``prefixes`` are beginnings
    that generated answers must have: sample ``i`` goes on from ``prefixes[i]`` (from the first again where there are
    fewer); empty leaves the model free.
    """

    id: str
    images: tuple[ImageRef, ...]
    prompt: str
    target: str | None = None
    source: str = ""
    prefixes: tuple[str, ...] = ()

    def prefix(self, sample: int) -> str:
        """What the answer of this sample must begin with."""
        return self.prefixes[sample % len(self.prefixes)] if self.prefixes else ""

    @property
    def where(self) -> str:
        """How an error message names this turn."""
        return self.source or f"sample {self.id!r}"


@dataclass(frozen=True)
class Prompts:
    """The texts around questions, answers and captions. :meth:`load` reads them from files.

    Fields are the texts themselves; see the table in the module docstring. ``version`` changes whenever any text does.
    """

    name: str
    system: str
    vqa_text: str
    generate_text: str
    pair_text: str
    caption_text: str
    context_text: str

    def __post_init__(self) -> None:
        for key in _PLACEHOLDERS:
            text, want = self._text(key), set(_PLACEHOLDERS[key])
            got = set(re.findall(r"\{(\w+)\}", text))
            if got != want:
                wanted = " and ".join(f"{{{p}}}" for p in sorted(want, reverse=True)) or "no placeholder"
                found = " and ".join(f"{{{p}}}" for p in sorted(got)) or "none"
                raise LeamlError(f"prompt file {key}.txt must contain {wanted}, but has {found}; edit it.")
            if not text.strip() and key not in ("system", "name"):
                raise LeamlError(f"prompt file {key}.txt is empty; write the prompt in it or remove the file.")
        if self.pair_text.index("{question}") > self.pair_text.index("{answer}"):
            raise LeamlError("prompt file pair.txt must have {question} before {answer}; edit it.")

    def _text(self, key: str) -> str:
        return getattr(self, key if key in ("name", "system") else f"{key}_text")

    @classmethod
    def load(cls, directory: str | Path | None = None) -> Prompts:
        """The default texts, with those replaced that ``directory`` has as ``<name>.txt`` (UTF-8)."""
        texts = {key: _read(_DEFAULTS / f"{key}.txt") for key in _PLACEHOLDERS}
        if directory is not None:
            directory = Path(directory)
            if not directory.is_dir():
                raise LeamlError(f"{directory}: no such prompt directory; give one that holds vqa.txt, generate.txt, …")
            own = {p.stem: p for p in sorted(directory.glob("*.txt"))}
            if not own:
                known = ", ".join(f"{k}.txt" for k in _PLACEHOLDERS)
                raise LeamlError(f"{directory}: no prompt file in it; put any of {known} there.")
            for key, path in own.items():
                if key not in _PLACEHOLDERS:
                    raise unknown_name(f"prompt file in {directory}", key, _PLACEHOLDERS)
                texts[key] = _read(path)
            if "name" not in own:
                texts["name"] = directory.name
        return cls(**{key if key in ("name", "system") else f"{key}_text": text for key, text in texts.items()})

    @cached_property
    def version(self) -> str:
        """``<name>-<8 hex digits>``; the digits are a hash of all texts."""
        digest = hashlib.sha256("\0".join(self._text(key) for key in _PLACEHOLDERS if key != "name").encode())
        return f"{self.name}-{digest.hexdigest()[:8]}"

    def to_json(self) -> dict[str, str]:
        """All texts and the version, for a run's records."""
        return {**dataclasses.asdict(self), "version": self.version}

    @classmethod
    def from_json(cls, data: Mapping[str, str]) -> Prompts:
        """The inverse of :meth:`to_json`."""
        return cls(**{k: v for k, v in data.items() if k != "version"})

    def vqa(self, qa: QA) -> Turn:
        """The question of ``qa``; its answer is the target (``None`` where the answer is empty)."""
        return Turn(qa.id, qa.images, _fill(self.vqa_text, question=qa.question), qa.answer or None, qa.source)

    def generate(self, picture: Picture) -> Turn:
        """Asks for a question about ``picture`` and its answer; no target."""
        return Turn(picture.id, picture.images, self.generate_text, None, f"picture {picture.id}")

    def generate_target(self, qa: QA) -> Turn:
        """What :meth:`generate` asks, with the question and answer of ``qa`` as the target."""
        target = _fill(self.pair_text, question=_line(qa.question), answer=_line(qa.answer))
        return Turn(qa.id, qa.images, self.generate_text, target, qa.source)

    def caption(self, picture: Picture) -> Turn:
        """Asks for a description; the teacher's caption is the target (``None`` where there is none)."""
        return Turn(picture.id, picture.images, self.caption_text, picture.caption or None, f"picture {picture.id}")

    def vqa_of_caption(self, qa: QA, caption: str) -> Turn:
        """The question of ``qa`` without its pictures, behind a text that tells what the teacher saw; no target."""
        context = _fill(self.context_text, caption=_line(caption))
        return Turn(qa.id, (), f"{context}\n{_fill(self.vqa_text, question=qa.question)}", None, qa.source)

    def begin_generated(self, question: str) -> str:
        """How a generated pair begins whose question begins with ``question``: a ``Turn.prefixes`` entry."""
        start = re.split(r"\{question\}", self.pair_text)[0]
        return start + _line(question) if question.strip() else ""

    def parse_generated(self, text: str) -> tuple[str, str] | None:
        """Question and answer from what a generator wrote, or ``None`` where the form is not there.

        Upper and lower case, the amount of white space, and text before the question do not matter. The first pair
        counts; the answer ends at a blank line or where another question begins.
        """
        match = self._pair_pattern.search(text)
        if match is None:
            return None
        question, answer = _line(match["question"]), _line(match["answer"])
        return (question, answer) if question and answer else None

    @cached_property
    def _pair_pattern(self) -> re.Pattern[str]:
        start, middle, end = re.split(r"\{question\}|\{answer\}", self.pair_text)
        stops = [r"\n[ \t]*\n", r"\Z"]
        if start.strip():
            stops.append(r"\n\s*" + _loose(start))
        if end.strip():
            stops.append(_loose(end))
        return re.compile(
            _loose(start) + r"(?P<question>.+?)" + _loose(middle) + r"(?P<answer>.+?)(?=" + "|".join(stops) + ")",
            re.IGNORECASE | re.DOTALL,
        )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig").replace("\r\n", "\n").strip("\n")
    except UnicodeDecodeError as error:
        raise LeamlError(f"{path}: byte {error.start} is no UTF-8; save the file as UTF-8.") from error
    except OSError as error:
        raise LeamlError(f"{path}: cannot be read ({error.strerror}).") from error


def _fill(template: str, **values: str) -> str:
    # one pass, so that a value which itself contains "{answer}" stays as it is
    return re.sub(r"\{(\w+)\}", lambda m: values[m[1]], template)


def _line(text: str) -> str:
    """``text`` on one line: the pair form is line-based, so a line break inside a question would end it."""
    return " ".join(text.split())


def _loose(literal: str) -> str:
    """A pattern for ``literal`` in which any white space matches any other."""
    return r"\s*" + r"\s*".join(re.escape(word) for word in literal.split()) + r"\s*"
