"""Tables of numbers that live in a temporary file: sorting and counting millions of rows in constant memory.

Covers: rows of one NumPy record type, appended and read in blocks or by number; sorting them by some of their columns
(sorted runs in a file, merged); adding up rows with equal keys; finding the items that have a text.
Does not cover: records of a run (``leaml_plugin.sequences``).

A few megabytes are in memory, whatever the number of rows, but for eight bytes for each :data:`STRIDE` rows of an
:class:`Index`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from leaml_plugin.sequences import text_key

RUN = 1 << 16  # rows that are sorted at once
_LEAST = 256  # rows of each run that are read at once, at least
STRIDE = 128  # rows of which an index keeps one


class Table:
    """Rows of ``dtype`` (a record type), in the order of :meth:`append`, in a temporary file (in ``TMPDIR``)."""

    def __init__(self, dtype: np.dtype):
        self.dtype, self._count = dtype, 0
        self._file = tempfile.TemporaryFile(prefix="leaml-", buffering=0)

    def __len__(self) -> int:
        return self._count

    def append(self, rows: np.ndarray) -> None:
        """Add ``rows`` (``dtype``, ``[count]``) at the end."""
        data = memoryview(rows.tobytes())
        while data:
            data = data[self._file.write(data) :]
        self._count += len(rows)

    def read(self, start: int, stop: int) -> np.ndarray:
        """The rows from ``start`` to before ``stop`` or the end, a copy."""
        size, count = self.dtype.itemsize, max(0, min(stop, self._count) - start)
        return np.frombuffer(os.pread(self._file.fileno(), count * size, start * size), self.dtype).copy()

    def blocks(self, rows: int = RUN) -> Iterator[np.ndarray]:
        """All rows, so many at a time."""
        for start in range(0, self._count, rows):
            yield self.read(start, start + rows)


def columns(**arrays: np.ndarray) -> np.ndarray:
    """Arrays of one length as the columns of rows."""
    out = np.empty(len(next(iter(arrays.values()))), [(name, array.dtype) for name, array in arrays.items()])
    for name, array in arrays.items():
        out[name] = array
    return out


def in_order(blocks: Iterable[np.ndarray], by: Sequence[str], run: int | None = None) -> Iterator[np.ndarray]:
    """The rows of ``blocks`` sorted by the columns ``by``, ascending, the first column first; in blocks.

    The order is that of ``numpy.lexsort``: rows that are equal in ``by`` stay in their order, and NaN comes last.
    One run of rows (:data:`RUN`) is sorted in memory; more go through a temporary file.
    """
    run = run or RUN
    table: Table | None = None
    waiting: list[np.ndarray] = []
    for block in blocks:
        waiting.append(block)
        while sum(map(len, waiting)) > run:
            rows = np.concatenate(waiting)
            if table is None:
                table = Table(rows.dtype)
            table.append(rows[_order(rows[:run], by)])
            waiting = [rows[run:].copy()]
    if not waiting:
        return
    rows = np.concatenate(waiting)
    if table is None:
        yield rows[_order(rows, by)]
        return
    table.append(rows[_order(rows, by)])
    del rows, waiting
    yield from _merged(table, by, run)


def _order(rows: np.ndarray, by: Sequence[str]) -> np.ndarray:
    return np.lexsort([rows[name] for name in reversed(by)])


def _merged(table: Table, by: Sequence[str], run: int) -> Iterator[np.ndarray]:
    """The rows of a table whose every ``run`` rows are sorted.

    In every round a part of each run is in memory. What comes before the first end of these parts is complete.
    """
    starts = np.arange(0, len(table), run)
    ends = np.minimum(starts + run, len(table))
    size = max(min(_LEAST, run), run // len(starts))
    heads = [table.read(0, 0)] * len(starts)
    while True:
        for n, head in enumerate(heads):
            if len(head) < size and starts[n] < ends[n]:
                more = table.read(int(starts[n]), int(min(starts[n] + size - len(head), ends[n])))
                starts[n] += len(more)
                heads[n] = np.concatenate([head, more])
        left = [n for n, head in enumerate(heads) if len(head)]
        if not left:
            return
        # the first rows, then the last ones; of rows that are equal the earlier run's come first, here and below
        limited = [n for n in left if starts[n] < ends[n]]
        edges = np.concatenate([*(heads[n][:1] for n in left), *(heads[n][-1:] for n in limited)])
        rank = np.empty(len(edges), np.int64)
        rank[_order(edges, by)] = np.arange(len(edges))
        if limited:
            first_end = min(range(len(limited)), key=lambda i: rank[len(left) + i])
            cut = limited[first_end]
            left = [n for i, n in enumerate(left) if rank[i] < rank[len(left) + first_end]]
        parts = [heads[n] for n in left]
        rows = np.concatenate(parts)
        order = _order(rows, by)
        if limited:
            last = sum(len(heads[n]) for n in left if n <= cut) - 1
            order = order[: int(np.flatnonzero(order == last)[0]) + 1]
        owner = np.repeat(np.arange(len(left)), [len(part) for part in parts])
        for n, taken in zip(left, np.bincount(owner[order], minlength=len(left))):
            heads[n] = heads[n][taken:].copy()
        yield rows[order]


def added_up(blocks: Iterable[np.ndarray], keys: Sequence[str]) -> Iterator[np.ndarray]:
    """Rows with equal ``keys``, which stand together, as one row with the sums of the other columns; in blocks."""
    carried: np.ndarray | None = None  # the last row, which may go on in the next block
    for block in blocks:
        if not len(block):
            continue
        rows = block if carried is None else np.concatenate([carried, block])
        new = np.ones(len(rows), bool)
        new[1:] = np.logical_or.reduce([rows[key][1:] != rows[key][:-1] for key in keys])
        starts = np.flatnonzero(new)
        out = rows[starts]
        for name in rows.dtype.names or ():
            if name not in keys:
                out[name] = np.add.reduceat(rows[name], starts)
        carried = out[-1:]
        yield out[:-1]
    if carried is not None:
        yield carried


_KEYED = np.dtype([("key", np.int64), ("item", np.int64)])


class Index:
    """Which of many items has a text: the texts' hashes, sorted, in a file.

    Args:
        texts: of the items, in their order.
        text_of: the text of an item; hashes may be equal where texts are not.
    """

    def __init__(self, texts: Iterable[str], text_of: Callable[[int], str]):
        self._text_of, self._table = text_of, Table(_KEYED)
        fences = []
        for block in in_order(keyed(map(text_key, texts)), ("key", "item")):
            fences.append(block["key"][-len(self._table) % STRIDE :: STRIDE].copy())
            self._table.append(block)
        self._fences = np.concatenate(fences) if fences else np.empty(0, np.int64)

    def find(self, text: str) -> int | None:
        """The first item with this text."""
        key = text_key(text)
        start = max(0, int(self._fences.searchsorted(key)) - 1) * STRIDE
        while len(rows := self._table.read(start, start + STRIDE)):
            for item in rows["item"][rows["key"] == key].tolist():
                if self._text_of(item) == text:
                    return item
            if rows["key"][-1] > key:
                return None
            start += STRIDE
        return None


def keyed(keys: Iterable[int]) -> Iterator[np.ndarray]:
    """Signed 64-bit keys and their numbers from 0, as blocks of rows with the columns ``key`` and ``item``."""
    start, numbers = 0, iter(keys)
    while True:
        some = np.fromiter((key for _, key in zip(range(RUN), numbers)), np.int64)
        if not len(some):
            return
        yield columns(key=some, item=np.arange(start, start + len(some)))
        start += len(some)
