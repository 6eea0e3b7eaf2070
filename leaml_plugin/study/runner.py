"""One run of the study, and many of them: a method on a world with a budget and a seed, written as one JSON file.

Covers the stages' configurations for every method, training and scoring in memory through the pipeline's own stages,
forgetting, and result files that are written whole or not at all; a study that is started again goes on where it was.
Does not cover tables and tests over results (``summary``) or the choice of learning rates (``tuning``).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import datetime
import functools
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from leaml_plugin import __version__
from leaml_plugin.artifacts import (
    StageDirectory,
    file_sha256,
    fingerprint,
    read_json,
    read_records,
    write_json,
)
from leaml_plugin.data.prompts import Prompts
from leaml_plugin.metrics import clustered_mean, exact_match, set_f1
from leaml_plugin.models import Loaded, target_linears
from leaml_plugin.records import QA, Prediction, PseudoQA
from leaml_plugin.selection import Selection, all_neurons
from leaml_plugin.stages import filter, finetune, generate, relevance, train_generator, verify
from leaml_plugin.study import packed
from leaml_plugin.study.protocol import METHODS, Method, Protocol, budget_of, learning_rate, vqa_mode, vqa_rate
from leaml_plugin.study.statistics import pack_bits
from leaml_plugin.study.world import Labels, World
from leaml_plugin.training import Objective, Stream, TrainConfig, train
from leaml_plugin.worlds.evaluate import HELD_OUT_SEED, accuracy
from leaml_plugin.worlds.general import CAPTION_PROMPTS
from leaml_plugin.worlds.packing import Encoder, logits, pack, token_losses
from leaml_plugin.worlds.scenes import render
from leaml_plugin.worlds.teacher import captions_file, require_captions

FORMAT = 1
CAPTIONS = Path("results/teacher")  # captions by larger teachers of ours, a folder each


@dataclasses.dataclass(frozen=True)
class JointConfig:
    """Labels and captions in one training: ``caption_batch`` captions beside each batch of questions."""

    train: TrainConfig
    mode: str
    caption_weight: float
    caption_batch: int
    lora_rank: int


def stage_configs(protocol: Protocol, method: str, seed: int, rate: float, finetune_rate: float) -> dict[str, Any]:
    """What each stage of a method is configured with. ``finetune_rate`` is the VQA model's where ``rate`` is the
    generator's."""
    spec = METHODS[method]

    def loop(steps: int, lr: float) -> TrainConfig:
        return TrainConfig(
            steps=steps,
            batch_size=protocol.batch,
            lr=lr,
            weight_decay=protocol.weight_decay,
            warmup=protocol.warmup,
            clip=protocol.clip,
            seed=seed,
            checkpoint_every=steps,
            autocast="bf16" if protocol.bf16 else "off",
        )

    out: dict[str, Any] = {}
    if spec.kind == "joint":
        out["joint"] = JointConfig(
            loop(protocol.steps, rate), spec.mode, protocol.captions, protocol.caption_batch, protocol.lora_rank
        )
    if spec.kind == "labels":
        lora = {"lora_rank": protocol.lora_rank, "lora_alpha": 2 * protocol.lora_rank}
        out["finetune"] = finetune.FinetuneConfig(
            train=loop(protocol.steps + spec.longer * protocol.generator_steps, rate),
            mode=spec.mode,
            targets=spec.targets,
            **lora,
        )
    if spec.kind == "pseudo":
        out["relevance"] = relevance.RelevanceConfig(
            criterion=protocol.criterion,
            loss=protocol.relevance_loss,
            density=protocol.density,
            batch_size=16,
            choice=spec.choice,
            seed=seed,
        )
        out["generator"] = train_generator.GeneratorConfig(
            train=loop(protocol.generator_steps, rate),
            caption_batch=protocol.caption_batch,
            caption_weight=protocol.captions if spec.distil else 0.0,
            qa_updates=protocol.generator_updates,
            qa_task=protocol.qa_task,
        )
        out["generate"] = generate.GenerateConfig(
            samples=protocol.samples,
            temperature=protocol.temperature,
            top_p=protocol.top_p,
            max_new_tokens=64,
            batch_size=256,
            shard_size=1 << 20,
            seed=seed,
            mix=protocol.mix,
        )
        out["verify"] = verify.VerifyConfig(
            round_trip=protocol.round_trip,
            blind=protocol.blind,
            caption=protocol.caption,
            batch_size=256,
            max_new_tokens=16,
        )
        out["filter"] = filter.FilterConfig(
            round_trip=protocol.round_trip,
            blind=protocol.blind,
            caption=protocol.caption,
            keep_share=protocol.keep_share,
            answer_share=protocol.answer_share,
            agreement=protocol.agreement,
            known_questions=protocol.known_questions,
            min_logprob=protocol.min_logprob,
        )
        out["finetune"] = finetune.FinetuneConfig(
            train=loop(protocol.steps, finetune_rate),
            mode=vqa_mode(protocol, method),
            pseudo_share=protocol.pseudo_share,
            lora_rank=protocol.lora_rank,
            lora_alpha=2 * protocol.lora_rank,
        )
    return out


def resolve(protocol: Protocol, method: str, seed: int, rate: float | None, finetune_rate: float | None) -> dict:
    """All that decides a run's result beside world, budget, seed and checkpoint, as plain data."""
    rate = learning_rate(method) if rate is None else rate
    finetune_rate = vqa_rate(protocol, method) if finetune_rate is None else finetune_rate
    configs = stage_configs(protocol, method, seed, rate, finetune_rate)
    names = ["pool", "test_pictures", "test_questions", "general_pictures"]
    if METHODS[method].kind == "pseudo":
        names += ["pseudo_pictures", *(["rounds"] if protocol.rounds > 1 else [])]
    return {
        "method": recorded("method", METHODS[method]),
        "data": {name: getattr(protocol, name) for name in names},
        "stages": {name: recorded(name, config) for name, config in configs.items()},
    }


#: The settings that results have recorded from the beginning. One that was added later is recorded, and tells settings
#: apart, only where it is not at its default: results from before it existed stay comparable.
_ALWAYS = {
    "method": {"choice", "distil", "every_label", "kind", "longer", "mode", "targets", "title", "vision"},
    "generate": {"batch_size", "max_new_tokens", "samples", "seed", "shard_size", "temperature", "top_p"},
    "generator": {"caption_batch", "caption_weight", "qa_task", "qa_updates", "qa_weight", "train"},
    "verify": {"batch_size", "blind", "max_new_tokens", "round_trip"},
    "filter": {
        "agreement", "answer_share", "blind", "keep_share", "known_questions", "length_slack", "min_logprob",
        "near_duplicate", "round_trip",
    },
    "finetune": {"lora_alpha", "lora_dropout", "lora_rank", "mode", "pseudo_share", "targets", "train"},
}  # fmt: skip


def recorded(stage: str, config: Any) -> dict[str, Any]:
    """A stage's configuration as results record it."""
    data = dataclasses.asdict(config)
    known = _ALWAYS.get(stage)
    if known is None:
        return data
    default = dataclasses.asdict(type(config)(*(data[f.name] for f in dataclasses.fields(config) if _required(f))))
    return {name: value for name, value in data.items() if name in known or value != default[name]}


def _required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


class Study:
    """The base checkpoint, the worlds and what they share, loaded once for many runs.

    Args:
        checkpoint: directory of the tiny Qwen2.5-VL.
        prompts: directory of the prompts it was trained on; ``None``: the worlds' own.
        captions: where the captions by larger teachers lie.
    """

    def __init__(self, protocol: Protocol, checkpoint: Path, prompts: Path | None = None, *, captions: Path = CAPTIONS):
        from leaml_plugin.worlds.files import prompts_path

        self.protocol = protocol
        self.captions = captions
        self.base = packed.load(checkpoint)
        self.checkpoint = checkpoint_hash(checkpoint)
        self.prompts = Prompts.load(prompts or prompts_path())
        self.encoder = Encoder(self.base.processor.tokenizer)
        self.store = packed.PictureStore()
        self._worlds: dict[str, World] = {}
        self._selections: dict[str, Selection] = {}
        self._pairs: dict[str, list[bytes]] = {}

    def world(self, name: str) -> World:
        if name not in self._worlds:
            p = self.protocol
            self._worlds[name] = World(
                name, self.store, pool=p.pool, test_pictures=p.test_pictures, test_questions=p.test_questions
            )
            self.store.compute_features(self.base.model.model.visual)
        return self._worlds[name]

    # -- one run -------------------------------------------------------------------------------------------------------

    def run(
        self,
        world: str,
        method: str,
        labels: float,
        seed: int,
        *,
        rate: float | None = None,
        finetune_rate: float | None = None,
    ) -> dict[str, Any]:
        """Train and score ``method``; returns the whole result as plain data.

        Args:
            labels: share of the pool's pictures that are labelled; not used by zero-shot and the upper bound.
            rate, finetune_rate: learning rates in place of the tuned ones.
        """
        start = time.monotonic()
        spec = METHODS[method]
        at = self.world(world)
        labels = budget_of(method, labels)
        budget = at.labels(labels, seed) if labels else Labels([], 0, [])
        if spec.teacher != "world":
            captioned = at.captioned(budget.unlabelled, self.captions, spec.teacher)
            budget = dataclasses.replace(budget, unlabelled=captioned)
        config = resolve(self.protocol, method, seed, rate, finetune_rate)
        result: dict[str, Any] = {
            **identity(self.checkpoint, world, method, labels, seed, config),
            "format": FORMAT,
            "config": config,
            "code": code_version(),
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
            "label_pictures": budget.pictures,
            "label_questions": len(budget.qas),
        }
        blind = at.blind(budget.qas)
        if spec.kind == "blind":
            marks, predictions = blind, None
            result["forgetting"] = None
        else:
            tuned, pseudo = self._adapt(at, spec, budget, seed, method, rate, finetune_rate)
            result["pseudo"] = pseudo
            result["train_seconds"] = round(time.monotonic() - start, 1)
            predictions = self._answer(tuned, at.test)
            marks = [p.correct for p in predictions]
            result["forgetting"] = self._forgetting(tuned)
        result["accuracy"] = sum(marks) / len(marks)
        clusters = [qa.images[0].uri for qa in at.test]
        result["interval"] = _interval(marks, clusters)
        if predictions is not None:
            result["set_f1"] = sum(set_f1(p.prediction, p.answer) for p in predictions) / len(predictions)
        result["blind"] = {"labels": sum(blind) / len(blind), "oracle": at.oracle_blind}
        result["by_template"] = _by_template(at.test, marks)
        pictures = {name: i for i, name in enumerate(dict.fromkeys(clusters))}
        result["questions"] = {
            "hash": at.test_hash,
            "count": len(marks),
            "pictures": [pictures[name] for name in clusters],
            "correct": pack_bits(marks),
        }
        result["seconds"] = round(time.monotonic() - start, 1)
        return result

    def _adapt(
        self,
        world: World,
        spec: Method,
        budget: Labels,
        seed: int,
        method: str,
        rate: float | None,
        finetune_rate: float | None,
    ) -> tuple[Loaded, dict | None]:
        """The tuned model, and the account of its pseudo-QA where it has some."""
        if spec.kind == "zero-shot":
            return self.base, None
        rate = learning_rate(method) if rate is None else rate
        finetune_rate = vqa_rate(self.protocol, method) if finetune_rate is None else finetune_rate
        configs = stage_configs(self.protocol, method, seed, rate, finetune_rate)
        with tempfile.TemporaryDirectory(prefix="leaml-study-") as folder:
            stages = Stages(Path(folder))
            tuned = self._copy(vision=spec.vision)
            common = {"collator": self._collator, "prompts": self.prompts, "labels": budget.qas}
            pseudo = None
            if spec.kind == "joint":
                self._joint(configs["joint"], tuned, budget, stages["joint"])
            elif spec.kind == "labels":
                selection = None
                if spec.mode == "selected":
                    selection = all_neurons(target_linears(tuned.model, spec.targets))
                finetune.run(configs["finetune"], stages["finetune"], load=lambda: tuned, selection=selection, **common)
            else:
                selection = self._select(configs["relevance"], world, budget, stages)
                # what the VQA model trains is the same for all ablations of the distillation
                own = selection
                if spec.choice != "relevance" and configs["finetune"].mode == "selected":
                    chosen = dataclasses.replace(configs["relevance"], choice="relevance")
                    own = self._select(chosen, world, budget, stages)
                for number in range(spec.rounds or self.protocol.rounds):
                    within = Stages(Path(folder) / f"round-{number + 1}")
                    before_it, tuned = tuned, self._copy(vision=spec.vision)
                    if number:
                        shards = self._write_pairs(configs, selection, budget, within, self._copy(before_it))
                    else:
                        shards = self._first_pairs(configs, selection, budget, within)
                    path, counts = filter.run(configs["filter"], within["filter"], shards=shards, labels=budget.qas)
                    pairs = list(read_records(path, PseudoQA))
                    taught = [pair.as_qa() for pair in pairs]
                    if spec.truth:
                        taught = world.told(spec.truth, pairs, budget.unlabelled[: self.protocol.pseudo_pictures])
                    before = [*pseudo.get("before", []), pseudo["accuracy"]] if pseudo else []
                    pseudo = {
                        "counts": counts,
                        **world.pseudo_accuracy(pairs),
                        **({"before": before} if before else {}),
                    }
                    finetune.run(
                        configs["finetune"],
                        within["finetune"],
                        load=functools.partial(lambda loaded: loaded, tuned),
                        pseudo=taught,
                        selection=own,
                        **common,
                    )
        return Loaded(tuned.model.eval(), tuned.processor, tuned.path), pseudo

    def _first_pairs(
        self, configs: Mapping[str, Any], selection: Selection, budget: Labels, stages: Stages
    ) -> list[Path]:
        """The shards of the first round. Methods that differ only in what follows share them: they are written once."""
        names = ("relevance", "generator", "generate", "verify")
        settings = [dataclasses.asdict(configs[name]) for name in names]
        key = fingerprint([settings, [dataclasses.asdict(one) for one in (*budget.qas, *budget.unlabelled)]])
        if key not in self._pairs:
            shards = self._write_pairs(configs, selection, budget, stages, self._copy())
            self._pairs[key] = [path.read_bytes() for path in shards]
            return shards
        copies = []
        for number, content in enumerate(self._pairs[key]):
            copies.append(stages["verify"].file(f"pairs-{number}.jsonl"))
            copies[-1].parent.mkdir(parents=True, exist_ok=True)
            copies[-1].write_bytes(content)
        return copies

    def _write_pairs(
        self, configs: Mapping[str, Any], selection: Selection, budget: Labels, stages: Stages, generator: Loaded
    ) -> list[Path]:
        """Train ``generator``, let it write about the first unlabelled pictures, and verify; returns the shards."""
        common: dict[str, Any] = {"collator": self._collator, "prompts": self.prompts}
        train_generator.run(
            configs["generator"],
            stages["generator"],
            load=lambda: generator,
            labels=budget.qas,
            pictures=budget.unlabelled,
            selection=selection,
            **common,
        )
        common["load"] = lambda: Loaded(generator.model.eval(), generator.processor, generator.path)
        pictures = budget.unlabelled[: self.protocol.pseudo_pictures]
        shards = generate.run(configs["generate"], stages["generate"], pictures=pictures, labels=budget.qas, **common)
        captions = {picture.id: picture.caption for picture in pictures if picture.caption}
        return verify.run(configs["verify"], stages["verify"], shards=shards, captions=lambda shard: captions, **common)

    def _select(self, config: relevance.RelevanceConfig, world: World, budget: Labels, stages: Stages) -> Selection:
        """The relevance stage; its scores depend on the labels alone and are kept for the next method."""
        if config.choice == "all":
            return all_neurons(target_linears(self.base.model, config.targets or None))
        key = fingerprint([world.name, [qa.id for qa in budget.qas], dataclasses.asdict(config)])
        if key not in self._selections:
            self._selections[key] = relevance.run(
                config,
                stages[f"relevance-{config.choice}"],
                load=self._copy,
                collator=self._collator,
                prompts=self.prompts,
                labels=budget.qas,
            )
        return self._selections[key]

    def _joint(self, config: JointConfig, tuned: Loaded, budget: Labels, stage: StageDirectory) -> None:
        captions = [turn for turn in map(self.prompts.caption, budget.unlabelled) if turn.target]
        settings = config.train
        model = tuned.model
        if config.mode == "lora":
            from peft import LoraConfig, get_peft_model

            torch.manual_seed(settings.seed)  # of the random A matrices, as in the finetune stage
            targets = list(target_linears(model))
            rank = config.lora_rank
            model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(
            parameters.values(),
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        questions = Stream("labels", [self.prompts.vqa(qa) for qa in budget.qas], settings.batch_size)
        objectives = [
            Objective("caption", [Stream("captions", captions, config.caption_batch)], config.caption_weight),
            Objective("vqa", [questions]),
        ]
        train(model, self._collator(tuned), objectives, parameters, optimizer, settings, stage, label="joint")

    # -- pseudo-QA and what it teaches, apart --------------------------------------------------------------------------

    def write(self, world: str, labels: float, seed: int) -> Written:
        """The pairs that LEAML's generator writes, with every second answer, unfiltered."""
        at = self.world(world)
        budget = at.labels(labels, seed)
        configs = stage_configs(self.protocol, "leaml", seed, learning_rate("leaml"), vqa_rate(self.protocol))
        configs["verify"] = dataclasses.replace(configs["verify"], round_trip=True, blind=True, caption=True)
        with tempfile.TemporaryDirectory(prefix="leaml-study-") as folder:
            stages = Stages(Path(folder))
            selection = self._select(configs["relevance"], at, budget, stages)
            shards = self._write_pairs(configs, selection, budget, stages, self._copy())
            pairs = [pair for path in shards for pair in read_records(path, PseudoQA)]
        return Written(at, budget, configs, selection, pairs)

    def taught(self, written: Written, kept: Sequence[PseudoQA]) -> list[Prediction]:
        """What a VQA model that learns from the labels and these pairs answers to the test questions."""
        tuned = self._copy()
        with tempfile.TemporaryDirectory(prefix="leaml-study-") as folder:
            finetune.run(
                written.configs["finetune"],
                Stages(Path(folder))["finetune"],
                load=lambda: tuned,
                collator=self._collator,
                prompts=self.prompts,
                labels=written.budget.qas,
                pseudo=[pair.as_qa() for pair in kept],
                selection=written.selection,
            )
        return self._answer(Loaded(tuned.model.eval(), tuned.processor, tuned.path), written.world.test)

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _copy(self, tuned: Loaded | None = None, *, vision: bool = False) -> Loaded:
        """A fresh copy of the base checkpoint, or of a tuned one with its adapter merged.

        Without ``vision`` its vision side is frozen and never run.
        """
        model = copy.deepcopy(self.base.model)
        if tuned is not None:
            from peft.tuners.tuners_utils import BaseTunerLayer

            other = copy.deepcopy(tuned.model)
            for module in other.modules():
                if isinstance(module, BaseTunerLayer):
                    module.merge()
            weights = {name.replace(".base_layer.", "."): value for name, value in other.state_dict().items()}
            model.load_state_dict({name: weights[name] for name in model.state_dict()})
        model.live_vision = vision
        model.model.visual.requires_grad_(vision)
        return Loaded(model, self.base.processor, self.base.path)

    def _collator(self, loaded: Loaded) -> packed.PackedCollator:
        return packed.PackedCollator(loaded, self.store, self.prompts, self.encoder)

    def _answer(self, tuned: Loaded, questions: Sequence[QA]) -> list[Prediction]:
        from leaml_plugin.inference import generate as write

        turns = [dataclasses.replace(self.prompts.vqa(qa), target=None) for qa in questions]
        texts = write(
            tuned, turns, collator=self._collator(tuned), batch_size=256, max_new_tokens=16, label="answering"
        )
        return [
            Prediction(qa.id, qa.question, qa.answer, out.text, exact_match(out.text, qa.answer))
            for qa, out in zip(questions, texts, strict=True)
        ]

    @functools.cached_property
    def _general(self) -> list[Any]:
        return [render("general", i, HELD_OUT_SEED) for i in range(self.protocol.general_pictures)]

    @functools.cached_property
    def _skill_before(self) -> dict[str, float]:
        return self._skill(self.base)

    @torch.inference_mode()
    def _skill(self, loaded: Loaded) -> dict[str, float]:
        """Question answering (share right) and caption loss (nats a token) on held-out general pictures."""
        model = loaded.model
        right = accuracy(model, self.encoder, self._general)["overall"]
        total, tokens = 0.0, 0
        for start in range(0, len(self._general), 25):
            some = self._general[start : start + 25]
            batch = pack(self.encoder, [(s.frames, [(CAPTION_PROMPTS[0], s.true_caption)]) for s in some])
            losses = token_losses(logits(model, batch)[0], batch)
            total, tokens = total + float(losses.sum()), tokens + losses.numel()
        return {"qa": right, "caption_loss": total / tokens}

    def _forgetting(self, tuned: Loaded) -> dict[str, Any]:
        before = self._skill_before
        after = before if tuned is self.base else self._skill(tuned)
        return {
            "before": before,
            "after": after,
            "qa_points": 100 * (before["qa"] - after["qa"]),
            "caption_loss": after["caption_loss"] - before["caption_loss"],
        }


@dataclasses.dataclass(frozen=True)
class Written:
    """The unfiltered pairs of one budget and seed, and what they were made with."""

    world: World
    budget: Labels
    configs: Mapping[str, Any]
    selection: Selection
    pairs: list[PseudoQA]


class Stages:
    """Fresh stage directories under a folder that is thrown away; the weights stay in memory."""

    def __init__(self, folder: Path):
        self._folder = folder

    def __getitem__(self, name: str) -> StageDirectory:
        return StageDirectory(self._folder / name, "study")


def _interval(marks: Sequence[bool], clusters: Sequence[str]) -> list[float]:
    estimate = clustered_mean([float(m) for m in marks], clusters)
    return [estimate.low, estimate.high]


def _by_template(questions: Sequence[QA], marks: Sequence[bool]) -> dict[str, dict[str, float]]:
    groups: dict[str, list[bool]] = defaultdict(list)
    for qa, mark in zip(questions, marks):
        groups[qa.meta["template"]].append(mark)
    return {name: {"accuracy": sum(m) / len(m), "n": len(m)} for name, m in sorted(groups.items())}


# -- many runs -------------------------------------------------------------------------------------------------------


def checkpoint_hash(directory: Path) -> str:
    """SHA-256 of the weights: what a result names as its checkpoint."""
    return file_sha256(Path(directory) / "model.safetensors")


def identity(checkpoint: str, world: str, method: str, labels: float, seed: int, config: Mapping) -> dict[str, Any]:
    """What names a run. ``setting`` is a hash of its configuration without the seed: equal settings are averaged."""
    return {
        "checkpoint": checkpoint,
        "world": world,
        "method": method,
        "labels": labels,
        "seed": seed,
        "setting": fingerprint(_without_seed(config))[:10],
    }


def _without_seed(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {k: _without_seed(v) for k, v in data.items() if k not in ("seed", "title")}
    return data


def result_path(directory: Path, name: Mapping[str, Any]) -> Path:
    """Where the result of a run lies: ``<checkpoint>/<world>/<method>-<labels>-<seed>-<setting>.json``."""
    file = f"{name['method']}-{name['labels']:g}-{name['seed']}-{name['setting']}.json"
    return directory / name["checkpoint"][:8] / name["world"] / file


@dataclasses.dataclass(frozen=True)
class Job:
    """One run to do; ``labels`` as :func:`budget_of` gives it, and rates that are ``None`` are the tuned ones."""

    world: str
    method: str
    labels: float
    seed: int
    rate: float | None = None
    finetune_rate: float | None = None


def run_all(
    study: Study, jobs: Iterable[Job], directory: Path, *, stop_after: float = float("inf")
) -> tuple[list[Path], int]:
    """Do the jobs whose result is not there yet; returns the result files of all jobs done, and how many are left.

    A result is written once it is complete, atomically; no job is begun after ``stop_after`` seconds.

    Raises:
        LeamlError: a job's captions are missing; nothing is run then.
    """
    start = time.monotonic()
    planned = []
    for job in jobs:
        config = resolve(study.protocol, job.method, job.seed, job.rate, job.finetune_rate)
        path = result_path(directory, identity(study.checkpoint, job.world, job.method, job.labels, job.seed, config))
        if METHODS[job.method].teacher != "world" and not path.exists():
            require_captions(captions_file(study.captions, METHODS[job.method].teacher, job.world))
        planned.append((job, path))
    paths, left = [], 0
    for number, (job, path) in enumerate(planned, 1):
        if not path.exists():
            if time.monotonic() - start > stop_after:
                left += 1
                continue
            result = study.run(**dataclasses.asdict(job))
            write_json(path, result)
            forgot = result["forgetting"]
            print(
                f"{number}/{len(planned)} {job.world} {job.method} labels {job.labels:g} seed {job.seed}"
                + (f" lr {job.rate:g}" if job.rate is not None else "")
                + f": accuracy {100 * result['accuracy']:.1f}"
                + (f", forgot {forgot['qa_points']:.1f}" if forgot else "")
                + (f", pseudo {_percent(result['pseudo']['accuracy'])}" if result.get("pseudo") else "")
                + f" ({result['seconds']:.0f} s)",
                file=sys.stderr,
                flush=True,
            )
        paths.append(path)
    return paths, left


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


@functools.cache
def code_version() -> dict[str, Any]:
    """The package's version, the hash of its sources, and the commit where the package lies in a git checkout."""
    root = Path(__file__).resolve().parents[1]
    sources = {str(p.relative_to(root)): file_sha256(p) for p in sorted(root.rglob("*.py"))}
    commit = None
    with contextlib.suppress(OSError, subprocess.SubprocessError):  # an installed package is no checkout
        commit = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
    return {"version": __version__, "commit": commit, "sources": fingerprint(sources), "torch": torch.__version__}


def load_results(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Results from files, in the order of their names."""
    return [read_json(path) for path in sorted(paths)]
