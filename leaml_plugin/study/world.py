"""What a study reads of a world: the pool, the labels of a seed and a budget, the test questions, and the truth.

Covers records made from rendered scenes, splits by picture (for clips by scene group), and the image-blind baselines.
Does not cover drawing (``leaml_plugin.worlds``) or training.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from leaml_plugin.artifacts import fingerprint
from leaml_plugin.errors import LeamlError
from leaml_plugin.metrics import BlindMajority, BlindOptions, exact_match, normalise_question
from leaml_plugin.progress import track
from leaml_plugin.records import QA, Picture, PseudoQA
from leaml_plugin.study.packed import PictureStore
from leaml_plugin.worlds.blind import blind_scores
from leaml_plugin.worlds.scenes import NONE_OF_THE_ABOVE, Scene, WorldQA, render
from leaml_plugin.worlds.teacher import POOL, captions_file, load_captions

WORLD_SEED, POOL_START = POOL
TEST_START = 500_000  # as the pool's, an index that the worlds' answer balancing and gate do not draw from


def asked(qa: WorldQA) -> str:
    """The question as every method sees it: on one line, with the options behind it, without a request for the form.

    To multiple choice the answer is the text of the right option. One line, because what a generator writes is one
    line: pseudo-questions then look like the labelled ones.
    """
    return " ".join([qa.question, *(f"{letter}. {text}" for letter, text in qa.options.items())])


def records(scene: Scene, refs: tuple) -> list[QA]:
    """The scene's labelled questions."""
    return [
        QA(
            f"{scene.id}#{number}",
            refs,
            asked(qa),
            qa.reply,
            source=f"{scene.id} question {number}",
            meta={
                "template": qa.template,
                "question": qa.question,
                "options": dict(qa.options),
                "letter": qa.answer if qa.options else "",
                "level": qa.level,
            },
        )
        for number, qa in enumerate(scene.qas)
    ]


@dataclass(frozen=True)
class Labels:
    """The labelled questions of one budget and seed, and the pictures that are left without labels."""

    qas: list[QA]
    pictures: int
    unlabelled: list[Picture]


class World:
    """A world with a pool of ``pool`` pictures and a test set that shares no picture and no scene group with it.

    Args:
        store: keeps the frames.
        test_pictures, test_questions: test pictures, and the most questions of each that are asked.
    """

    def __init__(self, name: str, store: PictureStore, *, pool: int, test_pictures: int, test_questions: int):
        self.name = name
        scenes = [
            render(name, start + i, WORLD_SEED)
            for start, i in track(
                [(POOL_START, i) for i in range(pool)] + [(TEST_START, i) for i in range(test_pictures)],
                f"drawing {name}",
                unit="picture",
            )
        ]
        self._pool = [scene for scene in scenes[:pool] if scene.qas]
        self._qas: dict[str, list[QA]] = {}
        self._pictures: dict[str, Picture] = {}
        self._captions: dict[str, dict[str, str]] = {}
        self.test: list[QA] = []
        self._test_scenes: list[Scene] = []
        for number, scene in enumerate(scenes):
            refs = store.add(scene.id, scene.frames)
            qas = records(scene, refs)
            if number < pool:
                self._qas[scene.id] = qas
                self._pictures[scene.id] = Picture(scene.id, refs, scene.caption)
            else:
                chosen = sorted(random.Random(scene.id).sample(range(len(qas)), min(test_questions, len(qas))))
                self.test += [qas[i] for i in chosen]
                self._test_scenes.append(replace(scene, qas=tuple(scene.qas[i] for i in chosen)))
        if not self.test:
            raise LeamlError(f"the world {name!r} has no test questions; raise test_pictures.")

    @property
    def multiple_choice(self) -> bool:
        return bool(self.test[0].meta["options"])

    @cached_property
    def test_hash(self) -> str:
        """Names the test set: results whose hashes agree can be paired question by question."""
        return fingerprint([[qa.id, qa.question, qa.answer] for qa in self.test])

    def labels(self, fraction: float, seed: int) -> Labels:
        """The labels of a share of the pool's pictures, at least one picture. Budgets of one seed are nested."""
        if not 0 < fraction <= 1:
            raise LeamlError(f"the label budget is {fraction}; it is a share of the pictures, above 0 and at most 1.")
        order = [scene.id for scene in self._pool]
        random.Random(f"labels/{self.name}/{seed}").shuffle(order)
        count = max(1, round(fraction * len(order)))
        return Labels(
            [qa for name in order[:count] for qa in self._qas[name]],
            count,
            [self._pictures[name] for name in order[count:]],
        )

    def captioned(self, pictures: Sequence[Picture], directory: Path, teacher: str) -> list[Picture]:
        """The pictures with the captions that a larger teacher of ours wrote, from its files in ``directory``.

        Raises:
            LeamlError: the captions are missing, or were made for other pictures than this world's.
        """
        if teacher not in self._captions:
            self._captions[teacher] = load_captions(captions_file(directory, teacher, self.name), self._pool)
        return [replace(picture, caption=self._captions[teacher][picture.id]) for picture in pictures]

    def blind(self, labels: Sequence[QA]) -> list[bool]:
        """Whether the image-blind prediction learnt from ``labels`` is right, for each test question.

        For multiple choice the better of two predictors on these labels: the most frequent letter of a question, and
        the option that is right most often whenever it is offered.
        """
        majority = BlindMajority((qa.meta["question"], qa.meta["letter"] or qa.answer) for qa in labels)
        options = BlindOptions(
            (qa.meta["question"], qa.meta["options"], qa.meta["letter"]) for qa in labels if qa.meta["options"]
        )

        def by_letter(qa: QA) -> bool:
            return exact_match(majority.answer(qa.meta["question"]), qa.meta["letter"] or qa.answer)

        def by_text(qa: QA) -> bool:
            return options.answer(qa.meta["question"], qa.meta["options"]) == qa.meta["letter"]

        if not self.multiple_choice:
            return [by_letter(qa) for qa in self.test]
        rule = max((by_text, by_letter), key=lambda rule: sum(map(rule, labels)))
        return [rule(qa) for qa in self.test]

    @cached_property
    def oracle_blind(self) -> float:
        """The image-blind majority that knows the test answers: per question text the better of both predictors."""
        return blind_scores(self._test_scenes)["overall"]

    # -- diagnosis only: no method sees this ---------------------------------------------------------------------------

    @cached_property
    def _truth(self) -> dict[tuple[str, str], tuple[str, str]]:
        truth = {}
        for name, qas in self._qas.items():
            for qa in qas:
                text = qa.answer
                if text == NONE_OF_THE_ABOVE:  # does not tell the true text
                    continue
                truth[name, normalise_question(qa.meta["question"])] = (qa.meta["template"], text)
        return truth

    def right(self, pair: PseudoQA) -> bool | None:
        """Whether a pseudo-answer is right; ``None`` where the world does not ask this question of that picture.

        For multiple choice the answer is right if it is the option with the true text, or 'None of the above' where no
        option has that.
        """
        options, truth = self._asked(pair)
        return None if truth is None else _right(pair.answer, options, truth[1])

    def _asked(self, pair: PseudoQA) -> tuple[dict[str, str], tuple[str, str] | None]:
        """The options of a pair's question; and its template and true text, where the world asks it of that picture."""
        question, options = split_options(pair.question)
        return options, self._truth.get((pair.picture_id, normalise_question(question)))

    def told(self, what: str, pairs: Sequence[PseudoQA], pictures: Sequence[Picture]) -> list[QA]:
        """What a method with the truth at hand learns from in place of ``pairs`` about ``pictures``.

        Args:
            what: "filter": the right pairs; "answers": every pair that has a right answer, with that answer;
                "questions": all the world's questions about the pictures.
        """
        if what == "filter":
            return [pair.as_qa() for pair in pairs if self.right(pair)]
        if what == "questions":
            return [qa for picture in pictures for qa in self._qas[picture.id]]
        out = []
        for pair in pairs:
            options, truth = self._asked(pair)
            if truth is None:
                continue
            offered = list(options.values())
            answer = truth[1] if not options or truth[1] in offered else NONE_OF_THE_ABOVE
            if not options or answer in offered:
                out.append(replace(pair, answer=answer).as_qa())
        return out

    def pseudo_accuracy(self, pairs: Sequence[PseudoQA]) -> dict:
        """How many pseudo-answers are right, among the pairs whose question the world asks of that picture too."""
        hits: dict[str, list[bool]] = defaultdict(list)
        for pair in pairs:
            options, truth = self._asked(pair)
            if truth is not None:
                hits[truth[0]].append(_right(pair.answer, options, truth[1]))
        everything = [hit for some in hits.values() for hit in some]
        return {
            "pairs": len(pairs),
            "checked": len(everything),
            "accuracy": sum(everything) / len(everything) if everything else None,
            "by_template": {t: {"accuracy": sum(h) / len(h), "n": len(h)} for t, h in sorted(hits.items())},
            "questions": len({normalise_question(split_options(p.question)[0]) for p in pairs}),
            "commonest_answer": (Counter(p.answer for p in pairs).most_common(1)[0][1] / len(pairs) if pairs else None),
        }


def split_options(question: str) -> tuple[str, dict[str, str]]:
    """The bare question and the options that :func:`asked` put behind it."""
    bare, mark, rest = question.partition(" A. ")
    if not mark:
        return question, {}
    options, text = {}, rest
    for letter, following in zip("ABCD", "BCDE"):
        value, found, text = text.partition(f" {following}. ")
        options[letter] = value
        if not found:
            break
    return bare, options


def _right(answer: str, options: dict[str, str], truth: str) -> bool:
    if not options:
        return exact_match(answer, truth)
    chosen = next((text for text in options.values() if exact_match(answer, text)), "")
    if chosen == NONE_OF_THE_ABOVE:
        return all(text != truth for text in options.values())
    return bool(chosen) and exact_match(chosen, truth)
