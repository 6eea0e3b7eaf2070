"""The run directory: the only module that knows where a run keeps what.

Covers: opening a run directory for one configuration, stage directories whose completion is recorded with the
hashes of their files, atomic writes, append-only JSONL shards, and training logs that survive a kill.
Does not cover: what the files mean; each stage reads and writes its own through the paths given here.

A run directory::

    runs/endo/
      config.json            the resolved configuration and the fingerprints of the inputs
      stages/<name>/         what one stage wrote; done.json once it is complete, with size and SHA-256 of each file
      stages/<name>/work/    checkpoints of a stage under way; gone once it is complete
      adapter/ or model/     the result: an adapter in PEFT's format, or a whole model after full fine-tuning
      report.html            what happened, for a person

Everything is written under a temporary name in the same folder, synced and renamed, so that a reader sees either
the old file or the new one and a process may be killed at any moment.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from leaml_plugin import records
from leaml_plugin.errors import LeamlError

CONFIG, DONE, WORK, INPUTS = "config.json", "done.json", "work", "inputs"


def canonical_json(data: Any) -> str:
    """JSON with sorted keys: equal data gives equal text. NaN and infinity, which JSON lacks, are a ``ValueError``."""
    return json.dumps(data, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def fingerprint(data: Any) -> str:
    """SHA-256 (hex) of JSON-serialisable data."""
    return hashlib.sha256(canonical_json(data).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path to write a file to; renamed to ``path`` if the block succeeds, removed if it raises."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
        _sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any) -> None:
    """Write canonical JSON atomically."""
    write_text(path, canonical_json(data))


def read_json(path: Path) -> Any:
    """Read JSON; a file that does not parse is a :class:`LeamlError` that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise LeamlError(f"{path} is damaged ({error}): delete it, or restore it, and run again.") from error


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """A temporary directory to fill; replaces ``path`` if the block succeeds, removed if it raises."""
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)
        _sync_directory(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_records(path: Path, items: Iterable[Any]) -> None:
    """Write records as JSONL, one a line, atomically; no more than one of them is in memory."""
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as f:
        f.writelines(map(records.to_line, items))


def read_records(path: Path, kind: type[records.R]) -> Iterator[records.R]:
    """Read JSONL records of one kind, a line at a time."""
    with open(path, encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            yield records.from_line(kind, line, f"{path} line {number}")


class StageDirectory:
    """What one stage wrote.

    ``done`` is true once :meth:`finish` recorded the stage's files; a recorded file that is missing or differs is a
    :class:`LeamlError`, never silently recomputed or trusted.
    """

    def __init__(self, path: Path, key: str):
        self.path, self.key = path, key

    def file(self, name: str) -> Path:
        """The path of one of the stage's files; its folder exists after this call."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    @property
    def work(self) -> Path:
        """A folder for checkpoints, removed by :meth:`finish`."""
        path = self.path / WORK
        path.mkdir(parents=True, exist_ok=True)
        return path

    @property
    def done(self) -> bool:
        record = self.path / DONE
        if not record.exists():
            return False
        done = read_json(record)
        if done["key"] != self.key:
            raise LeamlError(
                f"{self.path} was written by a run of another configuration: delete that folder or name another output."
            )
        for name, expected in done["files"].items():
            path = self.path / name
            if not path.exists() or path.stat().st_size != expected["bytes"] or file_sha256(path) != expected["sha256"]:
                raise LeamlError(
                    f"{path} is not the file that the stage {self.path.name!r} wrote (missing, truncated or edited): "
                    f"delete {self.path} to compute the stage again."
                )
        return True

    def finish(self) -> None:
        """Record every file of the stage, drop its checkpoints, and mark it complete."""
        shutil.rmtree(self.path / WORK, ignore_errors=True)
        files = {}
        for path in sorted(self.path.rglob("*")):
            if path.is_file() and path.name != DONE and not path.name.endswith(".tmp"):
                files[path.relative_to(self.path).as_posix()] = {
                    "bytes": path.stat().st_size,
                    "sha256": file_sha256(path),
                }
        write_json(self.path / DONE, {"key": self.key, "files": files})

    # Append-only shards of records: each is written whole, so the number of files is the progress made.
    def shard(self, index: int) -> Path:
        return self.file(f"part-{index:06d}.jsonl")

    def shards(self) -> list[Path]:
        return sorted(self.path.glob("part-*.jsonl"))


class RunDirectory:
    """One run: one configuration, one set of inputs, one directory."""

    def __init__(self, path: Path, key: str):
        self.path, self.key = path, key
        self._lock: _Lock | None = None

    @classmethod
    def open(
        cls,
        path: str | os.PathLike,
        config: Mapping[str, Any],
        inputs: Mapping[str, Any],
        check: Callable[[], None] = lambda: None,
    ) -> RunDirectory:
        """Create the directory, or take up the run that it holds.

        ``config`` is the resolved configuration, ``inputs`` the fingerprints of everything read. Both must equal
        what an existing run was started with. ``check`` is called before a new run is created and may refuse it.

        Raises:
            LeamlError: the directory holds something else, cannot be written, or another process works on it; nothing
                in it is touched then.
        """
        path = Path(path)
        resolved = json.loads(json.dumps({"config": config, "inputs": inputs}))
        key = fingerprint(resolved)
        record = path / CONFIG
        if record.exists():
            there = read_json(record)
            if there != resolved:
                if _has_begun(path):
                    cls._refuse(path, there, resolved)
                held = _Lock.of(path)  # nobody else works on what is replaced here
                check()
                write_json(record, resolved)
                del held
        elif path.exists() and (not path.is_dir() or any(p.name[0] != "." for p in path.iterdir())):
            raise LeamlError(f"{path} exists and is no run directory of leaml: name another --output, or an empty one.")
        else:
            _check_writable(path)
            check()
            try:
                path.mkdir(parents=True, exist_ok=True)
                write_json(record, resolved)
            except OSError as error:
                raise LeamlError(f"{path} cannot be made ({error.strerror}): name another --output.") from error
        run = cls(path, key)
        run._lock = _Lock.of(path)
        _remove_leftovers(path)
        return run

    @staticmethod
    def _refuse(path: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
        differing = [
            f"{name} is {_short(a)} there and {_short(b)} here"
            for part in ("inputs", "config")
            for name, a, b in _differences(there.get(part, {}), here[part])
        ]
        more = f" (and {len(differing) - 3} more)" if len(differing) > 3 else ""
        raise LeamlError(
            f"{path} holds a run of another configuration: {'; '.join(differing[:3])}{more}. "
            f"Name another --output, or repeat the options of the first run to take it up."
        )

    def stage(self, name: str) -> StageDirectory:
        return StageDirectory(self.path / "stages" / name, self.key)

    def child(self, name: str) -> Path:
        """The directory of a run that this one consists of."""
        return self.path / "runs" / name

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def report(self) -> Path:
        return self.path / "report.html"


def _check_writable(path: Path) -> None:
    """Refuse a directory that could not be made, before anything expensive."""
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = "may not be written to" if there.is_dir() else "is a file"
        raise LeamlError(f"{path} cannot be made, since {there} {why}: name another --output.")


class _Lock:
    """Keeps other processes out of a run as long as this object lives; a killed process leaves none behind.

    Two processes at once would write into each other's logs and checkpoints.
    """

    _held: ClassVar[weakref.WeakValueDictionary[Path, _Lock]] = weakref.WeakValueDictionary()

    def __init__(self, path: Path):
        self._fd = os.open(path / CONFIG, os.O_RDONLY)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LeamlError(
                f"{path}: another process works on this run: wait for it, or name another --output."
            ) from error
        except OSError:
            pass  # a file system without locks

    def __del__(self):
        os.close(self._fd)

    @classmethod
    def of(cls, path: Path) -> _Lock:
        """The lock of a run directory; within a process it is shared."""
        lock = cls._held.get(path.resolve())
        if lock is None:
            lock = cls._held[path.resolve()] = cls(path)
        return lock


def _remove_leftovers(path: Path) -> None:
    """Delete the temporary files of a killed process."""
    for leftover in [*path.glob(".*.tmp"), *path.glob("stages/**/.*.tmp")]:
        if re.fullmatch(r"\..+\.\d+\.tmp", leftover.name) and leftover.is_file():
            leftover.unlink()


def _has_begun(path: Path) -> bool:
    """Whether a run directory holds more than its configuration and the copy of its inputs.

    Where a wrong setting was only found after the directory was made, the corrected command may take the directory.
    """
    stages = path / "stages"
    begun = (p for p in stages.rglob("*") if p.is_file() and p.relative_to(stages).parts[0] != INPUTS)
    return next(begun, None) is not None or any(path.glob("runs/*"))


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _differences(a: Any, b: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted names at which two JSON values differ, with both values."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for name in sorted({*a, *b}):
            yield from _differences(a.get(name), b.get(name), f"{prefix}.{name}" if prefix else name)
    elif a != b:
        yield prefix, a, b


class StepLog:
    """A JSONL training log, one line a step, that a resumed run continues exactly where its checkpoint stands."""

    def __init__(self, path: Path, first_step: int):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        # A kill can leave lines of steps after the checkpoint, the last one possibly cut short.
        write_text(path, "".join(lines[:first_step]))
        self._file = open(path, "a", encoding="utf-8")

    def append(self, entry: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(entry, sort_keys=True) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()
