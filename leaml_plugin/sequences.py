"""Sequences of records that live in files: a million pictures take no more memory than a thousand.

Covers: random access by number to the lines of a JSONL file, writing one as a temporary file, and lazy views (a
function of every item, a choice of the items). What is kept in memory is numbers: eight bytes for each
:data:`STRIDE` records, four for each one of a choice.
Does not cover: where a run keeps its files (``leaml_plugin.artifacts``), or what the records mean.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Generic, TypeVar, overload

from leaml_plugin import records

T = TypeVar("T")
S = TypeVar("S")


class Lazy(Sequence[T]):
    """A sequence whose items are made when asked for; a slice is a list."""

    def _item(self, index: int) -> T:
        raise NotImplementedError

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> list[T]: ...

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self._item(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self._item(index % len(self))


class _File:
    """A file to read from, closed with the last view of it."""

    def __init__(self, fd: int, name: str):
        self.fd, self.name = fd, name

    def __del__(self):
        os.close(self.fd)


STRIDE = 16  # lines that are found by one number: reading a few more costs less than eight bytes a line


class RecordFile(Lazy[T]):
    """The records of a JSONL file by their number. May be read from several threads at once.

    Raises:
        LeamlError: a line that is no record of ``kind``, when it is read.
    """

    def __init__(self, path: str | os.PathLike[str], kind: type[T]):
        places = _Places()
        with open(path, "rb") as file:
            for line in file:
                places.add(len(line))
            self._set(_File(os.dup(file.fileno()), os.fspath(path)), kind, places)

    def _set(self, file: _File, kind: type[T], places: _Places) -> RecordFile[T]:
        self._file, self.kind, self._places = file, kind, places
        return self

    def __len__(self) -> int:
        return self._places.count

    def _item(self, index: int) -> T:
        block, at = divmod(index, STRIDE)
        return self._record(self._lines(block)[at], index)

    def __iter__(self) -> Iterator[T]:
        for number, line in enumerate(self._all_lines()):
            yield self._record(line, number)

    def _record(self, line: bytes, number: int) -> T:
        return records.from_line(self.kind, line, f"{self._file.name} line {number + 1}")

    def _lines(self, block: int) -> list[bytes]:
        """The lines from number ``block * STRIDE`` on, :data:`STRIDE` of them or those that are left."""
        start, end = self._places.starts[block : block + 2]
        lines = os.pread(self._file.fd, end - start, start).split(b"\n")
        return lines if lines[-1] else lines[:-1]

    def _all_lines(self) -> Iterator[bytes]:
        for block in range(-(-len(self) // STRIDE)):
            yield from self._lines(block)

    def without(self, dropped: Sequence[int]) -> RecordFile[T]:
        """The records for which ``dropped`` (one entry a record) is 0, copied to a temporary file."""
        spool = Spool(self.kind)
        for line, gone in zip(self._all_lines(), dropped, strict=True):
            if not gone:
                spool.add_line(line + b"\n")
        return spool.finish()


class _Places:
    """Where lines begin, of every :data:`STRIDE` of them, and where the last one ends."""

    def __init__(self) -> None:
        self.starts, self.count = array("q", [0]), 0

    def add(self, size: int) -> None:
        if self.count % STRIDE == 0:
            self.starts.append(self.starts[-1])
        self.starts[-1] += size
        self.count += 1


class Spool(Generic[T]):
    """Records written to a temporary file (in ``TMPDIR``), to be read back by number.

    ``spool = Spool(Picture); spool.append(picture); pictures = spool.finish()``
    """

    def __init__(self, kind: type[T]):
        self.kind = kind
        self._file = tempfile.TemporaryFile(prefix="leaml-")
        self._places = _Places()

    def __len__(self) -> int:
        return self._places.count

    def append(self, record: T) -> None:
        self.add_line(records.to_line(record).encode())

    def add_line(self, line: bytes) -> None:
        """Add a record as ``records.to_line`` writes it."""
        self._file.write(line)
        self._places.add(len(line))

    def finish(self) -> RecordFile[T]:
        """The records, in the order of :meth:`append`; nothing can be added any more."""
        self._file.flush()
        file = _File(os.dup(self._file.fileno()), "the temporary copy of the input")
        self._file.close()
        return RecordFile.__new__(RecordFile)._set(file, self.kind, self._places)


class Mapped(Lazy[T]):
    """``function`` of every item, computed when asked for."""

    def __init__(self, items: Sequence[S], function: Callable[[S], T]):
        self._items, self._function = items, function

    def __len__(self) -> int:
        return len(self._items)

    def _item(self, index: int) -> T:
        return self._function(self._items[index])


class Chosen(Lazy[T]):
    """The items at ``indices``, in that order."""

    def __init__(self, items: Sequence[T], indices: Iterable[int]):
        self._items, self._indices = items, array("i" if len(items) < 2**31 else "q", indices)

    def __len__(self) -> int:
        return len(self._indices)

    def _item(self, index: int) -> T:
        return self._items[self._indices[index]]


def text_key(text: str) -> int:
    """A signed 64-bit hash of a text: what an index of many texts keeps instead of them."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
