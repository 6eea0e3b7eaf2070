"""The endoscopy world: mucosa-like pictures under the nineteen question templates of Kvasir-VQA.

The templates' wording and answer kinds are those of the real data set (``SimulaMet-HOST/Kvasir-VQA``, typing errors
included); the pictures are drawings in which every finding, landmark and instrument has one of the nine shapes of the
general world, in another look: shaded and glossy on folded mucosa, seen through a round lens.
Does not cover medicine: nothing learnt here says anything about real endoscopy.
"""

from __future__ import annotations

from leaml_plugin.worlds import raster
from leaml_plugin.worlds.balance import choose
from leaml_plugin.worlds.general import place
from leaml_plugin.worlds.raster import COLORS, RADIUS, SIZES, UNIT
from leaml_plugin.worlds.rng import Rng
from leaml_plugin.worlds.scenes import POSITIONS, Scene, Thing, WorldQA, join, teacher

ABNORMALITIES = {"circle": "polyp", "star": "oesophagitis", "cross": "ulcerative colitis"}
LANDMARKS = {"bar": "z-line", "ring": "pylorus", "triangle": "cecum"}
INSTRUMENTS = {"diamond": "biopsy forceps", "square": "metal clip", "crescent": "polyp snare"}
POLYP_TYPES = {"plain": "paris is", "striped": "paris ip", "dotted": "paris iia"}
POLYP_SIZES = dict(zip(SIZES, ("<5mm", "5-10mm", "11-20mm", ">20mm")))
# procedure -> (mucosa colour, pattern), and how the general world would call the ground
PROCEDURES = {
    "colonoscopy": ((214, 128, 138), "cloudy", "Cloudy pink background"),
    "gastroscopy": ((204, 128, 62), "lined", "Lined orange background"),
    "capsule endoscopy": ((92, 74, 44), "cloudy", "Cloudy brown background"),
}
DYE = "blue"  # a dyed polyp is one that has been removed
FINDING_COLORS = ("red", "white", "yellow", "purple")
LANDMARK_COLORS = ("white", "red", "green", "black")
INSTRUMENT_COLORS = ("gray", "white", "black")


def scene(index: int, seed: int) -> Scene:
    """One picture with up to eight questions."""
    rng = Rng("endoscopy", seed, index)
    procedure = rng.choice(list(PROCEDURES))
    color, pattern, ground = PROCEDURES[procedure]
    boxed, texted = rng.chance(50), rng.chance(50)
    cells = rng.shuffled([c for c in range(9) if not (boxed and c == 6) and not (texted and c == 0)])
    abnormal = rng.weighted(range(4), (4, 5, 4, 2))
    landmarks = rng.weighted(range(3), (3, 4, 1))
    instruments = rng.weighted(range(3), (3, 3, 2))
    removed = rng.chance(50)
    main = rng.choice(("circle", "circle", *ABNORMALITIES))
    findings, marks, tools = [], [], []
    for _ in range(abnormal):
        shape = main if rng.chance(65) else rng.choice(list(ABNORMALITIES))
        size = rng.choice(SIZES)
        texture = "plain" if shape != "circle" or size == "tiny" else rng.choice(list(POLYP_TYPES))
        dyed = shape == "circle" and (removed or rng.chance(20))
        findings.append(_thing(rng, shape, DYE if dyed else rng.choice(FINDING_COLORS), size, texture, cells.pop()))
    for shape in rng.sample(list(LANDMARKS), landmarks):
        hue = rng.choice(LANDMARK_COLORS)
        marks.append(_thing(rng, shape, hue, rng.choice(("medium", "large")), "plain", cells.pop()))
    for shape in rng.sample(list(INSTRUMENTS), instruments):
        hue = rng.choice(INSTRUMENT_COLORS)
        tools.append(_thing(rng, shape, hue, rng.choice(("medium", "large")), "plain", cells.pop()))

    canvas = raster.background(rng, raster.jitter(rng, color, 12), pattern, strength=rng.between(14, 26), period=14)
    for _ in range(rng.between(1, 3)):  # folds
        center = (rng.below(96), rng.below(96))
        raster.circle_line(canvas, center, rng.between(24, 60), 3, raster.mix(color, (0, 0, 0), 45), 40)
    for t in [*marks, *findings, *tools]:
        rgb = raster.mix(raster.jitter(rng, COLORS[t.color], 10), color, 12)  # the mucosa shines through
        turn = rng.below(24) if t.shape in ("bar", "crescent") else rng.choice((23, 0, 1))
        metal = t in tools
        raster.draw(
            canvas, t.shape, t.center, RADIUS[t.size], rgb, t.texture,
            turn=turn, shading=20 if metal else 45, outline=35 if metal else 0,
            gloss=not metal and t.texture == "plain",
        )  # fmt: skip
    for _ in range(rng.between(0, 3)):  # reflections of the lamp
        raster.draw(canvas, "circle", (rng.between(160, 600), rng.between(160, 600)), 10, (255, 255, 250), alpha=80)
    raster.vignette(canvas, rng.between(54, 58), hardness=12)
    seen = [*findings, *marks, *tools]
    box_color = "green"
    if boxed:
        box_color = rng.choice(("green", "black"))
        rgb = (30, 190, 70) if box_color == "green" else (6, 6, 6)
        raster.draw(canvas, "square", (11 * UNIT, 84 * UNIT), 13 * UNIT, rgb)
        raster.draw(canvas, "circle", (11 * UNIT, 84 * UNIT), 3 * UNIT, (230, 230, 230))
        seen.append(Thing("square", box_color, "large", "plain", (11 * UNIT, 84 * UNIT)))
    if texted:
        for row in range(3):
            for column in range(rng.between(3, 5)):
                canvas[4 + row * 6 : 7 + row * 6, 3 + column * 5 : 6 + column * 5] = 235
        seen.append(Thing("square", "white", "medium", "dotted", (12 * UNIT, 12 * UNIT)))
    raster.grain(rng, canvas, rng.between(2, 8))
    true_caption, caption = teacher(rng, [(t, "") for t in seen], ground)
    facts = {"procedure": procedure, "box": boxed, "text": texted}
    qas = choose(rng, "endoscopy", questions(findings, marks, tools, facts), 8)
    return Scene(
        "endoscopy", seed, index, (raster.finish(canvas),), (tuple(seen),), tuple(qas), true_caption, caption, facts
    )


def _thing(rng: Rng, shape: str, color: str, size: str, texture: str, cell: int) -> Thing:
    return Thing(shape, color, size, texture, place(rng, cell, size, slack=7 * UNIT))


def _yes(truth: bool) -> str:
    return "yes" if truth else "no"


def _where(things: list[Thing]) -> str:
    return join([POSITIONS[c] for c in sorted({t.cell for t in things})])


def _hues(things: list[Thing]) -> str:
    return join([c for c in COLORS if c in {t.color for t in things}])


def questions(findings: list[Thing], marks: list[Thing], tools: list[Thing], facts: dict) -> list[WorldQA]:
    """All nineteen templates that apply to a picture, with their answers."""
    polyps = [t for t in findings if t.shape == "circle"]
    names = [n for s, n in ABNORMALITIES.items() if s in {t.shape for t in findings}]
    landmarks = [n for s, n in LANDMARKS.items() if s in {t.shape for t in marks}]
    instruments = [n for s, n in INSTRUMENTS.items() if s in {t.shape for t in tools}]
    removed = "not relevant" if not polyps else _yes(all(t.color == DYE for t in polyps))
    biggest = max(polyps, key=lambda t: SIZES.index(t.size)) if polyps else None
    present, colors = "in the image? Check all that are present.", "If more than one separate with ;"
    size = POLYP_SIZES[biggest.size] if biggest else "none"
    kind = POLYP_TYPES[biggest.texture] if biggest else "none"
    out = [
        WorldQA("abnormalities", f"Are there any abnormalities {present}", join(names), "set"),
        WorldQA("landmarks", f"Are there any anatomical landmarks {present}", join(landmarks), "set"),
        WorldQA("instruments", f"Are there any instruments {present}", join(instruments), "set"),
        WorldQA("removed", "Have all polyps been removed?", removed, "yesno"),
        WorldQA("findings", "How many findings are present?", str(len(findings)), "count"),
        WorldQA("polyps", "How many polyps are in the image?", str(len(polyps)), "count"),
        WorldQA("instrument-count", "How many instrumnets are in the image?", str(len(tools)), "count"),
        WorldQA("box", "Is there a green/black box artefact?", _yes(facts["box"]), "yesno"),
        WorldQA("text", "Is there text?", _yes(facts["text"]), "yesno"),
        WorldQA("any", "Does this image contain any finding?", _yes(bool(findings)), "yesno"),
        WorldQA("procedure", "What type of procedure is the image taken from?", facts["procedure"], "word"),
        WorldQA("where-abnormality", "Where in the image is the abnormality?", _where(findings), "set"),
        WorldQA("where-landmark", "Where in the image is the anatomical landmark?", _where(marks), "set"),
        WorldQA("where-instrument", "Where in the image is the instrument?", _where(tools), "set"),
        WorldQA("abnormality-color", f"What color is the abnormality? {colors}", _hues(findings), "set"),
        WorldQA("landmark-color", f"What color is the anatomical landmark? {colors}", _hues(marks), "set"),
        WorldQA("polyp-size", "What is the size of the polyp?", size, "word"),
        WorldQA("polyp-type", "What type of polyp is present?", kind, "word"),
    ]
    if findings:
        largest = max(SIZES.index(t.size) for t in findings)
        out.append(WorldQA("easy", "Is this finding easy to detect?", _yes(largest >= 2), "yesno"))
    # a texture shows from 'small' on: the type of a tiny polyp cannot be seen
    return [qa for qa in out if not (qa.template == "polyp-type" and biggest and biggest.size == "tiny")]
