"""A run directory, read: everything a page shows, as counts and small lists.

Covers: finished and unfinished runs, in one pass over the pseudo-QA whose memory does not grow with the number of
pictures (beyond those chosen to be shown).
Does not cover: layout (templates), drawing (``figures``), thumbnails (``gallery``).
"""

from __future__ import annotations

import dataclasses
import hashlib
import heapq
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from leaml_plugin.artifacts import CONFIG, DONE, RunDirectory, StageDirectory, fingerprint, read_json, read_records
from leaml_plugin.errors import LeamlError
from leaml_plugin.families import Families, Family
from leaml_plugin.metrics import (
    FAMILIES,
    BlindMajority,
    Estimate,
    clustered_mean,
    exact_match,
    normalise,
    normalise_question,
)
from leaml_plugin.records import QA, ImageRef, Picture, Prediction, PseudoQA, Skipped
from leaml_plugin.report.words import CHECKS, family_of, without_machine
from leaml_plugin.stages.caption import Usage
from leaml_plugin.teachers import Caption

STAGES = ("inputs", "caption", "relevance", "train_generator", "generate", "verify", "filter", "finetune", "evaluate")
NOT_FILTERED = "not_filtered"


def open_run(run: RunDirectory | str | os.PathLike[str]) -> RunDirectory:
    """The run that a directory holds, for reading.

    Raises:
        LeamlError: there is none.
    """
    if isinstance(run, RunDirectory):
        return run
    path = Path(run)
    record = path / CONFIG
    if not record.is_file():
        raise LeamlError(f"{path} is no run directory of leaml (it has no {CONFIG}): name the --output of a run.")
    return RunDirectory(path, fingerprint(read_json(record)))


@dataclass(frozen=True)
class Row:
    """One question about a picture; ``notes`` are (what it is, text): a verbatim text, a second answer, the label."""

    order: int
    status: str
    family: str
    question: str
    answer: str
    notes: tuple[tuple[str, str], ...] = ()
    logprob: float | None = None


@dataclass
class Shown:
    """One picture of a gallery with what was written about it, or asked of it.

    ``source`` tells who wrote the caption and what was asked, or why there is no caption.
    """

    id: str
    images: tuple[ImageRef, ...]
    caption: str = ""
    source: str = ""
    rows: list[Row] = field(default_factory=list)


@dataclass(frozen=True)
class TemplateResult:
    """Scores on the questions of one template. ``blind`` and ``gain`` are None where no labels are known."""

    question: str
    family: str
    n: int
    exact: Estimate
    blind: Estimate | None
    blind_answer: str
    gain: Estimate | None


@dataclass(frozen=True)
class Answers:
    """How answers are distributed for one group of questions: among the labels and among the kept pairs."""

    name: str
    labels: Counter[str]
    kept: Counter[str]

    @property
    def distance(self) -> float | None:
        """Total variation distance in [0, 1], or None where one side is empty."""
        a, b = self.labels.total(), self.kept.total()
        if not a or not b:
            return None
        return sum(abs(self.labels[k] / a - self.kept[k] / b) for k in {*self.labels, *self.kept}) / 2

    def top(self, most: int = 8) -> list[tuple[str, int, int]]:
        """(answer, labels, kept) of the most frequent answers; the rest as ``""``."""
        a, b = max(self.labels.total(), 1), max(self.kept.total(), 1)
        weight = {k: self.labels[k] / a + self.kept[k] / b for k in {*self.labels, *self.kept}}
        order = sorted(weight, key=lambda k: (-weight[k], k))
        most = len(order) if len(order) == most + 1 else most
        rows = [(k, self.labels[k], self.kept[k]) for k in order[:most]]
        rest = order[most:]
        if rest:
            rows.append(("", sum(self.labels[k] for k in rest), sum(self.kept[k] for k in rest)))
        return rows


class Facts:
    """One run, as far as it got. Attributes are read from disk when first used and kept."""

    def __init__(self, run: RunDirectory | str | os.PathLike[str]):
        self.run = open_run(run)

    @cached_property
    def _round(self) -> str:
        """Where the stages of the round lie whose result was delivered: ``""`` for the first."""
        path = self.run.stage("rounds").path / "rounds.json"
        delivered = read_json(path)["delivered"] if path.is_file() else 1
        return f"round-{delivered}/" if delivered > 1 else ""

    def stage(self, name: str) -> StageDirectory:
        there = self.run.stage(self._round + name)
        return there if self._round and there.path.is_dir() else self.run.stage(name)

    def _file(self, stage: str, name: str) -> Path | None:
        path = self.stage(stage).path / name  # StageDirectory.file would create the folder
        return path if path.is_file() else None

    def _json(self, stage: str, name: str) -> Any:
        path = self._file(stage, name)
        return read_json(path) if path else None

    def _records(self, stage: str, name: str, kind: type) -> Iterator[Any]:
        path = self._file(stage, name)
        return read_records(path, kind) if path else iter(())

    @cached_property
    def recorded(self) -> dict[str, Any]:
        record = self.run.path / CONFIG
        return read_json(record) if record.is_file() else {}

    @property
    def config(self) -> dict[str, Any]:
        return self.recorded.get("config", {})

    @property
    def inputs(self) -> dict[str, Any]:
        return self.recorded.get("inputs", {})

    @cached_property
    def begun(self) -> list[str]:
        """The stages that have written something."""
        return [name for name in STAGES if self.run.stage(name).path.is_dir()]

    @cached_property
    def unfinished(self) -> list[str]:
        """Stages that began and did not finish."""
        return [name for name in self.begun if not (self.run.stage(name).path / DONE).exists()]

    # ------------------------------------------------------------------------------------------------- inputs

    @cached_property
    def labels(self) -> list[QA]:
        return list(self._records("inputs", "labels.jsonl", QA))

    @cached_property
    def questions(self) -> dict[str, QA]:
        """The questions of the evaluation by id."""
        return {qa.id: qa for qa in self._records("inputs", "questions.jsonl", QA)}

    @cached_property
    def skipped(self) -> int:
        """Unlabelled pictures that could not be used."""
        return sum(1 for _ in read_records(self.run.skipped, Skipped)) if self.run.skipped.is_file() else 0

    def pictures(self) -> Iterator[Picture]:
        """The unlabelled pictures in order; those that pseudo-QA was written for where the list is not at hand."""
        for stage in ("caption", "inputs"):  # with the teacher's captions, where there was one
            if self._file(stage, "pictures.jsonl"):
                yield from self._records(stage, "pictures.jsonl", Picture)
                return
        last = None
        for path in self.stage("generate").shards():
            for pair in read_records(path, PseudoQA):
                if pair.picture_id != last:
                    yield Picture(pair.picture_id, pair.images)
                last = pair.picture_id

    @cached_property
    def usage(self) -> str:
        """Totals of what the teacher was asked in this run, as a sentence; empty where it was asked nothing."""
        found = self._json("caption", "usage.json")
        return str(Usage(**found)) if found and found["pictures"] else ""

    def captions(self) -> Iterator[Caption]:
        """What the teacher said of each picture that it was asked about, usable or not."""
        for path in self.stage("caption").shards():
            yield from read_records(path, Caption)

    # ---------------------------------------------------------------------------------------------- pseudo-QA

    def pseudo(self) -> Iterator[PseudoQA]:
        """Every pair with its reason; before the filter ran, all that were written, with :data:`NOT_FILTERED`."""
        if self._file("filter", "kept.jsonl") and self._file("filter", "dropped.jsonl"):
            yield from self._records("filter", "kept.jsonl", PseudoQA)
            yield from self._records("filter", "dropped.jsonl", PseudoQA)
            return
        for path in self.stage("generate").shards():
            for pair in read_records(path, PseudoQA):
                yield dataclasses.replace(pair, reason=NOT_FILTERED)

    @cached_property
    def _pass(
        self,
    ) -> tuple[dict[str, Counter[str]], dict[str, Counter[str]], dict[str, Counter[str]], dict[str, Counter[str]]]:
        """Counts of (family, reason), of kept answers by family and by template that the labels know, and of (steered
        family, reason)."""
        mix = self._json("generate", "families.json")
        learnt = Families([Family(row["name"], row["name"], row["labels"]) for row in mix["families"]]) if mix else None
        steered: dict[str, Counter[str]] = defaultdict(Counter)
        known = {normalise_question(qa.question) for qa in self.labels}
        yields: dict[str, Counter[str]] = defaultdict(Counter)
        by_family: dict[str, Counter[str]] = defaultdict(Counter)
        by_template: dict[str, Counter[str]] = defaultdict(Counter)
        for pair in self.pseudo():
            name = family_of(pair.question)
            yields[name][pair.reason] += 1
            if learnt is not None and pair.question:
                steered[learnt.of(pair.question)][pair.reason] += 1
            if not pair.reason:
                answer = normalise(pair.answer)
                by_family[name][answer] += 1
                template = normalise_question(pair.question)
                if template in known:
                    by_template[template][answer] += 1
        order = [name for name in (*FAMILIES, "") if name in yields]
        return {name: yields[name] for name in order}, by_family, by_template, steered

    @property
    def yields(self) -> dict[str, Counter[str]]:
        """Pairs by family and reason; the reason of a kept pair is ``""``."""
        return self._pass[0]

    @property
    def steered(self) -> list[dict[str, Any]]:
        """For each family of the target mix its share of the labels, of the texts asked for, of the questions written
        and of the pairs kept; empty where generation was not steered."""
        mix, counts = self._json("generate", "families.json"), self._pass[3]
        written = max(1, sum(c.total() for c in counts.values()))
        kept = max(1, sum(c[""] for c in counts.values()))
        return [
            {**row, "written": counts[row["name"]].total() / written, "kept": counts[row["name"]][""] / kept}
            for row in (mix["families"] if mix else [])
        ]

    @property
    def pairs(self) -> int:
        return sum(counts.total() for counts in self.yields.values())

    @property
    def kept(self) -> int:
        return sum(counts[""] for counts in self.yields.values())

    @property
    def filtered(self) -> bool:
        return NOT_FILTERED not in self.reasons

    @cached_property
    def reasons(self) -> list[str]:
        """The reasons that occur, the most frequent first."""
        total: Counter[str] = Counter()
        for counts in self.yields.values():
            total += counts
        return sorted((r for r in total if r), key=lambda r: (-total[r], r))

    @cached_property
    def answers_by_family(self) -> list[Answers]:
        labels: dict[str, Counter[str]] = defaultdict(Counter)
        for qa in self.labels:
            labels[family_of(qa.question)][normalise(qa.answer)] += 1
        kept = self._pass[1]
        return [Answers(f, labels[f], kept.get(f, Counter())) for f in FAMILIES if labels[f] or kept.get(f)]

    @cached_property
    def answers_by_template(self) -> list[Answers]:
        """For each question that the labels ask, the best covered first."""
        labels: dict[str, Counter[str]] = defaultdict(Counter)
        text: dict[str, str] = {}
        for qa in self.labels:
            template = normalise_question(qa.question)
            labels[template][normalise(qa.answer)] += 1
            text.setdefault(template, qa.question)
        kept = self._pass[2]
        groups = [Answers(text[t], counter, kept.get(t, Counter())) for t, counter in labels.items()]
        return sorted(groups, key=lambda g: (-g.kept.total(), -g.labels.total(), g.name))

    def gallery(self, most: int) -> tuple[list[Shown], int]:
        """At most ``most`` pictures with their pairs, in input order, and how many pictures there are.

        Where there are more, those with the smallest hash of their id are taken: a sample that depends neither on
        the order of the input nor on what was written.
        """
        chosen, total = choose((p.id for p in self.pictures()), most)
        shown: dict[str, Shown] = {}
        for picture in self.pictures():
            if picture.id in chosen and picture.id not in shown:
                shown[picture.id] = Shown(picture.id, picture.images, picture.caption or "")
        for record in self.captions():
            if record.id in shown:
                shown[record.id].source = source_of(record)
        for pair in self.pseudo():
            if pair.picture_id in shown:
                notes = [(CHECKS.get(name, f"{name}:"), text) for name, text in pair.checks.items()]
                if not (pair.question and pair.answer):
                    notes.append(("as written:", pair.text))
                name = family_of(pair.question)
                shown[pair.picture_id].rows.append(
                    Row(pair.sample, pair.reason, name, pair.question, pair.answer, tuple(notes), pair.logprob)
                )
        for entry in shown.values():
            entry.rows.sort(key=lambda row: row.order)
        return list(shown.values()), total

    # ------------------------------------------------------------------------------------------------- neurons

    @cached_property
    def heatmap(self) -> dict[str, Any] | None:
        return self._json("relevance", "heatmap.json")

    @cached_property
    def overlap(self) -> dict[str, Any] | None:
        return self._json("relevance", "overlap.json")

    # ---------------------------------------------------------------------------------------------- training

    def log(self, stage: str) -> list[dict[str, Any]]:
        """The steps of a training log; a last line that a running or killed process cut short is left out."""
        path = self._file(stage, "log.jsonl")
        if path is None:
            return []
        lines = path.read_text(encoding="utf-8", errors="replace").removesuffix("\n").split("\n")
        steps = []
        for n, line in enumerate(lines if lines != [""] else (), 1):
            try:
                steps.append(json.loads(line))
            except json.JSONDecodeError as error:
                if n < len(lines):
                    raise LeamlError(
                        f"{path} line {n} is damaged ({error}): delete the stage and run again."
                    ) from error
        return steps

    # ------------------------------------------------------------------------------------------------ results

    @cached_property
    def metrics(self) -> dict[str, Any]:
        return self._json("evaluate", "metrics.json") or {}

    @cached_property
    def predictions(self) -> list[Prediction]:
        return list(self._records("evaluate", "predictions.jsonl", Prediction))

    def images_of(self, question_id: str) -> tuple[ImageRef, ...]:
        qa = self.questions.get(question_id)
        return qa.images if qa else ()

    def _cluster(self, p: Prediction) -> str:
        images = self.images_of(p.id)
        return images[0].uri if images else p.id

    @cached_property
    def blind(self) -> BlindMajority | None:
        return BlindMajority((qa.question, qa.answer) for qa in self.labels) if self.labels else None

    @cached_property
    def by_template(self) -> list[TemplateResult]:
        """Results by question template, in order of family and then of the number of questions."""
        groups: dict[str, list[Prediction]] = defaultdict(list)
        for p in self.predictions:
            groups[normalise_question(p.question)].append(p)
        out = []
        for group in groups.values():
            clusters = [self._cluster(p) for p in group]
            hits = [float(p.correct) for p in group]
            question, blind, gain, said = group[0].question, None, None, ""
            if self.blind is not None:
                said = self.blind.answer(question)
                blind_hits = [float(exact_match(said, p.answer)) for p in group]
                blind = clustered_mean(blind_hits, clusters)
                gain = clustered_mean([h - b for h, b in zip(hits, blind_hits)], clusters)
            exact = clustered_mean(hits, clusters)
            out.append(TemplateResult(question, family_of(question), len(group), exact, blind, said, gain))
        return sorted(out, key=lambda r: (FAMILIES.index(r.family), -r.n, r.question))

    def answered(self, most: int) -> tuple[list[Shown], int]:
        """At most ``most`` pictures of the evaluation with their questions, chosen as in :meth:`gallery`."""
        order: dict[str, list[Prediction]] = defaultdict(list)
        for p in self.predictions:
            order[self._cluster(p)].append(p)
        chosen, total = choose(order, most)
        out = []
        for cluster, group in order.items():
            if cluster not in chosen:
                continue
            images = self.images_of(group[0].id)
            name = Path(images[0].uri).name if images and not images[0].uri.startswith("hf:") else group[0].id
            entry = Shown(name, images)
            for n, p in enumerate(group):
                status, notes = ("right", ()) if p.correct else ("wrong", (("label:", p.answer),))
                entry.rows.append(Row(n, status, family_of(p.question), p.question, p.prediction, notes))
            out.append(entry)
        return out, total


def source_of(record: Caption) -> str:
    """Who wrote a caption and by which prompt; where it may not be used, why, and what was written."""
    model = without_machine(str(record.meta.get("model", "")).removeprefix("model:"))
    asked = f"{model}, prompt {record.meta.get('prompt', '')}"
    if record.caption is not None:
        return asked + (", ended by the token limit" if record.meta.get("finish_reason") == "length" else "")
    why = f"no caption ({asked}): {record.reason}"
    return f"{why}; as written: {record.text}" if record.text else why


def choose(ids: Iterable[str], most: int) -> tuple[set[str], int]:
    """The ``most`` ids with the smallest hash, and how many different neighbours there were; memory is O(most)."""
    total, last = 0, None

    def keyed() -> Iterator[tuple[bytes, str]]:
        nonlocal total, last
        for id_ in ids:
            if id_ != last:
                total += 1
                yield hashlib.sha256(id_.encode("utf-8", "surrogatepass")).digest(), id_
            last = id_

    chosen = {id_ for _, id_ in heapq.nsmallest(most, keyed())}
    return chosen, total
