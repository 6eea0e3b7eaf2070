"""LEAML, start to end: the stages in order, from files to an adapted model.

    from leaml_plugin import adapt
    result = adapt(model="Qwen/Qwen2.5-VL-3B-Instruct", labeled="train.jsonl", unlabeled="images/",
                   captions="captions.jsonl", output="runs/endo")
    print(result.weights)

Covers: the configuration of a whole run, the checks before any expensive work, the order of the stages.
Does not cover: what a stage does (``leaml_plugin.stages``) or the command line (``leaml_plugin.cli``).
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leaml_plugin.artifacts import (
    INPUTS,
    RunDirectory,
    StageDirectory,
    atomic_directory,
    fingerprint_rows,
    read_json,
    read_records,
    write_json,
    write_records,
)
from leaml_plugin.errors import LeamlError, unknown_name
from leaml_plugin.progress import track
from leaml_plugin.ranks import Rank, local_device
from leaml_plugin.records import QA, UNREADABLE, Picture, PseudoQA, Skipped, to_json
from leaml_plugin.sequences import Chosen, Mapped, RecordFile, Spool
from leaml_plugin.stages import caption, evaluate, filter, finetune, generate, relevance, train_generator, verify
from leaml_plugin.teachers.prompt import TeacherPrompt

if TYPE_CHECKING:
    from PIL.Image import Image

    from leaml_plugin.data import Collator, Prompts
    from leaml_plugin.models import Loaded
    from leaml_plugin.selection import Selection

METHODS = ("leaml", "labels")
PICTURE_CACHE = 1 << 30  # bytes of processed pictures that a stage keeps in memory
#: Stages that every round of self-training has anew, in ``stages/round-<n>/`` from the second round on.
PER_ROUND = ("start", "train_generator", "generate", "verify", "filter", "finetune")
ROUNDS = "rounds.json"
DECODED = 1000  # of more unlabelled pictures than these, so many are decoded before a run begins


@dataclass(frozen=True)
class AdaptConfig:
    """One adaptation run.

    Attributes:
        model: directory or Hub id of an image-text-to-text model with processor and chat template.
        labeled: the labelled questions (JSONL, conversations, messages, or a Hugging Face dataset).
        output: run directory; an unfinished run of the same configuration found there is taken up.
        unlabeled: a directory of pictures, a file that lists pictures, or a dataset. Needed by "leaml".
        captions: the teacher's captions of the unlabelled pictures, in a file.
        evaluation: labelled questions on which the result is scored; may be left out.
        image_root: folder that relative picture paths start from; empty: the folder of the file that names them.
        method: "leaml", or "labels" for plain fine-tuning on the labels alone (the baseline).
        prompts: directory with prompt files that replace the built-in ones; empty: built-in.
        dtype: of the weights: "auto", "float32", "bfloat16" or "float16".
        device: "auto", "cpu", "cuda", "cuda:1", ...
        max_length: longest sample in tokens, picture tokens included; a longer one is an error. 0: as many as the
            model has positions for.
        trust_remote_code: run code that comes with the model. Off unless you trust its author.
        caption: the teacher that describes the pictures which have no caption yet; nobody unless one is named.
        rounds: of self-training: from the second on the generator starts from the VQA model of the round before, and a
            new VQA model is trained, from the base model again, on the labels and the new pairs.
        round_gain: rounds end when the share of the pairs that the filter keeps rises by no more than this; the pairs
            of that last round are not learnt from.
        relevance, generator, generate, verify, filter, finetune, evaluate: the stages' own configurations.
    """

    model: str
    labeled: str
    output: str
    unlabeled: str = ""
    captions: str = ""
    evaluation: str = ""
    image_root: str = ""
    method: str = "leaml"
    prompts: str = ""
    dtype: str = "auto"
    device: str = "auto"
    max_length: int = 0
    trust_remote_code: bool = False
    rounds: int = 1
    round_gain: float = 0.0
    caption: caption.CaptionConfig = field(default_factory=caption.CaptionConfig)
    relevance: relevance.RelevanceConfig = field(default_factory=relevance.RelevanceConfig)
    generator: train_generator.GeneratorConfig = field(default_factory=train_generator.GeneratorConfig)
    generate: generate.GenerateConfig = field(default_factory=generate.GenerateConfig)
    verify: verify.VerifyConfig = field(default_factory=verify.VerifyConfig)
    filter: filter.FilterConfig = field(default_factory=filter.FilterConfig)
    finetune: finetune.FinetuneConfig = field(default_factory=finetune.FinetuneConfig)
    evaluate: evaluate.EvaluateConfig = field(default_factory=evaluate.EvaluateConfig)

    def __post_init__(self):
        for name in ("round_trip", "blind", "caption"):
            if getattr(self.filter, name) and not getattr(self.verify, name):
                raise LeamlError(
                    f"filter.{name} needs the second answers of verify.{name}; set both to true, or both to false."
                )
        if self.verify.asks and self.generator.qa_task != "both":
            raise LeamlError(
                'the verify stage asks the generator plain questions; set generator.qa_task="both", or turn '
                "verify.round_trip and filter.round_trip off."
            )
        if self.rounds < 1:
            raise LeamlError(f"rounds is {self.rounds}; it must be at least 1.")
        if not -1 <= self.round_gain < 1:
            raise LeamlError(f"round_gain is {self.round_gain}; it is a rise of a share, from -1 (never stop) to 1.")
        self.generate.engine.check(self.generate.backend)
        if not self.generate.engine.logprobs and (self.filter.min_logprob is not None or self.filter.keep_share < 1):
            raise LeamlError("filter.min_logprob and filter.keep_share need generate.engine.logprobs=true.")
        if self.method not in METHODS:
            raise unknown_name("method", self.method, METHODS)
        if self.method == "leaml" and not self.unlabeled:
            raise LeamlError('method "leaml" needs --unlabeled pictures; method "labels" trains on the labels alone.')
        if self.method == "leaml" and self.finetune.train.batch_size < 2:
            raise LeamlError(
                "labels and pseudo-labels share every batch of the fine-tuning: set --batch-size to at least 2 "
                "(--micro-batch 1 saves memory)."
            )


@dataclass(frozen=True)
class AdaptResult:
    """What a finished run left.

    Attributes:
        output: the run directory.
        weights: where the result lies: ``{"adapter": path}`` in PEFT's format, or ``{"model": path}`` after full
            fine-tuning.
        metrics: scores on the evaluation file, or empty.
    """

    output: str
    weights: dict[str, Path]
    metrics: dict[str, Any]

    @property
    def adapter(self) -> Path | None:
        return self.weights.get("adapter")

    @property
    def model(self) -> Path | None:
        return self.weights.get("model")


@dataclass(frozen=True)
class Inputs:
    """Everything a run reads beside the model, loaded and checked.

    ``pictures`` lie in a file and are to be read as a stream; ``skipped`` are those that cannot be used.
    """

    labels: Sequence[QA]
    pictures: Sequence[Picture]
    questions: Sequence[QA]
    skipped: Sequence[Skipped] = ()


def read_inputs(config: AdaptConfig) -> Inputs:
    """Load every record, so that bad input ends the run before it begins.

    Raises:
        LeamlError: naming file, line and what to do.
    """
    from leaml_plugin.data import load_labeled, load_unlabeled

    root = config.image_root or None
    labels = load_labeled(config.labeled, image_root=root)
    pictures: Sequence[Picture] = ()
    if config.method == "leaml":
        pictures = load_unlabeled(config.unlabeled, captions=config.captions or None)
        off = []
        if config.generator.caption_weight > 0:
            off.append("caption distillation off with --caption-weight 0")
        if config.verify.caption:
            off.append("the caption check off with verify.caption=false")
        if off and not config.caption.teacher and not any(picture.caption for picture in pictures):
            raise LeamlError(
                f"{config.unlabeled}: no picture has a caption; give --captions or --teacher, or turn "
                f"{' and '.join(off)}."
            )
    questions = load_labeled(config.evaluation, image_root=root) if config.evaluation else ()
    return Inputs(labels, pictures, questions)


class Adaptation:
    """One run, stage by stage; :func:`adapt` calls the methods in order.

        run = Adaptation(AdaptConfig(model=..., labeled=..., unlabeled=..., captions=..., output=...))
        run.caption()                                # a teacher's captions, where the configuration names one
        selection = run.relevance()                  # which neurons matter for question answering
        generator = run.train_generator(selection)   # QA loss + caption distillation on those neurons
        shards = run.generate(generator)             # pseudo-QA for the unlabelled pictures
        shards = run.verify(generator, shards)       # second answers, where the configuration asks for them
        pairs = run.filter(shards)                   # what may teach
        tuned = run.finetune(pairs, selection)       # labels + pseudo-labels
        metrics = run.evaluate(tuned)

    Making the object reads and checks all input, so that bad input ends the run before it begins. A stage that is
    complete in the output directory returns what it wrote; one that was killed goes on.

    Several processes (``rank``; by default what torchrun or the environment says) share the writing of pseudo-QA and
    the second answers. All else is rank 0's: the others wait for its files and read them.

    Raises:
        LeamlError: bad input or configuration; nothing is trained or written over then.
    """

    def __init__(self, config: AdaptConfig, rank: Rank | None = None):
        from leaml_plugin.data import Prompts

        self.config = config
        self.round = 1
        self._start: dict[str, Path] = {}  # weights that this round's generator starts from, if not the base model's
        self.rank = rank if rank is not None else Rank.here()
        self.prompts = Prompts.load(config.prompts or None)
        self.teacher_prompt = TeacherPrompt.load(config.caption.prompts or None)
        self.directory = (
            self._open() if self.rank.leads else RunDirectory.join(config.output, _identity(config), self.rank)
        )
        self.inputs = _kept_inputs(self.directory)

    def _open(self) -> RunDirectory:
        """Read and check all input, make or take up the run's directory, and copy the records into it."""
        from leaml_plugin import models

        config = self.config
        unused = [f"--{name}" for name in ("unlabeled", "captions") if getattr(config, name)]
        unused += ["--teacher"] if config.caption.teacher else []
        if config.method == "labels" and unused:
            print(
                f'leaml: warning: method "labels" trains on the labels alone and does not read {" and ".join(unused)}.',
                file=sys.stderr,
            )
        inputs = read_inputs(config)
        generate.steering(config.generate, inputs.labels)  # refuses a mix that is none
        for path in (config.model, *((config.caption.path,) if config.caption.is_local else ())):
            models.check(path, dtype=config.dtype, device=config.device, trust_remote_code=config.trust_remote_code)
        patterns = [pattern for pattern in (config.relevance.targets, config.finetune.targets) if pattern]
        ffn = config.relevance.granularity == "ffn"
        if patterns or ffn:  # what matches nothing would else be found when the first stage has been trained
            models.check_targets(config.model, patterns, ffn=ffn, trust_remote_code=config.trust_remote_code)
        usable: list[Inputs] = []

        def check() -> None:
            _check_labels(config, self.prompts, inputs)
            usable.append(_sort_out(config, inputs))
            _check_pictures(config, self.prompts, usable[0])

        found = _fingerprints(config, inputs, self.prompts.version, self.teacher_prompt.version)
        directory = RunDirectory.open(config.output, _identity(config), found, check, self.rank)
        _keep_inputs(directory, lambda: usable[0] if usable else _sort_out(config, inputs))
        return directory

    def load(self, weights: dict[str, Path] | None = None) -> Loaded:
        """The base model, or with ``weights`` what a training stage returned, with its processor."""
        from leaml_plugin import models

        c = self.config
        where = {"path": c.model, **(weights or {})}
        device = local_device(c.device)
        return models.load(**where, dtype=c.dtype, device=device, trust_remote_code=c.trust_remote_code)

    def collator(self, loaded: Loaded) -> Collator:
        from leaml_plugin.data import Collator
        from leaml_plugin.models import max_positions

        limit = self.config.max_length or max_positions(loaded.model)
        return Collator(loaded.processor, self.prompts, max_length=limit, cache_bytes=PICTURE_CACHE)

    def caption(self) -> None:
        """Let the teacher describe the pictures that have no caption, and go on with these captions."""
        if not self.config.caption.teacher or self.config.method != "leaml":
            return
        pictures, usage = caption.run(
            self.config.caption,
            self._stage("caption"),
            pictures=_kept_inputs(self.directory).pictures,
            prompt=self.teacher_prompt,
            load=lambda path: self.load({"path": path}),
        )
        self.inputs = dataclasses.replace(self.inputs, pictures=RecordFile(pictures, Picture))
        if self.rank.leads:
            print(f"leaml: {usage}", file=sys.stderr)

    def relevance(self) -> Selection:
        return relevance.run(
            self.config.relevance, self._stage("relevance"), labels=self.inputs.labels, **self._tools()
        )

    def train_generator(self, selection: Selection) -> dict[str, Path]:
        return train_generator.run(
            self.config.generator,
            self._stage("train_generator"),
            labels=self.inputs.labels,
            pictures=self.inputs.pictures,
            selection=selection,
            **self._tools(self._start),
        )

    def generate(self, generator: dict[str, Path]) -> list[Path]:
        weights = {**self._start, **generator}
        return generate.run(
            self.config.generate,
            self._stage("generate", shared=True),
            pictures=self.inputs.pictures,
            labels=self.inputs.labels,
            weights={"path": self.config.model, **weights},
            dtype=self.config.dtype,
            trust_remote_code=self.config.trust_remote_code,
            **self._tools(weights),
        )

    def verify(self, generator: dict[str, Path], shards: Sequence[Path]) -> list[Path]:
        size = self.config.generate.shard_size

        def captions(shard: int) -> dict[str, str]:
            return {p.id: p.caption for p in self.inputs.pictures[shard * size : (shard + 1) * size] if p.caption}

        stage = self._stage("verify", shared=True)
        tools = self._tools({**self._start, **generator})
        return verify.run(self.config.verify, stage, shards=shards, captions=captions, **tools)

    def filter(self, shards: Sequence[Path]) -> Sequence[QA]:
        """The kept pairs, as a view of their file."""
        kept, counts = filter.run(self.config.filter, self._stage("filter"), shards=shards, labels=self.inputs.labels)
        if not counts["kept"]:
            why = ", ".join(f"{n} {reason}" for reason, n in counts.items() if n)
            print(
                f"leaml: warning: the filter kept no pseudo-QA pair ({why}); fine-tuning has the labels alone.",
                file=sys.stderr,
            )
        if counts[UNREADABLE] and self.rank.leads:
            self._keep_skipped()
        return Mapped(RecordFile(kept, PseudoQA), PseudoQA.as_qa)

    def _keep_skipped(self) -> None:
        """Add the pictures that could not be opened while pairs were written to those found before."""

        def late() -> Iterator[Skipped]:
            last = None
            for pair in read_records(self._stage("filter").file(filter.DROPPED), PseudoQA):
                if pair.reason == UNREADABLE and pair.picture_id != last:
                    last = pair.picture_id
                    yield Skipped(pair.picture_id, pair.images, pair.checks.get(UNREADABLE, ""))

        write_records(self.directory.skipped, itertools.chain(self.inputs.skipped, late()))
        print(
            f"leaml: warning: {len(RecordFile(self.directory.skipped, Skipped))} of "
            f"{len(self.inputs.pictures) + len(self.inputs.skipped)} unlabelled pictures could not be used; "
            f"{self.directory.skipped} tells why.",
            file=sys.stderr,
        )

    def finetune(self, pairs: Sequence[QA] = (), selection: Selection | None = None) -> dict[str, Path]:
        return finetune.run(
            self.config.finetune,
            self._stage("finetune"),
            labels=self.inputs.labels,
            pseudo=pairs,
            selection=selection,
            **self._tools(),
        )

    def evaluate(self, weights: dict[str, Path]) -> dict[str, Any]:
        return evaluate.run(
            self.config.evaluate,
            self._stage("evaluate"),
            questions=self.inputs.questions,
            labels=self.inputs.labels,
            **self._tools(weights),
        )

    def begin_round(self, tuned: dict[str, Path]) -> None:
        """Go on to the next round, whose generator starts from ``tuned``, the VQA model of this one."""
        self.round += 1
        self._start = tuned
        if "adapter" in tuned:
            stage = self._stage("start")
            if not stage.done:
                from leaml_plugin import models

                loaded = self.load(tuned)
                models.save(loaded.model.merge_and_unload(), loaded.processor, stage.file("model"))  # type: ignore[operator]
                stage.finish()
            self._start = {"path": stage.path / "model"}

    def kept_share(self) -> float:
        """The share of this round's written pairs that the filter kept."""
        counts = read_json(self._stage("filter").file(filter.COUNTS))
        return counts["kept"] / max(1, sum(counts.values()))

    def record_rounds(self, shares: Sequence[float], delivered: int) -> None:
        """Write down the rounds' shares of kept pairs, and which round's VQA model is the result."""
        stage = self._stage("rounds")
        if not stage.done:
            write_json(stage.file(ROUNDS), {"kept_share": list(shares), "delivered": delivered})
            stage.finish()

    def deliver(self, tuned: dict[str, Path]) -> dict[str, Path]:
        """Put the trained weights where users look for them: ``adapter/`` or ``model/`` of the run."""
        kind, source = ("adapter", tuned["adapter"]) if "adapter" in tuned else ("model", tuned["path"])
        target = self.directory.adapter if kind == "adapter" else self.directory.model
        if not target.exists():
            with atomic_directory(target) as temporary:
                shutil.copytree(source, temporary, copy_function=_link_weights, dirs_exist_ok=True)
        return {kind: target}

    def _stage(self, name: str, shared: bool = False) -> StageDirectory:
        """A stage's directory. A stage that is not ``shared`` is rank 0's: the others get it once it is complete."""
        within = f"round-{self.round}/" if self.round > 1 and name in PER_ROUND else ""
        stage = self.directory.stage(within + name)
        if not (shared or self.rank.leads):
            self.directory.wait_for(stage)
        return stage

    def _tools(self, weights: dict[str, Path] | None = None) -> dict[str, Any]:
        """What every stage that runs a model needs; the model is loaded only where there is work left."""
        return {"load": lambda: self.load(weights), "collator": self.collator, "prompts": self.prompts}


def adapt(config: AdaptConfig | None = None, *, rank: Rank | None = None, **options: Any) -> AdaptResult:
    """Run every stage that is not complete yet; returns where the adapted model is.

    Takes an :class:`AdaptConfig` or its fields as keywords. Calling it again with the same configuration resumes a
    killed run and returns at once from a finished one. Of several processes (see :class:`Adaptation`) rank 0 returns
    the weights; the others return without any once nothing is left to share.

    Raises:
        LeamlError: bad input or configuration, before anything is trained or written over.
    """
    if config is None:
        config = AdaptConfig(**options)
    elif options:
        config = dataclasses.replace(config, **options)
    run = Adaptation(config, rank)
    if config.method == "labels" and not run.rank.leads:
        return AdaptResult(config.output, {}, {})
    run.caption()
    selection = None
    if config.method == "leaml" or config.finetune.mode == "selected":
        selection = run.relevance()
    tuned = run.finetune((), selection) if config.method == "labels" else _self_train(run, selection)
    if not run.rank.leads:
        return AdaptResult(config.output, {}, {})
    metrics = run.evaluate(tuned) if run.inputs.questions else {}
    return AdaptResult(config.output, run.deliver(tuned), metrics)


def _self_train(run: Adaptation, selection: Selection) -> dict[str, Path]:
    """The rounds of generator, pseudo-QA and fine-tuning; returns the VQA model of the last that was worth it.

    Ranks that do not lead leave once nothing is left to share, with what they know by then.
    """
    tuned: dict[str, Path] = {}
    shares: list[float] = []
    rounds, delivered = run.config.rounds, 1
    for number in range(1, rounds + 1):
        if number > 1:
            run.begin_round(tuned)
        generator = run.train_generator(selection)
        shards = run.verify(generator, run.generate(generator))
        if number == rounds and not run.rank.leads:
            return tuned
        pairs = run.filter(shards)
        shares.append(run.kept_share())
        if number > 1 and not shares[-1] - shares[-2] > run.config.round_gain:
            print(
                f"leaml: round {number} kept {100 * shares[-1]:.1f} % of its pairs, round {number - 1} "
                f"{100 * shares[-2]:.1f} %: the result is that of round {number - 1}.",
                file=sys.stderr,
            )
            break
        tuned, delivered = run.finetune(pairs, selection), number
    if rounds > 1 and run.rank.leads:
        run.record_rounds(shares, delivered)
    return tuned


def _link_weights(source: str, target: str) -> None:
    """Copy a file; weights are on disk once where the file system can. What people edit is never linked."""
    if source.endswith(".safetensors"):
        try:
            os.link(source, target)
            return
        except OSError:
            pass
    shutil.copy2(source, target)


def _check_labels(config: AdaptConfig, prompts: Prompts, inputs: Inputs) -> None:
    """Decode every labelled picture once before a run begins, and encode every sample if a length limit is set.

    Without a limit only the pictures of the most extreme sizes are encoded: processors refuse some.
    """
    from leaml_plugin.data import check_images

    extremes: dict[str, tuple[float, QA]] = {}

    def measure(record: QA, picture: Image) -> None:
        width, height = picture.size
        sizes = {"longest": max(width / height, height / width), "smallest": -min(width, height)}
        for name, value in sizes.items():
            if name not in extremes or value > extremes[name][0]:
                extremes[name] = value, record

    for records in (inputs.labels, inputs.questions):
        check_images(records, seen=measure)
    collator = _plain_collator(config, prompts, config.max_length or None)
    for _, record in extremes.values():
        collator.prompt_features(prompts.vqa(record))
    if config.max_length:
        turns = [turn for qa in inputs.labels for turn in (prompts.vqa(qa), prompts.generate_target(qa))]
        turns += [prompts.vqa(qa) for qa in inputs.questions]
        for turn in track(turns, "checking lengths", unit="sample"):
            collator.features(turn)


def _sort_out(config: AdaptConfig, inputs: Inputs) -> Inputs:
    """The inputs without the unlabelled pictures that cannot be used.

    Raises:
        LeamlError: no picture is left.
    """
    from leaml_plugin.data.images import sort_out

    bad, skipped = bytearray(), Spool(Skipped)
    for picture, why in sort_out(inputs.pictures, decoded=DECODED):
        bad.append(bool(why))
        if why:
            skipped.append(Skipped(picture.id, picture.images, why))
    reasons = skipped.finish()
    if not reasons:
        return inputs
    if len(reasons) == len(bad):
        raise LeamlError(
            f"{config.unlabeled}: none of the {len(bad)} pictures can be used; the first: {reasons[0].reason}"
        )
    usable = Chosen(inputs.pictures, (n for n, gone in enumerate(bad) if not gone))
    return dataclasses.replace(inputs, pictures=usable, skipped=reasons)


def _check_pictures(config: AdaptConfig, prompts: Prompts, inputs: Inputs) -> None:
    """Encode some of the unlabelled pictures: what all of them have in common is told before training.

    Raises:
        LeamlError: the processor refuses every one of them, or a caption is too long for the length limit.
    """
    count = len(inputs.pictures)
    if not count:
        return
    collator = _plain_collator(config, prompts, None)
    refused, accepted = None, False
    number = DECODED if config.max_length else 8
    for n in sorted({n * count // number for n in range(number)}):
        turn = prompts.caption(inputs.pictures[n])
        try:
            length = len(collator.features(turn) if turn.target else collator.prompt_features(turn))
        except LeamlError as error:
            refused = refused or error
            continue
        accepted = True
        if not config.max_length:
            break
        if length > config.max_length and turn.target:
            _plain_collator(config, prompts, config.max_length).features(turn)  # raises
    if refused is not None and not accepted:
        raise refused


def _plain_collator(config: AdaptConfig, prompts: Prompts, max_length: int | None) -> Collator:
    from leaml_plugin import models
    from leaml_plugin.data import Collator

    processor = models.load_processor(config.model, trust_remote_code=config.trust_remote_code)
    return Collator(processor, prompts, max_length=max_length)


def _keep_inputs(run: RunDirectory, inputs: Callable[[], Inputs]) -> None:
    """Copy the records into the run, so that later stages, other ranks and a report need nothing else."""
    stage = run.stage(INPUTS)
    if stage.done:
        return
    found = inputs()
    for name, records in (("labels", found.labels), ("pictures", found.pictures), ("questions", found.questions)):
        write_records(stage.file(f"{name}.jsonl"), records)
    write_records(stage.file("skipped.jsonl"), found.skipped)
    if found.skipped:
        write_records(run.skipped, found.skipped)
        print(
            f"leaml: warning: {len(found.skipped)} of {len(found.skipped) + len(found.pictures)} unlabelled pictures "
            f"cannot be used and are left out, the first: {found.skipped[0].reason} ({run.skipped} has all)",
            file=sys.stderr,
        )
    stage.finish()


def _kept_inputs(run: RunDirectory) -> Inputs:
    """What :func:`_keep_inputs` wrote."""
    stage = run.stage(INPUTS)
    labels, questions = (list(read_records(stage.file(f"{name}.jsonl"), QA)) for name in ("labels", "questions"))
    pictures = RecordFile(stage.file("pictures.jsonl"), Picture)
    return Inputs(labels, pictures, questions, RecordFile(stage.file("skipped.jsonl"), Skipped))


def _identity(config: AdaptConfig) -> dict[str, Any]:
    """The part of the configuration that decides the result: not where it goes, nor how servers are spoken to."""
    data = dataclasses.asdict(config)
    del data["output"], data["caption"]
    if config.caption.teacher:
        data["caption"] = config.caption.identity()
    data["generate"]["engine"] = config.generate.engine.identity(config.generate.backend)
    return data


def _fingerprints(
    config: AdaptConfig, inputs: Inputs, prompts_version: str, teacher_prompt_version: str
) -> dict[str, str]:
    """Hashes of what is read; a changed file is another run.

    Pictures enter with path and size, not content: hashing a hundred thousand of them would take longer than
    decoding them, and a picture that changed in place under an unchanged label file is not a case we defend against.
    """
    from leaml_plugin import models

    def row(record: Any) -> dict[str, Any]:
        data = to_json(record)
        data["bytes"] = [os.path.getsize(uri) if os.path.isfile(uri) else None for uri in data["images"]]
        return data

    def of(records: Sequence[Any]) -> str:
        return fingerprint_rows(map(row, records))

    found = {
        "labeled": of(inputs.labels),
        "unlabeled": of(inputs.pictures),
        "evaluation": of(inputs.questions),
        "prompts": prompts_version,
        "model": models.fingerprint(config.model),
    }
    if config.caption.teacher:
        found["teacher_prompt"] = teacher_prompt_version
    if config.caption.is_local:
        found["teacher"] = models.fingerprint(config.caption.path)
    return found
