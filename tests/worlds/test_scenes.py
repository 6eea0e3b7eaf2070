"""The worlds are the same everywhere, their answers true and flat, their terms apart from the general world's."""

from __future__ import annotations

import hashlib
import re
from collections import Counter

import numpy as np
import pytest

from leaml_plugin.errors import LeamlError
from leaml_plugin.worlds import WORLDS, render
from leaml_plugin.worlds.blind import blind_scores, none_share
from leaml_plugin.worlds.raster import COLORS, SHAPES
from leaml_plugin.worlds.rng import Rng
from leaml_plugin.worlds.scenes import NONE_OF_THE_ABOVE, POSITIONS, TEACHER_NOISE

PICTURES = 120


@pytest.fixture(scope="module")
def scenes():
    return {world: [render(world, i, 5) for i in range(PICTURES)] for world in WORLDS}


def digest(world: str) -> str:
    """Pixels, questions and captions of six pictures."""
    h = hashlib.sha256()
    for index in (0, 1, 2, 17, 999, 123456):
        scene = render(world, index, 3)
        for frame in scene.frames:
            h.update(frame.tobytes())
        h.update(repr([(q.prompt, q.answer) for q in scene.qas]).encode())
        h.update((scene.caption + scene.true_caption).encode())
    return h.hexdigest()[:16]


# These values must hold on every machine and with every version of numpy and Pillow. Change them only together with
# a world, and then pre-train anew: exports in users' caches and the shipped checkpoint go with them.
PINNED = {
    "general": "4238829c4fc35f95",
    "endoscopy": "1eb0f87b7bb38fca",
    "sports": "bd6d68daa96855a5",
    "garden": "6a864a22d9e48dc7",
}
RANDOM_DRAWS = [346, 837, 545, 998, 941]
RANDOM_PLANE = [[131, 91, 21], [137, 255, 113]]


@pytest.mark.parametrize("world", WORLDS)
def test_a_world_is_the_same_bytes_everywhere(world):
    assert digest(world) == PINNED[world]


def test_random_source_is_pinned():
    rng = Rng("a key", 7)
    assert [rng.below(1000) for _ in range(5)] == RANDOM_DRAWS
    assert Rng("a key", 7).plane(2, 3).tolist() == RANDOM_PLANE
    assert Rng("a key", 8).next() != Rng("a key", 7).next()


def test_pictures_differ_by_index_and_seed():
    frames = [render("endoscopy", i, s).frames[0].tobytes() for i, s in ((0, 0), (1, 0), (0, 1))]
    assert len(set(frames)) == 3


def test_frames_are_small_rgb_pictures(scenes):
    for world in WORLDS:
        for scene in scenes[world]:
            assert {f.shape for f in scene.frames} == {(96, 96, 3)} and scene.frames[0].dtype == np.uint8
            assert len(scene.frames) == (3 if world == "sports" else len(scene.frames))
    assert {len(s.frames) for s in scenes["general"]} == {1, 3}
    assert {len(s.frames) for s in scenes["endoscopy"]} == {1}


def test_unknown_world_is_one_sentence_with_a_suggestion():
    with pytest.raises(LeamlError, match="did you mean 'sports'"):
        render("sport", 0)


def test_questions_are_well_formed(scenes):
    for world in WORLDS:
        for scene in scenes[world]:
            assert len({q.prompt for q in scene.qas}) == len(scene.qas)
            for qa in scene.qas:
                assert qa.answer and qa.question
                if qa.kind == "choice":
                    assert qa.answer in qa.options and len(set(qa.options.values())) == len(qa.options)
                elif qa.kind == "yesno":
                    assert qa.answer in ("yes", "no", "not relevant")
                elif qa.kind == "count":
                    assert qa.answer.isdecimal()


def test_the_general_worlds_answers_agree_with_its_pictures(scenes):
    checked = 0
    for scene in scenes["general"]:
        things = scene.things[0]
        if scene.facts["motion"]:
            continue
        for qa in scene.qas:
            if qa.template == "count" and re.search(r"objects are (there|in)|things", qa.question):
                color = next((c for c in COLORS if f" {c} " in qa.question), None)
                assert int(qa.answer) == sum(color in (None, t.color) for t in things)
                checked += 1
            elif qa.template == "where":
                words = qa.question.split("the ")[-1].replace(" be seen", "").rstrip("?").split()
                found = [t for t in things if t.shape == words[-1] and (len(words) == 1 or t.color == words[0])]
                assert [t.position for t in found] == [qa.answer], qa
                checked += 1
            elif qa.template == "exists" and (match := re.search(r"contain an? (\w+) (\w+)\?", qa.question)):
                assert (qa.answer == "yes") == any((t.color, t.shape) == match.groups() for t in things)
                checked += 1
    assert checked > 50


def test_moving_things_are_where_their_frames_say(scenes):
    moved = 0
    for scene in scenes["general"]:
        if scene.facts["motion"] in ("left", "right"):
            first, last = scene.things[0][0].center[0], scene.things[2][0].center[0]
            assert (last > first) == (scene.facts["motion"] == "right")
            moved += 1
    assert moved > 3


def test_endoscopy_has_the_nineteen_templates_in_their_wording(scenes):
    asked = {q.template: q.question for s in scenes["endoscopy"] for q in s.qas}
    assert len(asked) == 19
    assert asked["instrument-count"] == "How many instrumnets are in the image?"  # so it stands in Kvasir-VQA
    assert asked["abnormalities"] == "Are there any abnormalities in the image? Check all that are present."
    kinds = Counter(q.kind for s in scenes["endoscopy"] for q in s.qas)
    assert set(kinds) == {"set", "yesno", "count", "word"}
    assert any("; " in q.answer for s in scenes["endoscopy"] for q in s.qas)


def test_sports_has_levels_and_none_of_the_above(scenes):
    qas = [q for s in scenes["sports"] for q in s.qas]
    assert {q.level for q in qas} == {"Easy", "Medium", "Hard"}
    assert {len(q.options) for q in qas} == {2, 4}
    assert 0.08 < none_share(scenes["sports"]) < 0.3
    offered = sum(NONE_OF_THE_ABOVE in q.options.values() for q in qas)
    right = sum(q.reply == NONE_OF_THE_ABOVE for q in qas)
    assert 0 < right < offered
    letters = Counter(q.answer for q in qas if len(q.options) == 4)
    assert max(letters.values()) / sum(letters.values()) < 0.35


@pytest.mark.parametrize("world", ["endoscopy", "sports", "garden"])
def test_answers_are_flat(scenes, world):
    blind = blind_scores(scenes[world])
    assert blind["overall"] < 0.42
    assert blind["questions"] > 4 * PICTURES
    for template, share in blind["templates"].items():
        assert share < 0.75, template


def test_the_general_world_never_says_a_term_of_another_world(scenes):
    from leaml_plugin.worlds import endoscopy, garden, sports
    from leaml_plugin.worlds.general import EVERYDAY

    terms = set()
    for table in (
        endoscopy.ABNORMALITIES, endoscopy.LANDMARKS, endoscopy.INSTRUMENTS, endoscopy.POLYP_TYPES,
        sports.VIOLATIONS, sports.DECISIONS, sports.ACTIONS, garden.INSECTS, garden.PLANTS, garden.TOOLS, garden.HEALTH,
    ):  # fmt: skip
        terms |= set(table.values())
    terms |= set(endoscopy.PROCEDURES) | set(sports.COURTS) | {"goalkeeper", "referee", "jersey", "abnormality"}
    general = [t for s in scenes["general"] for q in s.qas for t in (q.prompt, q.answer)]
    text = " ".join([*general, *(s.true_caption for s in scenes["general"]), *EVERYDAY]).lower()
    words = set(re.findall(r"[a-z-]+", text))
    assert not {t for t in terms if (t in words if " " not in t else t in text)}


def test_teacher_captions_are_generic_and_wrong_at_the_documented_rates(scenes):
    words = """a an at the that tiny small medium large striped dotted checked plain background cloudy lined speckled
        shaded tiled moving left right up down grows shrinks appears disappears stays"""
    allowed = {w.lower() for w in (*SHAPES, *COLORS, *POSITIONS, *words.split())}
    for world in ("endoscopy", "sports", "garden"):
        for scene in scenes[world]:
            assert set(re.findall(r"[a-z-]+", scene.caption.lower())) <= allowed, scene.caption


def test_the_teacher_errs_at_the_documented_rates(scenes):
    many = scenes["endoscopy"] + scenes["garden"]
    rate = {k: v / 100 for k, v in TEACHER_NOISE.items()}
    seen = (1 - rate["color"] * 10 / 11) * (1 - rate["size"] * 3 / 4) * (1 - rate["position"] * 8 / 9)
    seen *= (1 - rate["shape"] * 8 / 9) * (1 - rate["overlooked"])
    clean = [
        seen ** len(s.things[0]) * (1 - rate["vague"]) ** sum(t.texture != "plain" for t in s.things[0]) for s in many
    ]
    wrong = sum(s.caption != s.true_caption for s in many) / len(many)
    assert abs(wrong - (1 - sum(clean) / len(clean))) < 0.1


def test_terms_stand_for_one_look_each():
    from leaml_plugin.worlds import endoscopy, garden, sports

    assert {*endoscopy.ABNORMALITIES, *endoscopy.LANDMARKS, *endoscopy.INSTRUMENTS} == set(SHAPES)
    assert {*garden.INSECTS, *garden.PLANTS, *garden.TOOLS} == set(SHAPES)
    assert {*sports.VIOLATIONS, sports.PLAYER, sports.KEEPER, sports.BALL, sports.GOAL, sports.STICK} == set(SHAPES)
