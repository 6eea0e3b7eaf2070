"""The run directory: the only module that knows where a run keeps what.

Covers: opening a run directory for one configuration, stage directories whose completion is recorded with the
hashes of their files, atomic writes, append-only JSONL shards that the ranks of a run share out among themselves, and
training logs that survive a kill.
Does not cover: what the files mean; each stage reads and writes its own through the paths given here.

A run directory::

    runs/endo/
      config.json            the resolved configuration and the fingerprints of the inputs
      stages/<name>/         what one stage wrote; done.json once it is complete, with size and SHA-256 of each file
      stages/<name>/work/    checkpoints of a stage under way; gone once it is complete
      adapter/ or model/     the result: an adapter in PEFT's format, or a whole model after full fine-tuning
      skipped.jsonl          unlabelled pictures that were left out, and why; not there if there are none
      report.html            what happened, for a person

Everything is written under a temporary name in the same folder, synced and renamed, so that a reader sees either
the old file or the new one and a process may be killed at any moment.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import sys
import time
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from leaml_plugin import records
from leaml_plugin.errors import LeamlError
from leaml_plugin.ranks import PATIENCE, Rank

CONFIG, DONE, WORK, INPUTS = "config.json", "done.json", "work", "inputs"
CLAIMS = ".claims.tmp"
POLL = 0.5  # seconds between two looks at what other ranks have done

# what two machines that write to one file system cannot share: process numbers of one of them
_PROCESS = f"{zlib.crc32(socket.gethostname().encode())}{{}}"


def canonical_json(data: Any) -> str:
    """JSON with sorted keys: equal data gives equal text. NaN and infinity, which JSON lacks, are a ``ValueError``."""
    return json.dumps(data, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def fingerprint(data: Any) -> str:
    """SHA-256 (hex) of JSON-serialisable data."""
    return hashlib.sha256(canonical_json(data).encode()).hexdigest()


def fingerprint_rows(rows: Iterable[Any]) -> str:
    """SHA-256 (hex) of JSON-serialisable rows, one after the other in memory."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False, allow_nan=False).encode() + b"\n")
    return digest.hexdigest()


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
    temporary = path.with_name(f".{path.name}.{_PROCESS.format(os.getpid())}.tmp")
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

    def __init__(self, path: Path, key: str, run: RunDirectory | None = None):
        self.path, self.key, self._run = path, key, run

    @property
    def rank(self) -> Rank:
        """Which of the run's processes this is; alone where the stage belongs to no run."""
        return self._run.rank if self._run is not None else Rank()

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
        _remove_claims(self.path)

    # Append-only shards of records: each is written whole, so the number of files is the progress made.
    def shard(self, index: int) -> Path:
        return self.file(f"part-{index:06d}.jsonl")

    def shards(self) -> list[Path]:
        return sorted(self.path.glob("part-*.jsonl"))

    def finish_shards(self) -> None:
        """:meth:`finish` where this is rank 0; the others return once rank 0 has done so."""
        if self.rank.leads:
            self.finish()
        elif self._run is not None:
            self._run.wait_for(self)

    def open_shards(self, count: int) -> Iterator[int]:
        """The shards of ``count`` that are missing, for the caller to write; each is claimed while it is worked on.

        Ranks begin with shards rank, rank + world size, ... and go on with what nobody has begun, so that a slow or
        dead rank holds up no other. Rank 0 gets shards until none is missing; the others until none is to be had.
        A claim is a lock, which dies with its process. Two ranks that wrote one shard all the same (on a file system
        without locks) would write the same bytes.
        """
        rank = self.rank
        self.path.mkdir(parents=True, exist_ok=True)
        fd = os.open(self.path / CLAIMS, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if (self.path / DONE).exists():  # rank 0 was faster, and has removed the claims
                (self.path / CLAIMS).unlink(missing_ok=True)
                return
            order = [*range(rank.number, count, rank.count)]
            order += [i for i in range(count) if i % rank.count != rank.number]
            while order := [i for i in order if not self.shard(i).exists()]:
                idle = True
                for i in order:
                    if self.shard(i).exists() or not _claim(fd, i, rank):
                        continue
                    try:
                        if not self.shard(i).exists():
                            for leftover in self.path.glob(f".part-{i:06d}.jsonl.*.tmp"):
                                leftover.unlink(missing_ok=True)
                            idle = False
                            yield i
                    finally:
                        _release(fd, i)
                if idle and not rank.leads:
                    return
                if idle:
                    time.sleep(POLL)
        finally:
            os.close(fd)


def _remove_claims(stage: Path) -> None:
    """Delete what was needed while the ranks shared the shards of a stage that is complete."""
    for leftover in (stage / CLAIMS, *stage.glob(".part-*.tmp")):
        leftover.unlink(missing_ok=True)


def _claim(fd: int, index: int, rank: Rank) -> bool:
    """Lock one byte of the claims; without locks, whether the shard was dealt to this rank."""
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, index)
        return True
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        return index % rank.count == rank.number


def _release(fd: int, index: int) -> None:
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.lockf(fd, fcntl.LOCK_UN, 1, index)


class RunDirectory:
    """One run: one configuration, one set of inputs, one directory."""

    def __init__(self, path: Path, key: str, rank: Rank | None = None):
        self.path, self.key, self.rank = path, key, rank or Rank()
        self._lock: _Lock | None = None

    @classmethod
    def open(
        cls,
        path: str | os.PathLike,
        config: Mapping[str, Any],
        inputs: Mapping[str, Any],
        check: Callable[[], None] = lambda: None,
        rank: Rank | None = None,
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
                shutil.rmtree(path / "stages" / INPUTS, ignore_errors=True)
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
        run = cls(path, key, rank)
        run._lock = _Lock.of(path)
        _remove_leftovers(path)
        return run

    @classmethod
    def join(cls, path: str | os.PathLike, config: Mapping[str, Any], rank: Rank) -> RunDirectory:
        """The run of this configuration that rank 0 opened or is about to open, with its inputs copied.

        Raises:
            LeamlError: the directory holds another run, another process has this rank, or rank 0 does not come.
        """
        path = Path(path)
        config = json.loads(json.dumps(config))
        record, inputs = path / CONFIG, path / "stages" / INPUTS / DONE

        def opened() -> bool:
            if not record.exists() or not inputs.exists():
                return False
            there = read_json(record)
            if there["config"] == config:
                return True
            if _has_begun(path):
                cls._refuse(path, there, {"config": config, "inputs": there["inputs"]})
            return False  # rank 0 may be about to replace a run that has not begun

        _wait(path, rank, opened, "to open the run")
        run = cls(path, fingerprint(read_json(record)), rank)
        run._lock = _Lock.of(path, rank.number)
        return run

    def wait_for(self, stage: StageDirectory) -> None:
        """Return once rank 0 has finished ``stage``.

        Raises:
            LeamlError: rank 0 is gone, or does not come.
        """
        _wait(self.path, self.rank, (stage.path / DONE).exists, f"to finish the stage {stage.path.name!r}")

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
        return StageDirectory(self.path / "stages" / name, self.key, self)

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
    def skipped(self) -> Path:
        return self.path / "skipped.jsonl"

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
    """Keeps other processes of the same rank out of a run while this object lives; a killed process leaves none behind.

    Two processes that both lead would write into each other's logs and checkpoints.
    """

    _held: ClassVar[weakref.WeakValueDictionary[tuple[Path, int], _Lock]] = weakref.WeakValueDictionary()

    def __init__(self, path: Path, rank: int):
        self._own = path / f".rank-{rank}" if rank else None
        self._fd = os.open(self._own, os.O_RDWR | os.O_CREAT, 0o644) if self._own else _open_record(path)
        for attempt in range(3):
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError as error:
                if attempt < 2:  # another rank may be looking whether somebody leads, which takes a microsecond
                    time.sleep(0.1)
                    continue
                who = (
                    f"another process works on this run as rank {rank}" if rank else "another process works on this run"
                )
                raise LeamlError(f"{path}: {who}: wait for it, or name another --output.") from error
            except OSError:
                return  # a file system without locks

    def __del__(self):
        if self._own is not None:
            self._own.unlink(missing_ok=True)
        os.close(self._fd)

    @classmethod
    def of(cls, path: Path, rank: int = 0) -> _Lock:
        """The lock of a run directory; within a process it is shared."""
        key = path.resolve(), rank
        lock = cls._held.get(key)
        if lock is None:
            lock = cls._held[key] = cls(path, rank)
        return lock


def _open_record(path: Path) -> int:
    try:
        return os.open(path / CONFIG, os.O_RDWR)  # NFS locks only what may be written
    except PermissionError:
        return os.open(path / CONFIG, os.O_RDONLY)


def _led(path: Path) -> bool:
    """Whether rank 0 works on the run; true where that cannot be found out."""
    try:
        fd = _open_record(path)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except OSError:
        return True
    finally:
        os.close(fd)


def _wait(path: Path, rank: Rank, ready: Callable[[], bool], what: str) -> None:
    """Look again and again; a rank 0 that is away for longer than the rank's patience is an error."""
    if ready():
        return
    print(f"leaml: rank {rank.number} waits for rank 0 {what}.", file=sys.stderr, flush=True)
    seen = time.monotonic()
    while not ready():
        if _led(path):
            seen = time.monotonic()
        elif time.monotonic() - seen > rank.patience:
            raise LeamlError(
                f"{path}: rank {rank.number} has waited {rank.patience:.0f} s for rank 0 {what}, which is not at work: "
                f"start all ranks again (or this process alone with --rank 0 --world-size 1); "
                f"{PATIENCE} sets how many seconds to wait."
            )
        time.sleep(POLL)


def _remove_leftovers(path: Path) -> None:
    """Delete the temporary files of a killed process; those of shards may be another rank's and go with its claim."""
    for leftover in [*path.glob(".*.tmp"), *path.glob("stages/**/.*.tmp")]:
        if re.fullmatch(r"\.(?!part-).+\.\d+\.tmp", leftover.name) and leftover.is_file():
            leftover.unlink()
    for claims in path.glob(f"stages/**/{CLAIMS}"):
        if (claims.parent / DONE).exists():  # killed between the two
            _remove_claims(claims.parent)


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
