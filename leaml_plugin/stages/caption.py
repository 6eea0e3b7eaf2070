"""Stage 0, captions: a teacher describes the unlabelled pictures that have no caption yet.

The teacher is a local transformers model or a server; both answer in any order. Each answer goes into the journal of
its shard at once, and a shard whose answers are all there is written whole, in the order of the pictures. So a run that
is killed asks again only for what was under way, and neither kills nor the order of the answers change its result.

Covers: what is asked, shards and journals, totals of tokens and cost, pictures joined with their captions.
Does not cover: talking to a model (``leaml_plugin.teachers``); captions from a file (``data.load_unlabeled``).
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from leaml_plugin.artifacts import StageDirectory, read_records, write_json, write_records, write_text
from leaml_plugin.errors import LeamlError
from leaml_plugin.progress import Progress
from leaml_plugin.records import Picture, from_json, to_json
from leaml_plugin.teachers import Answer, Caption, Failure, judge, seed_of
from leaml_plugin.teachers.client import ChatClient, ServerConfig, check_url
from leaml_plugin.teachers.prompt import TeacherPrompt

if TYPE_CHECKING:
    from leaml_plugin.models import Loaded

ENCODINGS = ("jpeg", "png")
LOCAL = "model:"


@dataclass(frozen=True)
class CaptionConfig:
    """Who describes the unlabelled pictures, and what is asked.

    Attributes:
        teacher: ``http://host:port/v1`` (any OpenAI-compatible server) or ``model:PATH`` (a directory or Hub id of a
            transformers model); empty: nobody, the captions come from a file.
        model: the model's name on the server; empty: the only one it lists.
        prompts: directory with teacher prompt files, or one file with the caption prompt; empty: built-in.
        temperature: 0 is greedy; ``null`` leaves it to the server (some hosted models allow no other).
        top_p: smallest set of tokens with this probability is sampled from, where the temperature is not 0.
        max_tokens: longest caption.
        seed: of all draws; every picture has its own.
        longest_side: pixels to which pictures are scaled down for a server; 0: never.
        encoding: how pictures are sent, "jpeg" or "png" (exact, larger).
        extra: further fields of a server's requests, e.g. ``{"chat_template_kwargs": {"enable_thinking": false}}``.
        batch_size: pictures at once, for a local model. A server has ``server.concurrency``.
        shard_size: captions a file.
        server: how the server is spoken to; nothing there changes what is asked.
    """

    teacher: str = ""
    model: str = ""
    prompts: str = ""
    temperature: float | None = 0.0
    top_p: float = 1.0
    max_tokens: int = 256
    seed: int = 0
    longest_side: int = 1024
    encoding: str = "jpeg"
    extra: dict = field(default_factory=dict)
    batch_size: int = 8
    shard_size: int = 256
    server: ServerConfig = field(default_factory=ServerConfig)

    def __post_init__(self) -> None:
        if self.teacher and not self.is_local and not re.match(r"https?:", self.teacher, re.IGNORECASE):
            raise LeamlError(
                f"teacher {self.teacher!r} is neither http://host:port/v1 nor model:PATH; a file goes to --captions."
            )
        if self.is_local and not self.teacher.removeprefix(LOCAL):
            raise LeamlError("teacher 'model:' names no model; write model:PATH.")
        if self.teacher and not self.is_local:
            check_url(self.teacher)
        for name in ("max_tokens", "batch_size", "shard_size"):
            if getattr(self, name) < 1:
                raise LeamlError(f"caption: {name} is {getattr(self, name)}; it must be at least 1.")
        if (self.temperature or 0) < 0 or not 0 < self.top_p <= 1 or self.longest_side < 0:
            raise LeamlError("caption: temperature and longest_side must not be negative, and top_p in (0, 1].")
        if self.encoding not in ENCODINGS:
            raise LeamlError(f"caption: encoding is {self.encoding!r}; known are {', '.join(ENCODINGS)}.")
        if self.is_local and self.temperature is None:
            raise LeamlError("caption: a local model needs a temperature; null is for servers.")
        for name in self.extra:
            if re.search(r"api.?key|secret|password|authorization", name, re.IGNORECASE):
                raise LeamlError(f"caption: extra has {name!r}, but runs are kept; put the key into the environment.")

    @property
    def is_local(self) -> bool:
        return self.teacher.startswith(LOCAL)

    @property
    def path(self) -> str:
        """The model of a local teacher."""
        return self.teacher.removeprefix(LOCAL)

    def identity(self) -> dict[str, Any]:
        """What decides the captions: all but where the server is, how it is spoken to, and the batch size."""
        data = dataclasses.asdict(self)
        for name in ("server", "batch_size"):
            del data[name]
        if self.teacher and not self.is_local:
            data["teacher"] = "server"
        return data


@dataclass(frozen=True)
class Usage:
    """Totals of a stage's captions.

    ``reasons`` counts the pictures without caption by the first word of why; ``cut`` the captions that the token limit
    ended; ``cost`` is in the currency of the prices.
    """

    pictures: int = 0
    captions: int = 0
    reasons: Mapping[str, int] = field(default_factory=dict)
    cut: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0

    def __str__(self) -> str:
        why = ", ".join(f"{n} {reason}" for reason, n in sorted(self.reasons.items()))
        parts = [f"{self.captions} captions of {self.pictures} pictures" + (f" ({why})" if why else "")]
        if self.cut:
            parts.append(f"{self.cut} ended by the token limit")
        if self.prompt_tokens or self.completion_tokens:
            parts.append(f"{self.prompt_tokens} prompt + {self.completion_tokens} completion tokens")
        if self.cost:
            parts.append(f"cost {self.cost:.2f}")
        return "; ".join(parts)


def run(
    config: CaptionConfig,
    stage: StageDirectory,
    *,
    pictures: Sequence[Picture],
    prompt: TeacherPrompt,
    load: Callable[[str], Loaded],
) -> tuple[Path, Usage]:
    """Caption the pictures that have no caption; returns the file of all pictures with captions, and the totals.

    Args:
        load: loads the model at a path, for a local teacher.

    Raises:
        LeamlError: the server cannot be used, or the budget is spent; what was written is kept. No picture has a
            usable caption.
    """
    joined, totals = stage.file("pictures.jsonl"), stage.file("usage.json")
    if stage.done:
        return joined, Usage(**json.loads(totals.read_text(encoding="utf-8")))
    wanted = array("q", (n for n, picture in enumerate(pictures) if not picture.caption))
    book = _Book(stage, len(wanted), config.shard_size)
    try:
        if book.left:
            _ask(config, book, wanted, pictures, prompt, load)
    finally:
        book.close()
    usage = usage_of(stage.shards(), config.server)
    if wanted and not usage.captions and len(wanted) == len(pictures):
        why = ", ".join(f"{n} {reason}" for reason, n in usage.reasons.items())
        raise LeamlError(
            f"{config.teacher}: no usable caption for any of {len(pictures)} pictures ({why}): see {stage.path} for "
            "what the teacher said, then change its prompt or the teacher."
        )
    write_records(joined, _joined(pictures, stage.shards()))
    write_json(totals, dataclasses.asdict(usage))
    stage.finish()
    return joined, usage


def usage_of(shards: Iterable[Path], server: ServerConfig) -> Usage:
    """Add up shards."""
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for record in _records(shards):
        counts["pictures"] += 1
        if record.caption is None:
            reasons[record.reason.partition(":")[0]] += 1
        else:
            counts["captions"] += 1
            counts["cut"] += record.meta.get("finish_reason") == "length"
        for name in ("prompt_tokens", "completion_tokens"):
            counts[name] += record.meta.get(name) or 0
    cost = server.cost(counts["prompt_tokens"], counts["completion_tokens"])
    return Usage(**counts, reasons=dict(sorted(reasons.items())), cost=cost)


def public(record: Caption) -> dict[str, Any]:
    """A line of a captions file, as :func:`leaml_plugin.data.load_unlabeled` reads it back."""
    line: dict[str, Any] = {"id": record.id, "caption": record.caption}
    line |= {name: value for name in ("reason", "text") if (value := getattr(record, name))}
    return line | {"meta": dict(record.meta)}


def _records(shards: Iterable[Path]) -> Iterator[Caption]:
    for shard in shards:
        yield from read_records(shard, Caption)


def _joined(pictures: Iterable[Picture], shards: Iterable[Path]) -> Iterator[Picture]:
    records = _records(shards)
    for picture in pictures:
        yield picture if picture.caption else dataclasses.replace(picture, caption=next(records).caption)


# -- asking ----------------------------------------------------------------------------------------------------------


def _ask(
    config: CaptionConfig,
    book: _Book,
    wanted: Sequence[int],
    pictures: Sequence[Picture],
    prompt: TeacherPrompt,
    load: Callable[[str], Loaded],
) -> None:
    items = ((number, pictures[wanted[number]]) for number in book.missing())
    bar = Progress("captions", len(wanted), unit="picture", start=len(wanted) - book.left)
    for (number, picture), answer, meta in (_local if config.is_local else _server)(config, items, prompt, load, book):
        caption, reason, text = judge(answer, prompt)
        book.add(number, Caption(picture.id, caption, reason, text, meta))
        bar.update()
    bar.close()


_Answers = Iterator[tuple[tuple[int, Picture], Answer | Failure, dict[str, Any]]]


def _meta(
    config: CaptionConfig, prompt: TeacherPrompt, answer: Answer | Failure, model: str, parameters: Mapping[str, Any]
) -> dict[str, Any]:
    """Where a caption comes from."""
    teacher = config.teacher if config.is_local else check_url(config.teacher)
    meta = {"teacher": teacher, "model": model, "prompt": prompt.version, "parameters": dict(parameters)}
    if isinstance(answer, Answer):
        meta["finish_reason"] = answer.finish
        meta |= {n: v for n in ("prompt_tokens", "completion_tokens") if (v := getattr(answer, n)) is not None}
        if answer.model not in ("", model):
            meta["served_model"] = answer.model
    return meta


def _local(
    config: CaptionConfig,
    items: Iterator[tuple[int, Picture]],
    prompt: TeacherPrompt,
    load: Callable[[str], Loaded],
    book: _Book,
) -> _Answers:
    from leaml_plugin.inference import Sampling
    from leaml_plugin.teachers import local

    parameters = {name: getattr(config, name) for name in ("temperature", "top_p", "max_tokens", "seed")}
    sampling = Sampling(config.temperature, config.top_p, config.seed) if config.temperature else None
    for item, answer in local.each(
        load(config.path), items, prompt, batch_size=config.batch_size, max_tokens=config.max_tokens, sampling=sampling
    ):
        yield item, answer, _meta(config, prompt, answer, config.path, parameters)


def _server(
    config: CaptionConfig,
    items: Iterator[tuple[int, Picture]],
    prompt: TeacherPrompt,
    load: Callable[[str], Loaded],
    book: _Book,
) -> _Answers:
    from leaml_plugin.teachers.pictures import messages

    fixed: dict[str, Any] = {"max_tokens": config.max_tokens}
    if config.temperature is not None:
        fixed["temperature"] = config.temperature
    sampled = bool(config.temperature)
    if sampled:
        fixed["top_p"] = config.top_p

    def request(item: tuple[int, Picture]) -> dict[str, Any]:
        picture = item[1]
        body = {
            "messages": messages(
                picture.images, prompt.caption, prompt.system, longest_side=config.longest_side, form=config.encoding
            ),
            **fixed,
        }
        if sampled:
            body["seed"] = seed_of(config.seed, picture.id)
        return {**body, **config.extra}

    parameters = {**fixed, "longest_side": config.longest_side, "encoding": config.encoding, **config.extra}
    if sampled:
        parameters["seed"] = config.seed
    # the work that is done counts towards the budget as well
    spent = usage_of(book.written(), config.server)
    prompt_tokens = spent.prompt_tokens + book.known("prompt_tokens")
    completion_tokens = spent.completion_tokens + book.known("completion_tokens")

    def cost() -> float:
        return config.server.cost(prompt_tokens, completion_tokens)

    def affordable() -> Iterator[tuple[int, Picture]]:
        for item in items:
            if config.server.max_cost and cost() > config.server.max_cost:
                return
            yield item

    with ChatClient(config.teacher, config.model, config.server, tokens=1000 + config.max_tokens) as client:
        model = client.connect()
        proven = spent.captions > 0 or book.known("completion_tokens") > 0
        for item, answer in client.each(affordable(), request, proven=proven):
            if isinstance(answer, Answer):
                prompt_tokens += answer.prompt_tokens or 0
                completion_tokens += answer.completion_tokens or 0
            yield item, answer, _meta(config, prompt, answer, model, parameters)
    if book.left:
        raise LeamlError(
            f"the captions have cost {cost():.2f}, more than server.max_cost ({config.server.max_cost:g}); "
            f"{book.count - book.left} of {book.count} are kept: raise it and repeat the command to go on."
        )


# -- shards under way ------------------------------------------------------------------------------------------------


class _Book:
    """Which captions are there. A shard under way has a journal, to which answers are appended as they come.

    Numbers count the captions that are wanted from 0; shard ``i`` holds ``size`` of them from ``i * size`` on. Only
    shards under way are in memory.
    """

    def __init__(self, stage: StageDirectory, count: int, size: int):
        self.count, self.left = count, count
        self._stage, self._size = stage, size
        self._whole = {i for i in range(-(-count // size)) if stage.shard(i).exists()}
        self.left -= sum(len(self._numbers(i)) for i in self._whole)
        self._open: dict[int, dict[int, Caption]] = {}
        self._files: dict[int, IO[str]] = {}
        for path in sorted(stage.work.glob("captions-*.jsonl")):
            shard = int(path.stem.removeprefix("captions-"))
            if shard in self._whole:  # killed between writing the shard and this
                path.unlink()
                continue
            self._open[shard] = _read_journal(path)
            self.left -= len(self._open[shard])
        self._known = {shard: frozenset(records) for shard, records in self._open.items()}
        for shard in list(self._open):
            self._commit_if_whole(shard)

    def _numbers(self, shard: int) -> range:
        return range(shard * self._size, min((shard + 1) * self._size, self.count))

    def _journal(self, shard: int) -> Path:
        return self._stage.work / f"captions-{shard:06d}.jsonl"

    def missing(self) -> Iterator[int]:
        """Numbers that were missing at the start, in order; may be read by another thread than :meth:`add` runs in."""
        for shard in range(-(-self.count // self._size)):
            if shard not in self._whole:
                known = self._known.get(shard, frozenset())
                yield from (number for number in self._numbers(shard) if number not in known)

    def written(self) -> list[Path]:
        """The shards that were whole at the start."""
        return [self._stage.shard(i) for i in sorted(self._whole)]

    def known(self, name: str) -> int:
        """Sum of a count in what the journals hold."""
        return sum(record.meta.get(name) or 0 for records in self._open.values() for record in records.values())

    def add(self, number: int, record: Caption) -> None:
        shard = number // self._size
        if shard not in self._files:
            self._files[shard] = open(self._journal(shard), "a", encoding="utf-8")
        line = json.dumps({"number": number, **to_json(record)}, ensure_ascii=False, sort_keys=True)
        self._files[shard].write(line + "\n")
        self._files[shard].flush()
        self._open.setdefault(shard, {})[number] = record
        self.left -= 1
        self._commit_if_whole(shard)

    def _commit_if_whole(self, shard: int) -> None:
        records = self._open[shard]
        if len(records) == len(self._numbers(shard)):
            write_records(self._stage.shard(shard), (records[number] for number in self._numbers(shard)))
            del self._open[shard]
            if shard in self._files:
                self._files.pop(shard).close()
            self._journal(shard).unlink()

    def close(self) -> None:
        """Make sure that the journals are on disk."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        self._files.clear()


def _read_journal(path: Path) -> dict[int, Caption]:
    """What a journal holds; a line that a kill cut short is taken out of it."""
    data = path.read_bytes()
    records: dict[int, Caption] = {}
    kept = []
    for line in data.splitlines(keepends=True):
        try:
            entry = json.loads(line) if line.endswith(b"\n") else {}
            number = entry.pop("number")
            records[number] = from_json(Caption, entry)
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        kept.append(line)
    if len(kept := b"".join(kept)) != len(data):
        write_text(path, kept.decode())
    return records
