"""Run directories as the pipeline leaves them, written through the real classes: no model is needed for a report."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

from PIL import Image, ImageDraw

from leaml_plugin.artifacts import RunDirectory, StepLog, write_json, write_records
from leaml_plugin.metrics import exact_match
from leaml_plugin.records import QA, ImageRef, Picture, Prediction, PseudoQA
from leaml_plugin.stages import evaluate, filter
from leaml_plugin.teachers import Caption

QUESTIONS = {
    "Is there a polyp in the image?": ["yes", "no"],
    "How many instruments are in the image?": ["0", "1", "2", "3"],
    "What type of polyp is present?": ["none", "paris ip", "paris is", "paris iia"],
    "What color is the abnormality? If more than one separate with ;": ["pink", "red", "white", "pink; red"],
    "Where in the image is the abnormality?": ["center", "upper-left", "lower-right"],
    "Are there any anatomical landmarks in the image? Check all that are present.": ["none", "z-line", "cecum; ileum"],
}
MARKUP = "<script>alert('x')</script><img src=x onerror=alert(1)> \u2028 </script><!-- {{ 7*7 }} & \"quoted\""
LAYERS = [f"model.language_model.layers.{i}" for i in range(4)]
KINDS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"]


def paint(path: Path, seed: int, size: tuple[int, int] = (96, 96)) -> Path:
    rng = random.Random(seed)
    picture = Image.new("RGB", size, (150 + rng.randrange(60), 70 + rng.randrange(50), 60 + rng.randrange(40)))
    draw = ImageDraw.Draw(picture)
    for _ in range(3):
        x, y, r = rng.randrange(size[0]), rng.randrange(size[1]), 6 + rng.randrange(size[0] // 4)
        draw.ellipse((x - r, y - r, x + r, y + r), fill=tuple(90 + rng.randrange(150) for _ in range(3)))
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    return path


def write_log(stage, names, steps=120, seed=0):
    log, rng = StepLog(stage.file("log.jsonl"), 0), random.Random(seed)
    for step in range(steps):
        losses = {n: (3 + i) * 0.97**step + 0.3 + rng.random() * 0.2 for i, n in enumerate(names)}
        log.append({"step": step, "lr": 1e-4, "grad_norm": 1 + rng.random(), **losses})
    log.close()


class MakeRun:
    """``make_run(name, ...)`` writes a run directory and returns it."""

    def __init__(self, root: Path):
        self.root = root

    def __call__(
        self,
        name: str = "run",
        *,
        pictures: int = 40,
        samples: int = 4,
        distinct: int = 40,
        labels: int = 60,
        questions: int = 90,
        layers=LAYERS,
        markup: bool = True,
        missing: bool = True,
        stages=("inputs", "relevance", "train_generator", "generate", "filter", "finetune", "evaluate"),
        skill: float = 0.5,
    ) -> RunDirectory:
        world, rng = random.Random("world"), random.Random(name)  # one world, other pseudo-labels in every run
        files = [paint(self.root / "images" / f"img_{i:04d}.png", i) for i in range(min(distinct, pictures))]

        def ref(i: int) -> tuple[ImageRef, ...]:
            return (ImageRef(str(files[i % len(files)])),)

        def ask(id_: str, images) -> QA:
            question = world.choice(list(QUESTIONS))
            answers = QUESTIONS[question]
            return QA(id_, images, question, world.choices(answers, [4, 2, 1, 1][: len(answers)])[0])

        config = {
            "model": str(self.root / "models" / "tiny-qwen"),
            "labeled": str(self.root / "train.jsonl"),
            "unlabeled": str(self.root / "images"),
            "method": "leaml",
            "relevance": {
                "criterion": "taylor", "granularity": "row", "density": 0.1, "scope": "model", "choice": "relevance",
            },
            "finetune": {"mode": "selected", "train": {"steps": 120, "betas": [0.9, 0.999]}},
        }  # fmt: skip
        run = RunDirectory.open(self.root / name, config, {"labeled": "ab" * 32, "model": "cd" * 32})
        known = [ask(f"label-{i}", ref(i)) for i in range(labels)]
        test = [ask(f"test-{i}", ref(i // 3)) for i in range(questions)]
        pool = [
            Picture(f"img_{i:05d}", ref(i), f"A pinkish round area, number {i}, with a bright spot.")
            for i in range(pictures)
        ]
        if markup:
            pool[0] = dataclasses.replace(pool[0], caption=MARKUP)
        if missing and pictures > 1:
            gone = (ImageRef(str(self.root / "images" / "gone.png")),)
            pool[1] = dataclasses.replace(pool[1], images=gone)
        if pictures > 2:
            pool[2] = dataclasses.replace(pool[2], images=ref(2) + ref(3) + ref(4))
        pairs = [self._pair(rng, picture, n, known) for picture in pool for n in range(samples)]
        if markup:
            pairs[0] = dataclasses.replace(pairs[0], question=MARKUP, answer=MARKUP, text=MARKUP, logprob=-0.25)
            pairs[2] = dataclasses.replace(pairs[2], question="", answer="", text=f"no pair here {MARKUP}")

        for stage in [run.stage(s) for s in stages]:
            getattr(self, "_" + stage.path.name)(stage, run, rng, known, test, pool, pairs, layers, skill)
            stage.finish()
        return run

    @staticmethod
    def _pair(rng, picture, n, known) -> PseudoQA:
        qa = rng.choice(known)
        kind = rng.random()
        question, answer = qa.question, rng.choice(QUESTIONS[qa.question])
        if kind < 0.06:
            question, answer = "", ""
        elif kind < 0.1:
            answer = "cannot be determined"
        elif kind < 0.13:
            answer = "a very long answer " * 10
        text = f"Question: {question}\nAnswer: {answer}" if question else "The picture shows a round thing and"
        checks = {"round_trip": rng.choice([answer, "otherwise"]), "blind": "no"} if question and n == 1 else {}
        return PseudoQA(picture.id, picture.images, n, text, question, answer, -rng.random() * 2, checks)

    @staticmethod
    def _inputs(stage, run, rng, known, test, pool, pairs, layers, skill):
        write_records(stage.file("labels.jsonl"), known)
        write_records(stage.file("pictures.jsonl"), pool)
        write_records(stage.file("questions.jsonl"), test)

    @staticmethod
    def _caption(stage, run, rng, known, test, pool, pairs, layers, skill):
        meta = {"teacher": "http://127.0.0.1:8000/v1", "model": "big", "prompt": "teacher-1-62bd965c"}
        refused = {5, 30}  # on the first page, and on one that the script draws
        said = [
            Caption(p.id, None, "refused", MARKUP, meta) if n in refused else Caption(p.id, p.caption, meta=meta)
            for n, p in enumerate(pool)
        ]
        write_records(stage.shard(0), said)
        write_records(
            stage.file("pictures.jsonl"), [dataclasses.replace(p, caption=c.caption) for p, c in zip(pool, said)]
        )

    @staticmethod
    def _relevance(stage, run, rng, known, test, pool, pairs, layers, skill):
        def matrix(top):
            return [
                [rng.random() * top if (i + k) % 7 else None for k in range(len(KINDS))] for i in range(len(layers))
            ]

        heat = {"layers": list(layers), "kinds": KINDS, "share": matrix(0.4)}
        write_json(stage.file("heatmap.json"), {**heat, "relevance": matrix(0.1), "captured": matrix(0.9)})
        names = ["taylor", "taylor_abs", "fisher", "random"]
        jaccard = [[1.0 if i == k else 0.6 / (1 + abs(i - k)) for k in range(4)] for i in range(4)]
        write_json(stage.file("overlap.json"), {"names": names, "jaccard": jaccard, "chance": 0.0526})

    @staticmethod
    def _train_generator(stage, run, rng, known, test, pool, pairs, layers, skill):
        write_log(stage, ["caption", "qa"])

    @staticmethod
    def _generate(stage, run, rng, known, test, pool, pairs, layers, skill):
        size = max(1, len(pairs) // 3)
        for index, i in enumerate(range(0, len(pairs), size)):
            write_records(stage.shard(index), pairs[i : i + size])

    @staticmethod
    def _filter(stage, run, rng, known, test, pool, pairs, layers, skill):
        filter.run(
            filter.FilterConfig(length_slack=3.0, round_trip=False),
            stage,
            shards=run.stage("generate").shards(),
            labels=known,
        )

    @staticmethod
    def _finetune(stage, run, rng, known, test, pool, pairs, layers, skill):
        write_log(stage, ["vqa"], seed=1)

    @staticmethod
    def _evaluate(stage, run, rng, known, test, pool, pairs, layers, skill):
        def said(qa):
            return qa.answer if rng.random() < skill else rng.choice(QUESTIONS[qa.question])

        predictions = [
            Prediction(qa.id, qa.question, qa.answer, text, exact_match(text, qa.answer))
            for qa in test
            for text in [said(qa)]
        ]
        write_records(stage.file("predictions.jsonl"), predictions)
        write_json(stage.file("metrics.json"), evaluate.summarise(test, predictions, known))
