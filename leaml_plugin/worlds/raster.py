"""Drawing in integers on a 96x96 canvas: no floats, no fonts, no library whose next version draws differently.

Covers backgrounds, filled shapes with textures and shading, and a few strokes (lines, fake text).
Coordinates are in eighths of a pixel; every shape is sampled 2x2 a pixel, which softens its edge.
"""

from __future__ import annotations

import numpy as np

from leaml_plugin.worlds.rng import Rng

SIZE = 96
CELL = 32
UNIT = 8  # sub-units a pixel

SHAPES = ("circle", "square", "triangle", "cross", "ring", "star", "diamond", "bar", "crescent")
TEXTURES = ("plain", "striped", "dotted", "checked")
SIZES = ("tiny", "small", "medium", "large")
RADIUS = {"tiny": 6 * UNIT, "small": 8 * UNIT + 4, "medium": 11 * UNIT + 4, "large": 15 * UNIT}

COLORS = {
    "red": (212, 38, 38),
    "orange": (240, 138, 28),
    "yellow": (238, 218, 50),
    "green": (44, 160, 64),
    "blue": (44, 84, 214),
    "purple": (132, 52, 172),
    "pink": (242, 150, 190),
    "brown": (122, 76, 38),
    "gray": (138, 138, 138),
    "white": (240, 240, 240),
    "black": (24, 24, 24),
}

# cosine and sine of multiples of 15 degrees, times 256
_COS = (256, 247, 222, 181, 128, 66, 0, -66, -128, -181, -222, -247)
# unit normals of the five lines of a pentagram, times 1000 (one edge of the inner pentagon points down)
_STAR = ((0, 1000), (951, 309), (588, -809), (-588, -809), (-951, 309))


def cos_sin(turn: int) -> tuple[int, int]:
    """Cosine and sine of ``turn`` times 15 degrees, times 256."""
    turn %= 24
    cos = _COS[turn] if turn < 12 else -_COS[turn - 12]
    turn = (turn - 6) % 24
    sin = _COS[turn] if turn < 12 else -_COS[turn - 12]
    return cos, sin


def inside(shape: str, u: np.ndarray, v: np.ndarray, r: int) -> np.ndarray:
    """Which points ``(u, v)`` relative to the centre lie in ``shape`` of radius ``r``; y points down."""
    au, av = np.abs(u), np.abs(v)
    if shape == "circle":
        return u * u + v * v <= r * r
    if shape == "ring":
        d = u * u + v * v
        return (d <= r * r) & (100 * d >= 33 * r * r)
    if shape == "square":
        return 100 * np.maximum(au, av) <= 86 * r
    if shape == "triangle":
        return (100 * v <= 72 * r) & (100 * v >= 175 * au - 100 * r)
    if shape == "cross":
        return (np.maximum(au, av) <= r) & (100 * np.minimum(au, av) <= 32 * r)
    if shape == "star":
        lines = sum(((1000 * 34 * r >= 100 * (a * u + b * v)).astype(np.int32) for a, b in _STAR), np.int32(0))
        return (lines >= 4) & (u * u + v * v <= r * r + r * r // 8)
    if shape == "diamond":
        return 160 * au + 100 * av <= 112 * r
    if shape == "bar":
        return (100 * av <= 30 * r) & (100 * au <= 108 * r)
    if shape == "crescent":
        w = u - r * 50 // 100
        return (u * u + v * v <= r * r) & (100 * (w * w + v * v) >= 68 * r * r)
    raise ValueError(f"no shape {shape!r}; known are {', '.join(SHAPES)}")


def mix(a: tuple[int, int, int], b: tuple[int, int, int], percent: int) -> tuple[int, int, int]:
    """``a`` with ``percent`` of ``b``."""
    return tuple((x * (100 - percent) + y * percent) // 100 for x, y in zip(a, b, strict=True))  # type: ignore


def jitter(rng: Rng, color: tuple[int, int, int], spread: int = 14) -> tuple[int, int, int]:
    return tuple(min(255, max(0, c + rng.between(-spread, spread))) for c in color)  # type: ignore


def second_color(color: tuple[int, int, int]) -> tuple[int, int, int]:
    """The colour of a texture's other half: a dark one for light colours, a light one for dark colours."""
    light = color[0] * 30 + color[1] * 59 + color[2] * 11
    return mix(color, (0, 0, 0), 62) if light > 11000 else mix(color, (255, 255, 255), 68)


def smooth(rng: Rng, cells: int) -> np.ndarray:
    """Value noise: a ``cells`` x ``cells`` lattice of bytes, bilinearly enlarged to ``int32 [96, 96]`` in 0..255."""
    lattice = rng.plane(cells + 1, cells + 1)
    at = np.arange(SIZE, dtype=np.int32) * cells * 256 // SIZE
    i, f = at >> 8, at & 255
    rows = (lattice[i] * (256 - f)[:, None] + lattice[i + 1] * f[:, None]) >> 8
    return (rows[:, i] * (256 - f)[None, :] + rows[:, i + 1] * f[None, :]) >> 8


_YX = np.mgrid[0:SIZE, 0:SIZE].astype(np.int32)


def background(
    rng: Rng, color: tuple[int, int, int], pattern: str, *, strength: int = 24, period: int = 0, turn: int | None = None
) -> np.ndarray:
    """An ``int32 [96, 96, 3]`` canvas. ``pattern``: plain, cloudy, lined, speckled, shaded, tiled."""
    y, x = _YX
    if pattern == "plain":
        wave = np.full((SIZE, SIZE), 128, np.int32)
    elif pattern == "cloudy":
        wave = (smooth(rng, rng.between(3, 6)) * 2 + smooth(rng, rng.between(8, 12))) // 3
    elif pattern == "speckled":
        wave = rng.plane(SIZE // 2, SIZE // 2).repeat(2, 0).repeat(2, 1)
    elif pattern == "shaded":
        cos, sin = cos_sin(rng.below(24) if turn is None else turn)
        wave = 128 + ((x - SIZE // 2) * cos + (y - SIZE // 2) * sin) // 96
    elif pattern == "lined":
        cos, sin = cos_sin(rng.below(24) if turn is None else turn)
        period = period or rng.between(8, 16)
        phase = ((x * cos + y * sin) // (32 * period)) & 7
        wave = np.where(phase < 4, 40, 216).astype(np.int32)
    elif pattern == "tiled":
        period = period or rng.between(8, 16)
        wave = np.where(((x // period) + (y // period)) & 1, 40, 216).astype(np.int32)
    else:
        raise ValueError(f"no background pattern {pattern!r}")
    delta = (wave - 128) * strength // 100
    return np.clip(np.array(color, np.int32)[None, None, :] + delta[:, :, None], 0, 255)


def vignette(canvas: np.ndarray, radius: int, hardness: int = 24) -> None:
    """Darken everything outside a circle of ``radius`` pixels about the middle, in place."""
    y, x = _YX
    d = (2 * x - SIZE + 1) ** 2 + (2 * y - SIZE + 1) ** 2
    keep = np.clip(256 - (d - 4 * radius * radius) // hardness, 8, 256)
    canvas *= keep[:, :, None]
    canvas >>= 8


def grain(rng: Rng, canvas: np.ndarray, strength: int) -> None:
    """Sensor noise of up to ``strength`` levels either way, in place."""
    noise = (rng.plane(SIZE, SIZE) - 128) * strength // 128
    canvas += noise[:, :, None]
    np.clip(canvas, 0, 255, out=canvas)


def draw(
    canvas: np.ndarray,
    shape: str,
    center: tuple[int, int],
    radius: int,
    color: tuple[int, int, int],
    texture: str = "plain",
    *,
    turn: int = 0,
    outline: int = 0,
    shading: int = 0,
    gloss: bool = False,
    alpha: int = 100,
) -> None:
    """Draw one filled shape in place.

    ``center`` and ``radius`` in eighths of a pixel; ``turn`` in steps of 15 degrees; ``outline`` darkens the rim by
    that percentage; ``shading`` darkens the lower right by up to that percentage; ``gloss`` adds a highlight.
    """
    cx, cy = center
    reach = radius + radius // 8 + UNIT
    x0, x1 = max(0, (cx - reach) // UNIT), min(SIZE, (cx + reach) // UNIT + 1)
    y0, y1 = max(0, (cy - reach) // UNIT), min(SIZE, (cy + reach) // UNIT + 1)
    if x0 >= x1 or y0 >= y1:
        return
    xs = (np.arange(2 * x0, 2 * x1, dtype=np.int32) * (UNIT // 2) + UNIT // 4 - cx)[None, :]
    ys = (np.arange(2 * y0, 2 * y1, dtype=np.int32) * (UNIT // 2) + UNIT // 4 - cy)[:, None]
    cos, sin = cos_sin(turn)
    u, v = (xs * cos + ys * sin) >> 8, (ys * cos - xs * sin) >> 8
    mask = inside(shape, u, v, radius)
    paint = np.empty((*mask.shape, 3), np.int32)
    paint[:] = color
    if texture != "plain":
        step = max(3 * UNIT, radius * 38 // 100)
        if texture == "striped":
            other = ((v + 64 * step) // step) & 1 == 1
        elif texture == "checked":
            other = (((u + 64 * step) // step) + ((v + 64 * step) // step)) & 1 == 1
        elif texture == "dotted":
            step = step * 4 // 3
            du = (u + 64 * step + step // 2) % step - step // 2
            dv = (v + 64 * step + step // 2) % step - step // 2
            other = 100 * (du * du + dv * dv) <= 11 * step * step
        else:
            raise ValueError(f"no texture {texture!r}; known are {', '.join(TEXTURES)}")
        paint[other] = second_color(color)
    if outline:
        rim = ~inside(shape, u * 100 // 82, v * 100 // 82, radius)
        paint[rim] = paint[rim] * (100 - outline) // 100
    if shading:
        fall = np.clip((xs + ys) * shading // (2 * radius), -shading // 2, shading)
        paint = paint * (100 - fall[:, :, None]) // 100
    if gloss:
        g = (xs + radius // 3) ** 2 + (ys + radius // 3) ** 2 <= (radius // 4) ** 2
        paint[g] = (paint[g] + 2 * 255) // 3
    np.clip(paint, 0, 255, out=paint)
    height, width = y1 - y0, x1 - x0
    weight = mask.reshape(height, 2, width, 2).sum((1, 3), dtype=np.int32)[:, :, None] * alpha
    total = (paint * mask[:, :, None]).reshape(height, 2, width, 2, 3).sum((1, 3)) * alpha
    window = canvas[y0:y1, x0:x1]
    window[:] = (window * (400 - weight) + total) // 400


def cell_center(cell: int) -> tuple[int, int]:
    """The middle of one of the nine cells (row-major), in eighths of a pixel."""
    return (cell % 3 * CELL + CELL // 2) * UNIT, (cell // 3 * CELL + CELL // 2) * UNIT


def finish(canvas: np.ndarray) -> np.ndarray:
    return np.clip(canvas, 0, 255).astype(np.uint8)


def line(
    canvas: np.ndarray, through: tuple[int, int], turn: int, width: int, color: tuple[int, int, int], alpha: int = 100
):
    """A straight line across the whole canvas, ``width`` pixels wide, through a pixel, at ``turn`` times 15 degrees."""
    cos, sin = cos_sin(turn)
    y, x = _YX
    on = np.abs((x - through[0]) * sin - (y - through[1]) * cos) * 2 <= 256 * width
    canvas[on] = (canvas[on] * (100 - alpha) + np.array(color, np.int32) * alpha) // 100


def circle_line(
    canvas: np.ndarray, center: tuple[int, int], radius: int, width: int, color: tuple[int, int, int], alpha=100
):
    """The outline of a circle; everything in pixels."""
    y, x = _YX
    d = (x - center[0]) ** 2 + (y - center[1]) ** 2
    on = (d <= (radius + width) ** 2) & (d >= radius * radius)
    canvas[on] = (canvas[on] * (100 - alpha) + np.array(color, np.int32) * alpha) // 100


def distance(a: tuple[int, int, int], b: tuple[int, int, int]) -> int:
    """How far two colours are apart, squared."""
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))
