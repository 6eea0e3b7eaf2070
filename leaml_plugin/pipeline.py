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
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leaml_plugin.artifacts import (
    RunDirectory,
    StageDirectory,
    atomic_directory,
    fingerprint,
    read_records,
    write_records,
)
from leaml_plugin.errors import LeamlError, unknown_name
from leaml_plugin.progress import track
from leaml_plugin.records import QA, Picture, PseudoQA, to_json
from leaml_plugin.stages import evaluate, filter, finetune, generate, relevance, train_generator, verify

if TYPE_CHECKING:
    from PIL.Image import Image

    from leaml_plugin.data import Collator, Prompts
    from leaml_plugin.models import Loaded
    from leaml_plugin.selection import Selection

METHODS = ("leaml", "labels")
PICTURE_CACHE = 1 << 30  # bytes of processed pictures that a stage keeps in memory


@dataclass(frozen=True)
class AdaptConfig:
    """One adaptation run.

    Attributes:
        model: directory or Hub id of an image-text-to-text model with processor and chat template.
        labeled: the labelled questions (JSONL, conversations, messages, or a Hugging Face dataset).
        output: run directory; an unfinished run of the same configuration found there is taken up.
        unlabeled: a directory of pictures, a file that lists pictures, or a dataset. Needed by "leaml".
        captions: the teacher's captions of the unlabelled pictures.
        evaluation: labelled questions on which the result is scored; may be left out.
        image_root: folder that relative picture paths start from; empty: the folder of the file that names them.
        method: "leaml", or "labels" for plain fine-tuning on the labels alone (the baseline).
        prompts: directory with prompt files that replace the built-in ones; empty: built-in.
        dtype: of the weights: "auto", "float32", "bfloat16" or "float16".
        device: "auto", "cpu", "cuda", "cuda:1", ...
        max_length: longest sample in tokens, picture tokens included; a longer one is an error. 0: as many as the
            model has positions for.
        trust_remote_code: run code that comes with the model. Off unless you trust its author.
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
                raise LeamlError(f"filter.{name} needs the second answers of verify.{name}; set that to true as well.")
        if self.verify.round_trip and self.generator.qa_task != "both":
            raise LeamlError('verify.round_trip asks the generator plain questions; set generator.qa_task="both".')
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
    """Everything a run reads beside the model, loaded and checked."""

    labels: Sequence[QA]
    pictures: Sequence[Picture]
    questions: Sequence[QA]


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
        if config.generator.caption_weight > 0 and not any(picture.caption for picture in pictures):
            raise LeamlError(
                f"{config.unlabeled}: no picture has a caption; give --captions, or turn caption distillation off with "
                "--caption-weight 0."
            )
    questions = load_labeled(config.evaluation, image_root=root) if config.evaluation else ()
    return Inputs(labels, pictures, questions)


class Adaptation:
    """One run, stage by stage; :func:`adapt` calls the methods in order.

        run = Adaptation(AdaptConfig(model=..., labeled=..., unlabeled=..., captions=..., output=...))
        selection = run.relevance()                  # which neurons matter for question answering
        generator = run.train_generator(selection)   # QA loss + caption distillation on those neurons
        shards = run.generate(generator)             # pseudo-QA for the unlabelled pictures
        shards = run.verify(generator, shards)       # second answers, where the configuration asks for them
        pairs = run.filter(shards)                   # what may teach
        tuned = run.finetune(pairs, selection)       # labels + pseudo-labels
        metrics = run.evaluate(tuned)

    Making the object reads and checks all input, so that bad input ends the run before it begins. A stage that is
    complete in the output directory returns what it wrote; one that was killed goes on.

    Raises:
        LeamlError: bad input or configuration; nothing is trained or written over then.
    """

    def __init__(self, config: AdaptConfig):
        from leaml_plugin import models
        from leaml_plugin.data import Prompts

        self.config = config
        self.prompts = Prompts.load(config.prompts or None)
        self.inputs = read_inputs(config)
        generate.steering(config.generate, self.inputs.labels)  # refuses a mix that is none
        models.check(config.model, dtype=config.dtype, device=config.device, trust_remote_code=config.trust_remote_code)
        self.directory = RunDirectory.open(
            config.output,
            _identity(config),
            _fingerprints(config, self.inputs, self.prompts.version),
            check=lambda: _check_samples(config, self.prompts, self.inputs),
        )
        _keep_inputs(self.directory, self.inputs)

    def load(self, weights: dict[str, Path] | None = None) -> Loaded:
        """The base model, or with ``weights`` what a training stage returned, with its processor."""
        from leaml_plugin import models

        c = self.config
        where = {"path": c.model, **(weights or {})}
        return models.load(**where, dtype=c.dtype, device=c.device, trust_remote_code=c.trust_remote_code)

    def collator(self, loaded: Loaded) -> Collator:
        from leaml_plugin.data import Collator
        from leaml_plugin.models import max_positions

        limit = self.config.max_length or max_positions(loaded.model)
        return Collator(loaded.processor, self.prompts, max_length=limit, cache_bytes=PICTURE_CACHE)

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
            **self._tools(),
        )

    def generate(self, generator: dict[str, Path]) -> list[Path]:
        return generate.run(
            self.config.generate,
            self._stage("generate"),
            pictures=self.inputs.pictures,
            labels=self.inputs.labels,
            **self._tools(generator),
        )

    def verify(self, generator: dict[str, Path], shards: Sequence[Path]) -> list[Path]:
        size = self.config.generate.shard_size

        def captions(shard: int) -> dict[str, str]:
            return {p.id: p.caption for p in self.inputs.pictures[shard * size : (shard + 1) * size] if p.caption}

        return verify.run(
            self.config.verify, self._stage("verify"), shards=shards, captions=captions, **self._tools(generator)
        )

    def filter(self, shards: Sequence[Path]) -> list[QA]:
        kept, counts = filter.run(self.config.filter, self._stage("filter"), shards=shards, labels=self.inputs.labels)
        if not counts["kept"]:
            why = ", ".join(f"{n} {reason}" for reason, n in counts.items() if n)
            print(
                f"leaml: warning: the filter kept no pseudo-QA pair ({why}); fine-tuning has the labels alone.",
                file=sys.stderr,
            )
        return [pair.as_qa() for pair in read_records(kept, PseudoQA)]

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

    def deliver(self, tuned: dict[str, Path]) -> dict[str, Path]:
        """Put the trained weights where users look for them: ``adapter/`` or ``model/`` of the run."""
        kind, source = ("adapter", tuned["adapter"]) if "adapter" in tuned else ("model", tuned["path"])
        target = self.directory.adapter if kind == "adapter" else self.directory.model
        if not target.exists():
            with atomic_directory(target) as temporary:
                shutil.copytree(source, temporary, copy_function=_link_weights, dirs_exist_ok=True)
        return {kind: target}

    def _stage(self, name: str) -> StageDirectory:
        return self.directory.stage(name)

    def _tools(self, weights: dict[str, Path] | None = None) -> dict[str, Any]:
        """What every stage that runs a model needs; the model is loaded only where there is work left."""
        return {"load": lambda: self.load(weights), "collator": self.collator, "prompts": self.prompts}


def adapt(config: AdaptConfig | None = None, **options: Any) -> AdaptResult:
    """Run every stage that is not complete yet; returns where the adapted model is.

    Takes an :class:`AdaptConfig` or its fields as keywords. Calling it again with the same configuration resumes a
    killed run and returns at once from a finished one.

    Raises:
        LeamlError: bad input or configuration, before anything is trained or written over.
    """
    if config is None:
        config = AdaptConfig(**options)
    elif options:
        config = dataclasses.replace(config, **options)
    run = Adaptation(config)
    selection = None
    if config.method == "leaml" or config.finetune.mode == "selected":
        selection = run.relevance()
    pairs: Sequence[QA] = ()
    if config.method == "leaml":
        generator = run.train_generator(selection)
        shards = run.verify(generator, run.generate(generator))
        pairs = run.filter(shards)
    tuned = run.finetune(pairs, selection)
    metrics = run.evaluate(tuned) if run.inputs.questions else {}
    return AdaptResult(config.output, run.deliver(tuned), metrics)


def _link_weights(source: str, target: str) -> None:
    """Copy a file; weights are on disk once where the file system can. What people edit is never linked."""
    if source.endswith(".safetensors"):
        try:
            os.link(source, target)
            return
        except OSError:
            pass
    shutil.copy2(source, target)


def _check_samples(config: AdaptConfig, prompts: Prompts, inputs: Inputs) -> None:
    """Decode every picture once before a run begins, and encode every sample if a length limit is set.

    Without a limit only the pictures of the most extreme sizes are encoded: processors refuse some.
    """
    from leaml_plugin import models
    from leaml_plugin.data import Collator, check_images

    extremes: dict[str, tuple[float, QA | Picture]] = {}

    def measure(record: QA | Picture, picture: Image) -> None:
        width, height = picture.size
        sizes = {"longest": max(width / height, height / width), "smallest": -min(width, height)}
        for name, value in sizes.items():
            if name not in extremes or value > extremes[name][0]:
                extremes[name] = value, record

    for records in (inputs.labels, inputs.pictures, inputs.questions):
        check_images(records, seen=measure)
    processor = models.load_processor(config.model, trust_remote_code=config.trust_remote_code)
    collator = Collator(processor, prompts, max_length=config.max_length or None)
    for _, record in extremes.values():
        collator.prompt_features(prompts.vqa(record) if isinstance(record, QA) else prompts.caption(record))
    if config.max_length:
        _check_lengths(collator, prompts, inputs)


def _check_lengths(collator: Collator, prompts: Prompts, inputs: Inputs) -> None:
    """Encode everything that will be trained on once, so that a sample that is too long is told before training."""
    turns = [turn for qa in inputs.labels for turn in (prompts.vqa(qa), prompts.generate_target(qa))]
    turns += [turn for turn in map(prompts.caption, inputs.pictures) if turn.target]
    turns += [prompts.vqa(qa) for qa in inputs.questions]
    for turn in track(turns, "checking lengths", unit="sample"):
        collator.features(turn)


def _keep_inputs(run: RunDirectory, inputs: Inputs) -> None:
    """Copy the records into the run, so that a report needs nothing else."""
    stage = run.stage("inputs")
    if not stage.done:
        write_records(stage.file("labels.jsonl"), inputs.labels)
        write_records(stage.file("pictures.jsonl"), inputs.pictures)
        write_records(stage.file("questions.jsonl"), inputs.questions)
        stage.finish()


def _identity(config: AdaptConfig) -> dict[str, Any]:
    """The part of the configuration that decides the result: everything but where the result goes."""
    data = dataclasses.asdict(config)
    del data["output"]
    return data


def _fingerprints(config: AdaptConfig, inputs: Inputs, prompts_version: str) -> dict[str, str]:
    """Hashes of what is read; a changed file is another run.

    Pictures enter with path and size, not content: hashing a hundred thousand of them would take longer than
    decoding them, and a picture that changed in place under an unchanged label file is not a case we defend against.
    """
    from leaml_plugin import models

    def of(records: Sequence[Any]) -> str:
        rows = []
        for record in records:
            row = to_json(record)
            row["bytes"] = [os.path.getsize(u) if os.path.isfile(u) else None for u in row["images"]]
            rows.append(row)
        return fingerprint(rows)

    return {
        "labeled": of(inputs.labels),
        "unlabeled": of(inputs.pictures),
        "evaluation": of(inputs.questions),
        "prompts": prompts_version,
        "model": models.fingerprint(config.model),
    }
