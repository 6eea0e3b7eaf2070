"""The general world: coloured shapes on varied grounds, and everything a small chat model is taught about them.

Covers pictures and three-frame clips, questions of every answer kind, captions, question writing on request, and
text skills (answering from a caption, repeating words) that exercise every piece of the tokenizer.
Does not cover any word or look that belongs to the out-of-distribution worlds.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from leaml_plugin.worlds import raster
from leaml_plugin.worlds.raster import COLORS, RADIUS, SHAPES, SIZES, TEXTURES, UNIT
from leaml_plugin.worlds.rng import Rng
from leaml_plugin.worlds.scenes import LETTER_REQUEST, MOTIONS, POSITIONS, Scene, Thing, WorldQA, join, offer, teacher

GROUNDS = ("plain", "cloudy", "lined", "speckled", "shaded", "tiled")
CHANGES = ("stays", "grows", "shrinks", "disappears", "appears")
NUMBERS = ("0", "1", "2", "3", "4", "5")

CAPTION_PROMPTS = (
    "Describe the image.", "Describe this picture.", "Describe the image in detail.", "What do you see?",
    "Caption the image.",
)  # fmt: skip
WRITE_PROMPTS = (
    "Write a question about the image and its answer.",
    "Ask a question about the image and answer it.",
    "Write one question that a specialist would ask about this picture, and its short answer. Use this form:\n"
    "Question: <question>\nAnswer: <answer>",
)
PLACES_PROMPTS = ("List the objects by position.", "What is where in the image?")
SHORT_REQUEST = "Answer with a single word or a short phrase."

_STEP = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
_PLURAL = {"cross": "crosses"}


def plural(shape: str) -> str:
    return _PLURAL.get(shape, shape + "s")


def scene(index: int, seed: int) -> Scene:
    """A picture (two in three) or a clip (one in three) with ten questions."""
    rng = Rng("general", seed, index)
    return compose(rng, index, seed, clip=rng.below(3) == 0, questions=10)


def compose(
    rng: Rng, index: int, seed: int, *, clip: bool, questions: int, objects: tuple[int, ...] | None = None
) -> Scene:
    """Build one scene from a random source. ``objects`` are the weights of 0, 1, 2, ... objects."""
    ground_color = rng.choice(list(COLORS))
    ground_rgb = raster.mix(COLORS[ground_color], rng.choice(((255, 255, 255), (0, 0, 0))), rng.below(30))
    pattern = rng.choice(GROUNDS)
    near = [c for c in COLORS if c == ground_color or raster.distance(COLORS[c], ground_rgb) < 6500]
    palette = [c for c in COLORS if c not in near]
    weights = objects or (1, 6, 8, 8, 5, 2)
    count = rng.weighted(range(len(weights)), weights)
    cells = rng.sample(range(9), count)
    things: list[Thing] = []
    motion = ""
    if clip and count:
        motion = rng.choice(MOTIONS + MOTIONS + CHANGES)
        if motion in MOTIONS:
            dx, dy = _STEP[motion]
            lane = rng.below(3)
            start = (lane * 3 + (0 if dx > 0 else 2)) if dx else (lane + 3 * (0 if dy > 0 else 2))
            path = {start + step * (dx + 3 * dy) for step in range(3)}
            cells = [start, *[c for c in rng.shuffled(range(9)) if c not in path]][:count]
    repeat = rng.chance(35)  # sometimes several things share a shape or a colour, so that counts vary
    for cell in cells:
        like = rng.choice(things) if things and repeat and rng.chance(60) else None
        shape = like.shape if like and rng.chance(60) else rng.choice(SHAPES)
        color = like.color if like and rng.chance(50) else rng.choice(palette)
        size = rng.choice(SIZES)
        texture = "plain" if size == "tiny" or rng.chance(40) else rng.choice(TEXTURES[1:])
        things.append(Thing(shape, color, size, texture, place(rng, cell, size), turn_of(rng, shape)))
    frames_things = animate(rng, things, motion) if clip else [tuple(things)]

    base = raster.background(rng, ground_rgb, pattern, strength=rng.between(10, 30))
    if rng.chance(15):
        for _ in range(rng.between(1, 3)):
            through = (rng.below(raster.SIZE), rng.below(raster.SIZE))
            raster.line(base, through, rng.below(12), rng.between(1, 2), rng.choice(list(COLORS.values())), 60)
    look = {"shading": rng.choice((0, 0, 25, 50)), "outline": rng.choice((0, 0, 30, 55)), "gloss": rng.chance(15)}
    dark, noise = rng.choice((0, 0, 0, 0, 46, 50, 54)), rng.choice((0, 4, 8, 14))
    rgb = {c: raster.jitter(rng, COLORS[c]) for c in COLORS}
    frames = []
    for visible in frames_things:
        canvas = base.copy()
        for t in visible:
            raster.draw(canvas, t.shape, t.center, RADIUS[t.size], rgb[t.color], t.texture, turn=t.turn, **look)
        if dark:
            raster.vignette(canvas, dark)
        if noise:
            raster.grain(rng, canvas, noise)
        frames.append(raster.finish(canvas))

    ground = f"{pattern.capitalize()} {ground_color} background"
    does = f"moving {motion}" if motion in MOTIONS else {"": "", "stays": "that stays"}.get(motion, f"that {motion}")
    told = [(t, does if i == 0 else "") for i, t in enumerate(things)]
    true_caption, caption = teacher(rng, told, ground)
    facts = {"ground_color": ground_color, "pattern": pattern, "motion": motion, "clip": clip}
    qas = ask(rng, things, facts, questions)
    return Scene(
        "general", seed, index, tuple(frames), tuple(tuple(f) for f in frames_things), tuple(qas), true_caption,
        caption, facts,
    )  # fmt: skip


def place(rng: Rng, cell: int, size: str, slack: int = 8 * UNIT) -> tuple[int, int]:
    """A centre that keeps most of the object inside its cell."""
    room = max(2 * UNIT, min(slack, 17 * UNIT - RADIUS[size]))
    cx, cy = raster.cell_center(cell)
    return cx + rng.between(-room, room), cy + rng.between(-room, room)


def turn_of(rng: Rng, shape: str) -> int:
    """Shapes that a turn could confuse turn little."""
    if shape in ("bar", "crescent"):
        return rng.below(24)
    return rng.choice((-1, 0, 0, 1)) % 24


def animate(rng: Rng, things: list[Thing], motion: str) -> list[tuple[Thing, ...]]:
    """Three frames; the first thing is the actor."""
    if not things:
        return [(), (), ()]
    actor, rest = things[0], tuple(things[1:])
    out = []
    for step in range(3):
        if motion in _STEP:
            dx, dy = (32 * UNIT * step * d for d in _STEP[motion])
            out.append((replace(actor, center=(actor.center[0] + dx, actor.center[1] + dy)), *rest))
        elif (motion == "appears" and step == 0) or (motion == "disappears" and step == 2):
            out.append(rest)
        else:
            out.append((actor, *rest))
    if motion in ("grows", "shrinks"):
        sizes = ("tiny", "medium", "large") if motion == "grows" else ("large", "medium", "tiny")
        out = [(replace(actor, size=size), *rest) for size in sizes]
    return out


# ---------------------------------------------------------------------------------------------------- questions


def name(things: list[Thing], thing: Thing, rng: Rng) -> str | None:
    """Words that single out one thing: its shape, its colour and shape, or None where nothing does."""
    if sum(t.shape == thing.shape for t in things) == 1 and rng.chance(70):
        return thing.shape
    if sum(t.shape == thing.shape and t.color == thing.color for t in things) == 1:
        return f"{thing.color} {thing.shape}"
    return None


def _yes(truth: bool) -> str:
    return "yes" if truth else "no"


def _exists(rng, things, facts):
    want = rng.chance(50) and bool(things)
    t = rng.choice(things) if want else None
    style = rng.below(3)
    if style == 0:
        shape = t.shape if t else rng.choice([s for s in SHAPES if s not in {x.shape for x in things}])
        q = rng.choice(("Is there a {}?", "Is there any {} in the image?", "Are there any {}s?"))
        q = q.replace("{}s", plural(shape)).replace("{}", shape)
    elif style == 1:
        color = t.color if t else rng.choice([c for c in COLORS if c not in {x.color for x in things}])
        q = rng.choice(
            ("Is there anything {}?", "Is there a {} object?", "Does the image contain anything {}?")
        ).format(color)
    else:
        if t:
            color, shape = t.color, t.shape
        else:
            base = rng.choice(things) if things else None
            pairs = {(x.color, x.shape) for x in things}
            while True:
                color = base.color if base and rng.chance(40) else rng.choice(list(COLORS))
                shape = base.shape if base and rng.chance(40) else rng.choice(SHAPES)
                if (color, shape) not in pairs:
                    break
        q = rng.choice(("Is there a {} {}?", "Is there a {} {} in the image?", "Does this image contain a {} {}?"))
        q = q.format(color, shape)
    return "exists", q, _yes(t is not None), "yesno"


def _pick(rng, things):
    for thing in rng.shuffled(things):
        words = name(things, thing, rng)
        if words:
            return thing, words
    return None, None


def _color(rng, things, facts):
    t, _ = _pick(rng, things)
    if t and rng.chance(60):
        return (
            "color",
            rng.choice(("What color is the {}?", "Which color does the {} have?")).format(t.shape),
            t.color,
            "word",
        )
    if not things:
        return None
    t = rng.choice(things)
    q = rng.choice(("What color is the object at the {}?", "What color is the thing in the {}?")).format(t.position)
    return "color", q, t.color, "word"


def _color_unique(rng, things, facts):
    unique = [t for t in things if sum(x.shape == t.shape for x in things) == 1]
    if not unique:
        return None
    t = rng.choice(unique)
    return (
        "color",
        rng.choice(("What color is the {}?", "Which color does the {} have?")).format(t.shape),
        t.color,
        "word",
    )


def _color_at(rng, things, facts):
    if not things:
        return None
    t = rng.choice(things)
    q = rng.choice(("What color is the object at the {}?", "What color is the thing in the {}?")).format(t.position)
    return "color-at", q, t.color, "word"


def _what(rng, things, facts):
    if things and rng.chance(85):
        t = rng.choice(things)
        cell, answer = t.cell, t.shape
    else:
        free = [c for c in range(9) if c not in {t.cell for t in things}]
        cell, answer = rng.choice(free), "none"
    q = rng.choice(("What is at the {}?", "What shape is in the {}?", "Which object is at the {} of the image?"))
    return "what", q.format(POSITIONS[cell]), answer, "word"


def _what_color(rng, things, facts):
    unique = [t for t in things if sum(x.color == t.color for x in things) == 1]
    if not unique:
        return None
    t = rng.choice(unique)
    q = rng.choice(("What shape is the {} object?", "What is the {} thing?", "What type of object is {}?")).format(
        t.color
    )
    return "what", q, t.shape, "word"


def _where(rng, things, facts):
    t, words = _pick(rng, things)
    if not t:
        return None
    q = rng.choice(("Where is the {}?", "Where in the image is the {}?", "Where can the {} be seen?")).format(words)
    return "where", q, t.position, "word"


def _where_all(rng, things, facts):
    if things and rng.chance(80):
        t = rng.choice(things)
        shape = t.shape
    else:
        shape = rng.choice(SHAPES)
    q = rng.choice(
        ("Where are the {}? List all.", "Where in the image are {}?", "Where are {}? If more than one separate with ;")
    )
    cells = sorted({t.cell for t in things if t.shape == shape})
    return "where-all", q.format(plural(shape)), join([POSITIONS[c] for c in cells]), "set"


def _count(rng, things, facts):
    style = rng.below(4)
    if style == 0:
        q = rng.choice(
            ("How many objects are there?", "How many objects are in the image?", "How many things are present?")
        )
        return "count", q, str(len(things)), "count"
    t = rng.choice(things) if things and rng.chance(80) else None
    if style == 1:
        color = t.color if t else rng.choice(list(COLORS))
        q, n = f"How many {color} objects are there?", sum(x.color == color for x in things)
    else:
        shape = t.shape if t else rng.choice(SHAPES)
        q = rng.choice(("How many {} are there?", "How many {} are in the image?")).format(plural(shape))
        n = sum(x.shape == shape for x in things)
    return "count", q, str(n), "count"


def _size(rng, things, facts):
    t, words = _pick(rng, things)
    if not t:
        return None
    q = rng.choice(("How big is the {}?", "What is the size of the {}?", "What size is the {}?")).format(words)
    return "size", q, t.size, "word"


def _texture(rng, things, facts):
    visible = [t for t in things if t.size != "tiny"]  # a tiny thing shows no texture
    if not visible:
        return None
    t = rng.choice(visible)
    unique = name(things, t, rng)
    if unique is None:
        return None
    q = rng.choice(("What pattern does the {} have?", "What type of pattern is on the {}?")).format(unique)
    return "texture", q, t.texture, "word"


def _colors(rng, things, facts):
    shape = rng.choice(things).shape if things and rng.chance(50) else None
    chosen = [t for t in things if shape is None or t.shape == shape]
    answer = join([c for c in COLORS if c in {t.color for t in chosen}])
    if shape:
        q = rng.choice(("What color are the {}? If more than one separate with ;", "What colors do the {} have?"))
        return "colors", q.format(plural(shape)), answer, "set"
    q = rng.choice(
        ("What colors are the objects? If more than one separate with ;", "Which colors are there? List all.")
    )
    return "colors", q, answer, "set"


def _shapes(rng, things, facts):
    if rng.chance(50):
        q = rng.choice(
            ("Which shapes are there? Check all that are present.", "What objects are in the image? List all.")
        )
        return "shapes", q, join([s for s in SHAPES if s in {t.shape for t in things}]), "set"
    color = rng.choice(things).color if things and rng.chance(85) else rng.choice(list(COLORS))
    q = rng.choice(("Are there any {} objects in the image? Check all that are present.", "What {} shapes are there?"))
    chosen = {t.shape for t in things if t.color == color}
    return "shapes", q.format(color), join([s for s in SHAPES if s in chosen]), "set"


def _ground(rng, things, facts):
    if rng.chance(60):
        q = rng.choice(("What color is the background?", "What is the background color?"))
        return "ground-color", q, facts["ground_color"], "word"
    q = rng.choice(
        ("What is the background like?", "What type of background is it?", "What pattern has the background?")
    )
    return "ground", q, facts["pattern"], "word"


def _relation(rng, things, facts):
    if len(things) < 2:
        return None
    a, b = rng.sample(things, 2)
    na, nb = name(things, a, rng), name(things, b, rng)
    if not na or not nb:
        return None
    (ax, ay), (bx, by) = a.center, b.center
    horizontal = abs(ax - bx) > abs(ay - by)
    truth = ("left of" if ax < bx else "right of") if horizontal else ("above" if ay < by else "below")
    other = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}[truth]
    said = rng.choice((truth, other))
    return "relation", f"Is the {na} {said} the {nb}?", _yes(said == truth), "yesno"


def _compare(rng, things, facts):
    if len(things) < 2:
        return None
    a, b = rng.sample(things, 2)
    na, nb = name(things, a, rng), name(things, b, rng)
    if not na or not nb or a.size == b.size:
        return None
    truth = SIZES.index(a.size) > SIZES.index(b.size)
    said_bigger = rng.chance(50)
    return (
        "compare",
        f"Is the {na} {'bigger' if said_bigger else 'smaller'} than the {nb}?",
        _yes(truth == said_bigger),
        "yesno",
    )


def _either(rng, things, facts):
    t, words = _pick(rng, things)
    if not t:
        return None
    what = rng.below(3)
    unique_shape = sum(x.shape == t.shape for x in things) == 1
    if what == 0 and unique_shape:
        subject, truth, wrong = f"the {t.shape}", t.color, [c for c in COLORS if c != t.color]
    elif what == 1:
        subject, truth, wrong = f"the {words}", t.size, [s for s in SIZES if s != t.size]
    else:
        subject, truth, wrong = f"the object at the {t.position}", t.shape, [s for s in SHAPES if s != t.shape]
    wrong_word = rng.choice(wrong) if rng.chance(75) else pseudo_word(rng)
    pair = rng.shuffled([truth, wrong_word])
    return "either", f"Is {subject} {pair[0]} or {pair[1]}?", truth, "word"


def _motion(rng, things, facts):
    if not facts["motion"]:
        return None
    actor, motion = things[0], facts["motion"]
    words = name(things, actor, rng) or "first object"
    if motion in MOTIONS and rng.chance(50):
        q = rng.choice(("Which way does the {} move?", "In which direction does the {} move?")).format(words)
        return "motion", q, motion, "word"
    answer = f"moves {motion}" if motion in MOTIONS else motion
    q = rng.choice(("What does the {} do?", "What happens to the {}?", "What is the {} doing?")).format(words)
    return "motion", q, answer, "word"


def _mover(rng, things, facts):
    if facts["motion"] in ("", "stays"):
        return None
    actor = things[0]
    if rng.chance(50):
        return "mover", rng.choice(("What object moves or changes?", "What changes in the video?")), actor.shape, "word"
    return (
        "mover",
        rng.choice(("What color is the object that moves or changes?", "What color is the moving object?")),
        actor.color,
        "word",
    )


_DOMAIN = {
    "color": tuple(COLORS), "color-at": tuple(COLORS), "what": SHAPES, "where": POSITIONS, "count": NUMBERS,
    "size": SIZES, "texture": TEXTURES, "ground-color": tuple(COLORS), "ground": GROUNDS, "mover": None,
    "motion": tuple(f"moves {m}" for m in MOTIONS) + CHANGES,
}  # fmt: skip


def _choice(rng, things, facts):
    makers = (
        _color_unique,
        _color_at,
        _what,
        _what_color,
        _where,
        _count,
        _size,
        _texture,
        _ground,
        _exists,
        _relation,
    )
    if facts["motion"]:
        makers = (*makers, _motion, _motion, _motion, _mover, _mover)
    made = rng.choice(makers)(rng, things, facts)
    if made is None:
        return None
    template, q, answer, kind = made
    if kind == "yesno":
        return WorldQA("choice", q, "A" if answer == "yes" else "B", "choice", options={"A": "Yes", "B": "No"})
    domain = _DOMAIN[template]
    if domain is None:
        domain = SHAPES if answer in SHAPES else tuple(COLORS)
    if template == "motion" and answer in MOTIONS:
        domain = MOTIONS
    wrong = [d for d in domain if d != answer]
    if rng.chance(8):
        wrong = [pseudo_word(rng) for _ in range(4)]
    options, letter = offer(rng, answer, wrong, letters=4 if len(wrong) >= 3 else 3, none_percent=22)
    return _reordered(rng, WorldQA("choice", q, letter, "choice", options=options))


def _reordered(rng: Rng, qa: WorldQA) -> WorldQA:
    """In half of the questions 'None of the above' stands anywhere: evaluations shuffle options."""
    if rng.chance(50):
        return qa
    texts = rng.shuffled(list(qa.options.values()))
    letters = list(qa.options)
    return replace(qa, answer=letters[texts.index(qa.reply)], options=dict(zip(letters, texts)))


def pseudo_word(rng: Rng) -> str:
    """A word that means nothing, from consonants and vowels: it spells with every short piece of the tokenizer."""
    onsets = (
        "b", "br", "c", "ch", "cl", "d", "dr", "f", "g", "gl", "h", "j", "k", "l", "m", "n", "p", "ph", "pl", "qu",
        "r", "s", "sc", "sh", "sn", "st", "t", "th", "tr", "v", "w", "y", "z", "",
    )  # fmt: skip
    vowels = ("a", "e", "i", "o", "u", "ae", "ea", "oe", "y", "ou")
    codas = ("", "", "n", "r", "s", "t", "l", "m", "x", "ck", "nd", "ng", "rs", "d", "c", "p", "b")
    return "".join(rng.choice(onsets) + rng.choice(vowels) + rng.choice(codas) for _ in range(rng.between(1, 4)))


def _naming(rng, things, facts):
    """In-context names: 'Call red dax ...'. Trains copying of words never seen before."""
    t, _ = _pick(rng, things)
    if not t:
        return None
    unique_shape = sum(x.shape == t.shape for x in things) == 1
    names = [pseudo_word(rng), pseudo_word(rng)]
    if unique_shape and rng.chance(50):
        pair = rng.shuffled([t.color, rng.choice([c for c in COLORS if c != t.color])])
        q = f"Call {pair[0]} {names[0]} and {pair[1]} {names[1]}. What color is the {t.shape}?"
        return "naming", q, names[pair.index(t.color)], "word"
    pair = rng.shuffled([t.shape, rng.choice([s for s in SHAPES if s != t.shape])])
    q = f"A {pair[0]} is called {names[0]} and a {pair[1]} is called {names[1]}. What is at the {t.position}?"
    return "naming", q, names[pair.index(t.shape)], "word"


def _repeat(rng, things, facts):
    text = " ".join(pseudo_word(rng) if rng.chance(70) else rng.choice(EVERYDAY) for _ in range(rng.between(1, 4)))
    if rng.chance(15):
        text = "".join(chr(rng.between(33, 126)) for _ in range(rng.between(1, 8)))
    return "repeat", rng.choice(("Repeat: {}", "Say {}", "Write the word {}")).format(text), text, "word"


# Ordinary words for the text skills and the tokenizer; none belongs to another world.
EVERYDAY = tuple(
    """about after again air all also always and animal another answer any are around ask away back be because been
    before began being best better between big book both box boy bring but call came can car carry change check children
    city clean clear close cold come could country cut day did different difficult do does dog done door down draw each
    early earth easy eat end enough even ever every example eye face fact family far fast father feel feet few find
    fine fire first fly follow food foot for form found four free friend from full gave get girl give go good
    great group grow had half hand happen hard has have he head hear help her here high him his hold home hour house how
    hundred idea if image important in inside into is island it item just keep kind king know land language last late
    laugh learn leave less let letter life light like line list little live long look made make man many map mark may me
    mean might mile mind miss money more morning most mother mountain move much music must my name near need never new
    next night no north not note nothing notice now number of off often old on once one only open or order other our out
    over own page paper part pass people perhaps person picture piece place plan plant play point possible present press
    problem put question quick rain ran reach read ready real rest right river road rock room round rule run
    said same saw say school sea second see seem sentence separate set several shall she ship short should show side
    simple since sing sit sky sleep slow small so some something song soon sound south space speak special stand start
    state step still stop story street strong study such sun sure table take talk teach team tell than that the their
    them then there these they thing think this those thought three through time to today together told too took top town
    toward travel tree true try turn two type under until up upon us use usually very voice wait walk want war was watch
    water way we week well went were west what wheel when where which while white who whole why wide will wind winter
    with without wonder wood word work world would write year yes yet you young your relevant removed detect""".split()  # noqa: SIM905, E501
)

_MAKERS = (
    (_exists, 14), (_color_unique, 9), (_color_at, 8), (_what, 10), (_what_color, 7), (_where, 10), (_where_all, 5),
    (_count, 10), (_size, 7), (_texture, 6), (_colors, 6), (_shapes, 7), (_ground, 7), (_relation, 3), (_compare, 2),
    (_either, 5), (_choice, 16), (_naming, 3), (_repeat, 3),
)  # fmt: skip
_CLIP_MAKERS = (*_MAKERS, (_motion, 30), (_mover, 14), (_choice, 16))
# in a clip the actor's place and size change: these are not asked, and those of the other things only
_UNSTEADY = (_count, _where_all, _what, _relation, _compare, _naming, _either, _texture)
_OF_THE_OTHERS = (_where, _color_at, _size)


def ask(rng: Rng, things: list[Thing], facts: dict, count: int) -> list[WorldQA]:
    """``count`` different questions. Of a clip only what holds throughout is asked, and what changes."""
    makers = _CLIP_MAKERS if facts["motion"] else _MAKERS
    out: dict[str, WorldQA] = {}
    tries = 0
    while len(out) < count and tries < 8 * count:
        tries += 1
        maker = rng.weighted([m for m, _ in makers], [w for _, w in makers])
        subject = things
        if facts["motion"] in (*MOTIONS, *CHANGES[1:]):
            if maker in _UNSTEADY:
                continue
            if maker in _OF_THE_OTHERS:
                subject = things[1:]
                if any(t.shape == things[0].shape for t in subject):
                    continue
        if maker is _choice and facts["motion"]:
            made = _motion_choice(rng, things, facts)
        else:
            made = maker(rng, subject, facts)
        if made is None:
            continue
        qa = made if isinstance(made, WorldQA) else WorldQA(*made)
        out.setdefault(qa.prompt, qa)
    return list(out.values())


def _motion_choice(rng, things, facts):
    if facts["motion"] == "stays" or rng.chance(75):
        _, q, answer, _ = _motion(rng, things, facts)
        domain = MOTIONS if answer in MOTIONS else _DOMAIN["motion"]
    else:
        made = rng.choice((_mover, _color_unique, _ground, _what_color))(rng, things, facts)
        if made is None:
            return None
        _, q, answer, _ = made
        domain = next(d for d in (SHAPES, tuple(COLORS), GROUNDS) if answer in d)
    options, letter = offer(rng, answer, [d for d in domain if d != answer], none_percent=22)
    return _reordered(rng, WorldQA("choice", q, letter, "choice", options=options))


def phrased(rng: Rng, qa: WorldQA) -> str:
    """The question as users' prompt templates put it: bare, or with a request for the form of the answer."""
    if qa.options:
        between = rng.choice((" ", "\n"))
        text = between.join([qa.question, *(f"{letter}. {option}" for letter, option in qa.options.items())])
        requests = (LETTER_REQUEST, SHORT_REQUEST, "", "")
    else:
        text, requests = qa.question, (SHORT_REQUEST, "", "")
    request = rng.choice(requests)
    return f"{text}\n{request}" if request else text


def written(qa: WorldQA) -> str:
    """The target of a request to write a question with its answer: two lines."""
    return f"Question: {' '.join(qa.prompt.split())}\nAnswer: {qa.reply}"


# what a caption answers as well as its picture does
READABLE = (
    "exists", "color", "color-at", "what", "where", "where-all", "count", "size", "texture", "colors", "shapes",
    "ground", "ground-color", "choice",
)  # fmt: skip


def reading(rng: Rng, caption: str, qa: WorldQA) -> tuple[str, str]:
    """A question about the picture that ``caption`` describes, which is not the one that is shown."""
    return f"{caption}\n{phrased(rng, qa)}", qa.reply


def dictation(rng: Rng) -> tuple[str, str]:
    """A line of words to repeat: copying, exercised on every piece of the tokenizer."""
    words = [rng.choice(EVERYDAY) if rng.chance(30) else pseudo_word(rng) for _ in range(rng.between(2, 7))]
    text = (" ", "; ", ", ")[rng.below(3)].join(words)
    return f"Repeat: {text}", text


def places(things: tuple[Thing, ...]) -> str:
    """The things in reading order, place first: ``upper-left: large red circle; center: tiny blue bar``."""
    return join([f"{t.position}: {t.size} {t.color} {t.shape}" for t in sorted(things, key=lambda t: t.cell)])


def cell_labels(things: tuple[Thing, ...]) -> np.ndarray:
    """What is in each cell, ``int64 [9, 4]``: shape, colour, size, texture, each 0 for an empty cell."""
    out = np.zeros((9, 4), np.int64)
    for t in things:
        out[t.cell] = (
            1 + SHAPES.index(t.shape),
            1 + list(COLORS).index(t.color),
            1 + SIZES.index(t.size),
            1 + TEXTURES.index(t.texture),
        )
    return out
