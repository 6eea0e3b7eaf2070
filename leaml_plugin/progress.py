"""Progress lines for anything that may last longer than two seconds: count, rate, time left.

On a terminal the line is rewritten in place; in a log file a line appears every ``every`` seconds, so that a
background run can be followed with ``tail``. Output goes to standard error; results go to standard output.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TextIO, TypeVar

T = TypeVar("T")


def duration(seconds: float) -> str:
    """Seconds as ``1:02:03`` or ``2:03``."""
    minutes, secs = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"


class Progress:
    """Counts finished units of work and prints ``label 120/600 (4.2 step/s, 1:54 left) note``.

    Nothing is printed during the first two seconds. ``start`` is what an earlier run already did: it counts
    towards the total but not towards the rate.
    """

    def __init__(
        self,
        label: str,
        total: int | None,
        *,
        unit: str = "it",
        start: int = 0,
        every: float = 5.0,
        stream: TextIO | None = None,
    ):
        self.label, self.total, self.unit = label, total, unit
        self.done = self._start = start
        self._stream = stream if stream is not None else sys.stderr
        self._tty = self._stream.isatty()
        self._every = 0.2 if self._tty else every
        self._began = time.monotonic()
        self._printed = self._began + 2.0 - self._every
        self._shown = False

    def update(self, n: int = 1, note: str = "") -> None:
        self.done += n
        now = time.monotonic()
        if now - self._printed < self._every:
            return
        self._printed = now
        self._write(self._line(now, note), end="\r" if self._tty else "\n")
        self._shown = True

    def close(self) -> None:
        """Print the last line if any was printed before, so that short work stays silent."""
        if self._shown:
            self._write(self._line(time.monotonic(), f"in {duration(time.monotonic() - self._began)}"), end="\n")

    def _line(self, now: float, note: str) -> str:
        rate = (self.done - self._start) / max(now - self._began, 1e-9)
        count = f"{self.done}/{self.total}" if self.total is not None else str(self.done)
        left = ""
        if self.total is not None and rate > 0 and self.done < self.total:
            left = f", {duration((self.total - self.done) / rate)} left"
        return f"{self.label} {count} ({rate:.1f} {self.unit}/s{left}) {note}".rstrip()

    def _write(self, line: str, end: str) -> None:
        self._stream.write(("\x1b[2K" if self._tty else "") + line + end)
        self._stream.flush()


def track(items: Iterable[T], label: str, total: int | None = None, **kw) -> Iterator[T]:
    """Iterate with a progress line; the length is taken from ``items`` where it has one."""
    if total is None:
        total = len(items) if hasattr(items, "__len__") else None  # type: ignore[arg-type]
    bar = Progress(label, total, **kw)
    for item in items:
        yield item
        bar.update()
    bar.close()
