"""The garden world: a third out-of-distribution world, on which learning rates are tuned and no result is reported.

Covers still pictures of beds with insects, fruit and tools, and a handful of templates of every answer kind.
"""

from __future__ import annotations

from leaml_plugin.worlds import raster
from leaml_plugin.worlds.balance import choose
from leaml_plugin.worlds.general import place
from leaml_plugin.worlds.raster import COLORS, RADIUS, SIZES
from leaml_plugin.worlds.rng import Rng
from leaml_plugin.worlds.scenes import POSITIONS, Scene, Thing, WorldQA, join, teacher

INSECTS = {"circle": "ladybird", "triangle": "moth", "bar": "caterpillar"}
PLANTS = {"star": "dahlia", "ring": "marigold", "crescent": "bean pod"}
TOOLS = {"cross": "trellis", "square": "seed tray", "diamond": "trowel"}
HEALTH = {"plain": "healthy", "striped": "mildew", "dotted": "rust", "checked": "blight"}
GROWTH = dict(zip(SIZES, ("seedling", "juvenile", "mature", "overgrown")))
BEDS = {
    "raised bed": ((110, 78, 50), "lined", "Lined brown background"),
    "lawn": ((96, 150, 70), "speckled", "Speckled green background"),
    "greenhouse": ((168, 176, 168), "tiled", "Tiled gray background"),
}


def scene(index: int, seed: int) -> Scene:
    """One picture with up to eight questions."""
    rng = Rng("garden", seed, index)
    bed = rng.choice(list(BEDS))
    color, pattern, ground = BEDS[bed]
    cells = rng.shuffled(range(9))
    palette = [c for c in COLORS if raster.distance(COLORS[c], color) > 9000]
    groups = []
    for kinds, weights in ((INSECTS, (3, 4, 3, 2)), (PLANTS, (2, 5, 3)), (TOOLS, (4, 4, 1))):
        group = []
        for _ in range(rng.weighted(range(len(weights)), weights)):
            size = rng.choice(SIZES)
            texture = "plain" if kinds is not PLANTS or size == "tiny" else rng.choice(list(HEALTH))
            hue = rng.choice(palette)
            group.append(Thing(rng.choice(list(kinds)), hue, size, texture, place(rng, cells.pop(), size)))
        groups.append(group)
    insects, plants, tools = groups
    canvas = raster.background(rng, raster.jitter(rng, color), pattern, strength=26)
    for t in [*plants, *tools, *insects]:
        rgb = raster.jitter(rng, COLORS[t.color])
        raster.draw(canvas, t.shape, (t.center[0] + 14, t.center[1] + 14), RADIUS[t.size], (20, 30, 10), alpha=35)
        turn = rng.below(24) if t.shape in ("bar", "crescent") else 0
        raster.draw(canvas, t.shape, t.center, RADIUS[t.size], rgb, t.texture, turn=turn, shading=30)
    raster.grain(rng, canvas, 5)
    seen = [*insects, *plants, *tools]
    true_caption, caption = teacher(rng, [(t, "") for t in seen], ground)
    names = {**INSECTS, **PLANTS, **TOOLS}

    def listed(things: list[Thing]) -> str:
        return join([n for s, n in names.items() if s in {t.shape for t in things}])

    def where(things: list[Thing]) -> str:
        return join([POSITIONS[c] for c in sorted({t.cell for t in things})])

    qas = [
        WorldQA("pests", "Which pests are in the picture? Check all that are present.", listed(insects), "set"),
        WorldQA("plants", "Which plants are growing? Check all that are present.", listed(plants), "set"),
        WorldQA("equipment", "Which equipment is lying there? Check all that are present.", listed(tools), "set"),
        WorldQA("infestation", "How many pests are in the picture?", str(len(insects)), "count"),
        WorldQA("spray", "Should the bed be sprayed?", "yes" if insects else "no", "yesno"),
        WorldQA("bed", "What kind of bed is this?", bed, "word"),
        WorldQA("where-pest", "Where in the bed is the pest?", where(insects), "set"),
        WorldQA("where-tool", "Where in the bed is the equipment?", where(tools), "set"),
    ]
    if len(plants) == 1:
        plant = plants[0]
        qas.append(WorldQA("growth", "What is the growth stage of the plant?", GROWTH[plant.size]))
        qas.append(WorldQA("bloom", "What color does the plant have?", plant.color))
        if plant.size != "tiny":
            qas.append(WorldQA("health", "What is the health of the plant?", HEALTH[plant.texture]))
    return Scene(
        "garden", seed, index, (raster.finish(canvas),), (tuple(seen),), tuple(choose(rng, "garden", qas, 8)),
        true_caption, caption, {"bed": bed},
    )  # fmt: skip
