"""What a teacher is asked: texts in files, with a name and a version.

Covers: the default texts (``default_prompts/``), their replacement by a user's directory or single file, the version
that every caption carries, and the beginnings by which a refusal is known.
Does not cover: what the student is asked (``leaml_plugin.data.prompts``).

===============  ================================================================================================
file             what it is
===============  ================================================================================================
``name.txt``     the name under which the set is reported
``system.txt``   system message; empty: none is sent
``caption.txt``  asks for the description; the default one wants what is seen and forbids a diagnosis
``refusal.txt``  one regular expression a line (case does not matter); an answer that begins so is a refusal
===============  ================================================================================================
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from leaml_plugin.errors import LeamlError, unknown_name

_DEFAULTS = Path(__file__).parent / "default_prompts"
_FILES = ("name", "system", "caption", "refusal")


@dataclass(frozen=True)
class TeacherPrompt:
    """The texts; :meth:`load` reads them from files.

    Raises:
        LeamlError: an empty ``caption.txt``, or a line of ``refusal.txt`` that is no regular expression.
    """

    name: str
    system: str
    caption: str
    refusal: str

    def __post_init__(self) -> None:
        if not self.caption.strip():
            raise LeamlError("teacher prompt caption.txt is empty; write what the teacher is asked in it.")
        for number, line in enumerate(self.refusal.splitlines(), start=1):
            try:
                re.compile(line)
            except re.error as error:
                raise LeamlError(f"refusal.txt line {number} is no regular expression ({error}); edit it.") from error

    @classmethod
    def load(cls, path: str | Path | None = None) -> TeacherPrompt:
        """The default texts, with those replaced that ``path`` has: a directory of the files above, or one caption
        prompt in a file."""
        texts = {key: _read(_DEFAULTS / f"{key}.txt") for key in _FILES}
        if path:
            path = Path(path)
            if path.is_dir():
                own = {p.stem: p for p in sorted(path.glob("*.txt"))}
                if not own:
                    known = ", ".join(f"{key}.txt" for key in _FILES)
                    raise LeamlError(f"{path}: no teacher prompt in it; put any of {known} there.")
            else:
                own = {"caption": path}
            for key, file in own.items():
                if key not in _FILES:
                    raise unknown_name(f"teacher prompt file in {path}", key, _FILES)
                texts[key] = _read(file)
            if "name" not in own:
                texts["name"] = path.stem
        return cls(**texts)

    @cached_property
    def version(self) -> str:
        """``<name>-<8 hex digits>``; the digits are a hash of all texts but the name."""
        digest = hashlib.sha256("\0".join((self.system, self.caption, self.refusal)).encode())
        return f"{self.name}-{digest.hexdigest()[:8]}"

    def is_refusal(self, text: str) -> bool:
        """Whether an answer begins like a refusal."""
        text = text.replace("’", "'").lstrip()
        return any(pattern.match(text) for pattern in self._refusals)

    @cached_property
    def _refusals(self) -> list[re.Pattern[str]]:
        return [re.compile(line, re.IGNORECASE) for line in self.refusal.splitlines() if line.strip()]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig").replace("\r\n", "\n").strip("\n")
    except UnicodeDecodeError as error:
        raise LeamlError(f"{path}: byte {error.start} is no UTF-8; save the file as UTF-8.") from error
    except OSError as error:
        raise LeamlError(f"{path}: the teacher's prompt cannot be read ({error.strerror}).") from error
