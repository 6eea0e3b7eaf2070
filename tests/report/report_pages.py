"""Reading a page back: elements, addresses, texts, and the data in its scripts."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

VOID = {"meta", "link", "img", "br", "input", "hr"}


class Page(HTMLParser):
    """``elements``: (tag, attributes, own text); checks while reading that every element is closed in order."""

    def __init__(self, path: Path):
        super().__init__(convert_charrefs=True)
        self.source = path.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self._open: list[int] = []
        self._seen: list[str] = []
        self.feed(self.source)
        self.close()
        assert not self._open, [self.elements[i][0] for i in self._open]

    def handle_starttag(self, tag, attrs):
        assert len(attrs) == len(dict(attrs)), f"<{tag}> has an attribute twice"
        self.elements.append((tag, dict(attrs), []))
        if tag not in VOID and not (self._inside("svg") and self.get_starttag_text().endswith("/>")):
            self._open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), []))

    def handle_endtag(self, tag):
        assert self._open and self.elements[self._open[-1]][0] == tag, f"</{tag}> closes what is not open"
        self._open.pop()

    def handle_data(self, data):
        if self._open:
            tag, _, text = self.elements[self._open[-1]]
            text.append(data)
            if tag not in ("script", "style", "title"):
                self._seen.append(data)

    def _inside(self, tag: str) -> bool:
        return any(self.elements[i][0] == tag for i in self._open)

    def all(self, tag: str, **attributes: str) -> list[tuple[dict[str, str | None], str]]:
        """(attributes, own text) of the elements that have these attributes; ``cls`` is one of their classes."""
        cls = attributes.pop("cls", None)
        return [
            (a, "".join(text))
            for t, a, text in self.elements
            if t == tag
            and all(a.get(k) == v for k, v in attributes.items())
            and (cls is None or cls in (a.get("class") or "").split())
        ]

    def text(self) -> str:
        """Everything a reader sees, in order; narrow spaces inside numbers stay."""
        return re.sub(r"[ \n]+", " ", "".join(self._seen))

    def index(self, name: str) -> dict[str, Any]:
        return next(d for _, t in self.all("script", type="application/json") if (d := json.loads(t))["name"] == name)


def chunk(path: Path) -> list[Any]:
    """The data of a chunk, which must be a single call."""
    source = path.read_text(encoding="ascii")
    assert source.startswith("leamlChunk(") and source.endswith(");\n")
    name, data = json.loads("[" + source[len("leamlChunk(") : -len(");\n")] + "]")
    assert path.name.startswith(name + ".")
    return data


def snapshot(path: Path) -> dict[str, bytes]:
    """A page and its folder."""
    folder = path.with_name(path.stem + "_files")
    files = [path, *(p for p in folder.rglob("*") if p.is_file())]
    return {p.relative_to(path.parent).as_posix(): p.read_bytes() for p in files}
