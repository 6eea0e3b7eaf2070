"""What a picture of a world is, and the one door to all worlds: :func:`render`.

Covers the records, the words for positions and the multiple-choice prompt that all worlds share, and the generic
teacher, whose captions say what is seen in the general world's words and are wrong at documented rates.
Does not cover what the worlds look like or ask (``general``, ``endoscopy``, ``sports``, ``garden``).
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from leaml_plugin.errors import unknown_name
from leaml_plugin.worlds import WORLDS
from leaml_plugin.worlds.raster import CELL, COLORS, SHAPES, SIZES, UNIT
from leaml_plugin.worlds.rng import Rng

if TYPE_CHECKING:
    from PIL import Image

POSITIONS = (
    "upper-left", "upper-center", "upper-right",
    "center-left", "center", "center-right",
    "lower-left", "lower-center", "lower-right",
)  # fmt: skip
MOTIONS = ("left", "right", "up", "down")
LETTERS = "ABCD"
NONE_OF_THE_ABOVE = "None of the above"
LETTER_REQUEST = "Answer with the option's letter from the given choices directly."

# How often the teacher errs, in percent of the things in a picture: it overlooks one; it draws colour, size, position
# or shape by chance (now and then the true one comes out); it leaves out the texture (vague).
TEACHER_NOISE = {"overlooked": 5, "color": 5, "size": 8, "position": 4, "shape": 4, "vague": 10}


@dataclass(frozen=True)
class Thing:
    """One visible object in the general world's words. ``center`` in eighths of a pixel."""

    shape: str
    color: str
    size: str
    texture: str
    center: tuple[int, int]
    turn: int = 0

    @property
    def cell(self) -> int:
        x, y = (min(2, max(0, c // (UNIT * CELL))) for c in self.center)
        return y * 3 + x

    @property
    def position(self) -> str:
        return POSITIONS[self.cell]


@dataclass(frozen=True)
class WorldQA:
    """A question about a scene. ``kind`` is ``yesno``, ``count``, ``word``, ``set`` (joined by ``'; '``) or ``choice``.

    For ``choice`` the ``question`` is bare, ``options`` maps letters to texts and ``answer`` is a letter; a model is to
    reply with the text of that option: in a model this small, finding the letter of a text is learnt far later than
    finding the text.
    ``level`` is the difficulty level of SPORTU (Easy, Medium, Hard) where the world has one.
    """

    template: str
    question: str
    answer: str
    kind: str = "word"
    level: str = ""
    options: dict[str, str] = field(default_factory=dict)

    @property
    def prompt(self) -> str:
        """What a model is asked: the question, with its options below it."""
        return "\n".join([self.question, *(f"{letter}. {text}" for letter, text in self.options.items())])

    @property
    def reply(self) -> str:
        """What a model is to reply: the answer, for ``choice`` the text of the right option."""
        return self.options.get(self.answer, self.answer)


@dataclass(frozen=True)
class Scene:
    """One picture, or the frames of one clip in order, with all that is true of it."""

    world: str
    seed: int
    index: int
    frames: tuple[np.ndarray, ...]
    things: tuple[tuple[Thing, ...], ...]
    qas: tuple[WorldQA, ...]
    true_caption: str
    caption: str
    facts: dict = field(default_factory=dict)

    @property
    def id(self) -> str:
        return f"{self.world}-{self.seed}-{self.index:06d}"

    def images(self) -> list[Image.Image]:
        from PIL import Image

        return [Image.fromarray(frame) for frame in self.frames]


def render(world: str, index: int, seed: int = 0) -> Scene:
    """Picture number ``index`` of a world: the same bytes for the same arguments, everywhere.

    Raises :class:`LeamlError` for an unknown world.
    """
    if world not in WORLDS:
        raise unknown_name("world", world, WORLDS)
    return importlib.import_module(f"leaml_plugin.worlds.{world}").scene(index, seed)


def offer(
    rng: Rng, truth: str, wrong: list[str], *, letters: int = 4, none_percent: int = 25
) -> tuple[dict[str, str], str]:
    """Options in shuffled order and the right letter.

    With four letters the last option is 'None of the above' in half of the questions, and it is the right answer in
    ``none_percent`` percent of all; every letter is otherwise equally likely.
    """
    wrong = rng.shuffled([w for w in dict.fromkeys(wrong) if w != truth])
    if rng.chance(none_percent) and len(wrong) >= letters - 1:
        texts = [*wrong[: letters - 1], NONE_OF_THE_ABOVE]
        return dict(zip(LETTERS, texts)), LETTERS[letters - 1]
    with_none = rng.chance(40) or len(wrong) < letters - 1
    count = letters - 1 if with_none else letters
    texts = rng.shuffled([truth, *wrong[: count - 1]])
    answer = LETTERS[texts.index(truth)]
    if with_none:
        texts.append(NONE_OF_THE_ABOVE)
    return dict(zip(LETTERS, texts)), answer


def join(items: list[str]) -> str:
    """A ``'; '``-list without repetitions, or ``none``."""
    return "; ".join(dict.fromkeys(items)) or "none"


def phrase(thing: Thing, *, vague: bool = False) -> str:
    """``large striped red circle``."""
    texture = "" if thing.texture == "plain" or vague else f"{thing.texture} "
    return f"{thing.size} {texture}{thing.color} {thing.shape}"


def tell(things: list[tuple[Thing, bool, str]], ground: str) -> str:
    """A caption: every thing with what it does or where it is, then the background."""
    parts = []
    for thing, vague, does in things:
        text = phrase(thing, vague=vague)
        article = "an" if text[0] in "aeiou" else "a"
        parts.append(f"{article} {text} {does or 'at the ' + thing.position}")
    body = ", ".join(parts)
    return f"{body[0].upper() + body[1:]}. {ground}." if body else f"{ground}."


def teacher(rng: Rng, things: list[tuple[Thing, str]], ground: str) -> tuple[str, str]:
    """The true caption and the teacher's, for things paired with what they do (empty: they are still).

    Things come in reading order, what moves or changes first. The teacher errs at the rates of ``TEACHER_NOISE``,
    each drawn independently for each thing.
    """
    things = sorted(things, key=lambda pair: (not pair[1], pair[0].cell))
    noisy = []
    for thing, does in things:
        if rng.chance(TEACHER_NOISE["overlooked"]):
            continue
        if rng.chance(TEACHER_NOISE["color"]):
            thing = replace(thing, color=rng.choice(list(COLORS)))
        if rng.chance(TEACHER_NOISE["size"]):
            thing = replace(thing, size=rng.choice(SIZES))
        if rng.chance(TEACHER_NOISE["position"]):
            thing = replace(thing, center=tuple((rng.below(3) * CELL + CELL // 2) * UNIT for _ in range(2)))
        if rng.chance(TEACHER_NOISE["shape"]):
            thing = replace(thing, shape=rng.choice(SHAPES))
        noisy.append((thing, rng.chance(TEACHER_NOISE["vague"]), does))
    return tell([(t, False, d) for t, d in things], ground), tell(noisy, ground)
