"""Inline SVG, drawn by hand: loss curves and intervals on a common scale.

Covers: a line chart of a training log, and a row of dots with whiskers against a reference.
Does not cover: colours, which are CSS classes so that a figure follows the light or dark page; tables and heat maps,
which are HTML.

Figures are small (360 units wide) and stand beside each other, so that their letters keep the size of the text on a
phone. Every text is escaped here: the results are :class:`markupsafe.Markup`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from leaml_plugin.metrics import Estimate
from leaml_plugin.report.words import has_interval, number

WIDTH = 360
BEYOND = 1e30  # a value of this size or more is no measurement, and its square no float


@dataclass(frozen=True)
class Series:
    """A named line: ``(x, y)`` with x increasing; what is not finite, or beyond all measure, is left out."""

    name: str
    points: Sequence[tuple[float, float]]


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers inside [low, high], at most about ``most``."""
    if not high > low:
        return [low]
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 of each decade inside [low, high]; only the decades where those are many."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    fine = [m * 10.0**k for k in decades for m in (1, 2, 5) if low <= m * 10.0**k <= high]
    coarse = [10.0**k for k in decades if low <= 10.0**k <= high]
    return fine if len(fine) <= 6 or len(coarse) < 2 else coarse


def thin(points: Sequence[tuple[float, float]], most: int = 240) -> list[tuple[float, float]]:
    """Means of equal runs of neighbours, so that a long log does not make a heavy page."""
    if len(points) <= most:
        return list(points)
    out = []
    for i in range(most):
        block = points[i * len(points) // most : (i + 1) * len(points) // most]
        out.append((sum(x for x, _ in block) / len(block), sum(y for _, y in block) / len(block)))
    return out


def smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """A centred running mean over a twelfth of the line.

    The window shrinks at the start, where a loss falls fast, and loses its right half at the end.
    """
    half = len(points) // 24
    total = [0.0]
    for _, y in points:
        total.append(total[-1] + y)
    out = []
    for i, (x, _) in enumerate(points):
        reach = min(half, i)
        a, b = i - reach, min(i + reach + 1, len(points))
        out.append((x, (total[b] - total[a]) / (b - a)))
    return out


def lines(series: Sequence[Series], *, title: str, x_label: str = "step", y_label: str = "") -> Markup:
    """A line chart: each series faint as logged and strong as running mean, named at its right end.

    The y axis is logarithmic where the means span more than a factor of ten. Empty where no series has two points.
    """
    clean = [
        Series(s.name, pts)
        for s in series
        if len(pts := thin([(x, y) for x, y in s.points if y is not None and abs(y) < BEYOND])) > 1
    ]
    if not clean:
        return Markup("")
    means = [smooth(s.points) for s in clean]
    low, high = min(y for m in means for _, y in m), max(y for m in means for _, y in m)
    logarithmic = low > 1 / BEYOND and high / low > 10
    # the axis covers the means and what of the raw lines lies near; single outliers are clipped
    raw = [y for s in clean for _, y in s.points]
    top = min(max(raw), high * 1.25) if high > 0 else max(raw)
    bottom = max(min(raw), low * 0.8) if logarithmic else min(0.0, min(raw))
    if top <= bottom:
        top = bottom + max(1.0, 0.1 * abs(bottom))
    height, left, right, above, below = 220, 40, 64, 26, 34
    x0, x1 = min(s.points[0][0] for s in clean), max(s.points[-1][0] for s in clean)
    to = math.log10 if logarithmic else float

    def px(x: float) -> float:
        return left + (x - x0) / ((x1 - x0) or 1) * (WIDTH - left - right)

    def py(y: float) -> float:
        y = min(max(y, bottom), top)
        return above + (to(top) - to(y)) / (to(top) - to(bottom)) * (height - above - below)

    def path(points: Sequence[tuple[float, float]]) -> str:
        return "M" + "L".join(f"{px(x):.1f},{py(y):.1f}" for x, y in points)

    out = [_open(height, title)]
    for y in log_ticks(bottom, top) if logarithmic else ticks(bottom, top):
        out.append(f'<path class="grid" d="M{left},{py(y):.1f}H{WIDTH - right}"/>')
        out.append(f'<text x="{left - 6}" y="{py(y) + 4:.1f}" text-anchor="end">{number(y)}</text>')
    base = height - below
    out.append(f'<path class="axis" d="M{left},{base}H{WIDTH - right}"/>')
    for x in ticks(x0, x1, 4):
        out.append(f'<path class="axis" d="M{px(x):.1f},{base}v4"/>')
        out.append(f'<text x="{px(x):.1f}" y="{base + 16}" text-anchor="middle">{x:.0f}</text>')
    out.append(f'<text class="label" x="{WIDTH - right}" y="{height - 4}" text-anchor="end">{escape(x_label)}</text>')
    axis = f"{y_label} (logarithmic)" if logarithmic and y_label else y_label
    out.append(f'<text class="label" x="0" y="11">{escape(axis)}</text>')
    for i, s in enumerate(clean):
        out.append(f'<path class="raw s{i}" d="{path(s.points)}"/>')
    ends = _apart([py(m[-1][1]) for m in means], 13, above + 4, base)
    for i, (s, m) in enumerate(zip(clean, means)):
        out.append(f'<path class="line s{i}" d="{path(m)}"/>')
        out.append(f'<text class="name s{i}" x="{WIDTH - right + 5}" y="{ends[i] + 4:.1f}">{escape(s.name)}</text>')
    return Markup("".join(out) + "</svg>")


def _apart(positions: list[float], gap: float, low: float, high: float) -> list[float]:
    """Positions moved as little as needed to be ``gap`` apart."""
    out = list(positions)
    order = sorted(range(len(out)), key=lambda i: out[i])
    for a, b in itertools.pairwise(order):
        out[b] = max(out[b], out[a] + gap)
    if order and out[order[-1]] > high:
        out[order[-1]] = high
        for a, b in itertools.pairwise(order[::-1]):
            out[b] = min(out[b], out[a] - gap)
    return [max(y, low) for y in out]


def scale_of(estimates: Sequence[Estimate]) -> tuple[float, float]:
    """A range of shares that holds all values and intervals, widened to tenths."""
    ends = [v for e in estimates for v in (e.value, e.low, e.high) if not math.isnan(v)]
    if not ends:
        return 0.0, 1.0
    low, high = math.floor(min(ends) * 10 + 1e-9) / 10, math.ceil(max(ends) * 10 - 1e-9) / 10
    return (low, high) if high > low else (low, low + 0.1)


def whisker(e: Estimate, scale: tuple[float, float], reference: float | None = None, width: int = 180) -> Markup:
    """One estimate as a dot with its interval on ``scale``; a tick where ``reference`` lies. For a table cell.

    It repeats what the cells beside it say, and is hidden from screen readers.
    """
    low, high = scale
    pad = 5

    def px(v: float) -> float:
        return pad + (v - low) / (high - low) * (width - 2 * pad)

    out = [f'<svg class="whisker" viewBox="0 0 {width} 16" width="{width}" height="16" aria-hidden="true">']
    out.append(f'<path class="grid" d="M{pad},8H{width - pad}"/>')
    if reference is not None and not math.isnan(reference):
        out.append(f'<path class="reference" d="M{px(reference):.1f},1V15"/>')
    if has_interval(e):
        out.append(f'<path class="interval" d="M{px(e.low):.1f},8H{px(e.high):.1f}"/>')
    if not math.isnan(e.value):
        out.append(f'<circle class="dot" cx="{px(e.value):.1f}" cy="8" r="3.5"/>')
    return Markup("".join(out) + "</svg>")


def intervals(
    rows: Sequence[tuple[str, Estimate]], *, title: str, reference: tuple[str, float] | None = None
) -> Markup:
    """Estimates as dots with whiskers under each other, in per cent, with a line at the reference."""
    if not rows:
        return Markup("")
    extra = [Estimate(reference[1], math.nan, math.nan, 0, 0)] if reference else []
    scale = scale_of([e for _, e in rows] + extra)
    left, right, step, above = 128, 12, 24, 22 if reference else 8
    height = above + step * len(rows) + 34

    def px(v: float) -> float:
        return left + (v - scale[0]) / (scale[1] - scale[0]) * (WIDTH - left - right)

    base = above + step * len(rows) + 2
    out = [_open(height, title)]
    for v in ticks(*scale):
        out.append(f'<path class="grid" d="M{px(v):.1f},{above}V{base}"/>')
        out.append(f'<text x="{px(v):.1f}" y="{base + 15}" text-anchor="middle">{100 * v:.0f}</text>')
    out.append(f'<text class="label" x="{WIDTH - right}" y="{height - 3}" text-anchor="end">per cent</text>')
    if reference:
        x = px(reference[1])
        out.append(f'<path class="reference" d="M{x:.1f},{above - 6}V{base}"/>')
        # the name stands on the side with more room
        anchor, at = ("start", x - 3) if x < (left + WIDTH) / 2 else ("end", x + 3)
        text = escape(reference[0])
        out.append(f'<text class="label" x="{at:.1f}" y="{above - 10}" text-anchor="{anchor}">{text}</text>')
    for i, (name, e) in enumerate(rows):
        y = above + step * i + step / 2
        short = name if len(name) <= 21 else name[:20] + "…"
        out.append(f'<text class="row" x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(short)}</text>')
        if has_interval(e):
            out.append(f'<path class="interval" d="M{px(e.low):.1f},{y:.1f}H{px(e.high):.1f}"/>')
        if not math.isnan(e.value):
            out.append(f'<circle class="dot" cx="{px(e.value):.1f}" cy="{y:.1f}" r="4"/>')
    return Markup("".join(out) + "</svg>")


def _open(height: int, title: str) -> str:
    return (
        f'<svg class="plot" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img" '
        f'aria-label="{escape(title)}">'
    )
