"""Charts: scales, thinning, smoothing, and that what they draw stays inside the frame."""

import itertools
import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leaml_plugin.metrics import Estimate
from leaml_plugin.report import figures
from leaml_plugin.report.figures import Series


@given(st.floats(-1e4, 1e4), st.floats(1e-3, 1e6))
def test_ticks_are_few_round_and_inside(low, span):
    marks = figures.ticks(low, low + span)
    assert len(marks) <= 7
    assert all(low - span * 1e-6 <= t <= low + span * (1 + 1e-6) for t in marks)


def test_ticks_of_known_ranges():
    assert figures.ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert figures.ticks(3, 3) == [3]
    assert figures.log_ticks(0.03, 4) == [0.05, 0.1, 0.2, 0.5, 1.0, 2.0]
    assert figures.log_ticks(0.001, 1000) == [10.0**k for k in range(-3, 4)]


def test_a_long_log_is_thinned_to_means():
    points = [(float(i), float(i % 2)) for i in range(10_000)]
    thin = figures.thin(points, 100)
    assert len(thin) == 100 and all(y == pytest.approx(0.5) for _, y in thin)
    assert figures.thin(points[:5]) == points[:5]


def test_the_running_mean_keeps_a_line_and_the_first_value():
    line = [(float(i), 2.0 * i) for i in range(100)]
    mean = figures.smooth(line)
    assert mean[0] == line[0]
    assert all(a[1] == pytest.approx(b[1]) for a, b in zip(mean[:90], line[:90], strict=True))


@given(
    st.lists(st.lists(st.floats() | st.none(), max_size=40), max_size=3),
    st.text(alphabet=st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"])),
)
def test_any_log_gives_a_chart_that_parses_and_stays_inside(logs, name):
    svg = figures.lines([Series(name, list(enumerate(log))) for log in logs], title=name, y_label="loss")
    if not svg:
        assert all(sum(y is not None and abs(y) < figures.BEYOND for y in log) < 2 for log in logs)
        return
    if not re.search("[\ufffe\uffff]", name):  # no XML may hold these
        ElementTree.fromstring(svg)
    assert "nan" not in re.sub(r"<text.*?</text>|aria-label=\"[^\"]*\"", "", svg)
    height = int(re.search(r'height="(\d+)"', svg).group(1))
    for data in re.findall(r'class="(?:raw|line) s\d" d="M([^"]+)"', svg):
        for x, y in (map(float, p.split(",")) for p in data.split("L")):
            assert 0 <= x <= figures.WIDTH and 0 <= y <= height


def test_an_outlier_is_clipped_and_does_not_set_the_scale():
    spike = [(float(i), 1000.0 if i == 50 else 1.0 + 0.01 * (i % 3)) for i in range(200)]
    svg = figures.lines([Series("qa", spike)], title="t")
    ys = [float(p.split(",")[1]) for p in re.search(r'class="raw s0" d="M([^"]+)"', svg).group(1).split("L")]
    assert min(ys) == 26 and len([y for y in ys if y == 26]) == 1  # the upper edge of the frame, once
    assert "1000" not in svg


def test_a_loss_over_decades_is_logarithmic():
    falling = [(float(i), 8 * 0.9**i) for i in range(60)]
    assert "nats per token (logarithmic)" in figures.lines([Series("qa", falling)], title="t", y_label="nats per token")
    assert "logarithmic" not in figures.lines([Series("qa", falling[:10])], title="t", y_label="nats per token")


def test_names_at_the_line_ends_do_not_overlap():
    series = [Series(n, [(0.0, 1.0), (1.0, 0.5)]) for n in ("one", "two", "three")]
    svg = figures.lines(series, title="t")
    heights = sorted(float(y) for y in re.findall(r'class="name s\d" x="[\d.]+" y="([\d.]+)"', svg))
    assert len(heights) == 3 and min(b - a for a, b in itertools.pairwise(heights)) >= 13


def test_intervals_share_one_scale_with_the_reference():
    e = Estimate(0.44, 0.41, 0.47, 100, 50)
    none = Estimate(0.5, math.nan, math.nan, 1, 1)
    assert figures.scale_of([e, none]) == (0.4, 0.5)
    assert figures.scale_of([]) == (0.0, 1.0)
    svg = figures.intervals([("<b>LEAML</b>", e), ("x" * 40, none)], title="t", reference=("blind & dumb", 0.2))
    root = ElementTree.fromstring(svg)
    assert len([p for p in root if p.get("class") == "interval"]) == 1
    xs = [float(c.get("cx")) for c in root if c.tag == "circle"]
    line = next(float(re.match(r"M([\d.]+)", p.get("d")).group(1)) for p in root if p.get("class") == "reference")
    assert line < xs[0] < xs[1] <= figures.WIDTH
    assert "…" in svg and "<b>" not in svg
    assert figures.intervals([], title="t") == ""


def test_a_whisker_shows_value_interval_and_reference():
    svg = figures.whisker(Estimate(0.5, 0.25, 0.75, 9, 9), (0.0, 1.0), 0.1, width=110)
    root = ElementTree.fromstring(svg)
    assert [c.get("cx") for c in root if c.tag == "circle"] == ["55.0"]
    assert [p.get("d") for p in root if p.get("class") == "interval"] == ["M30.0,8H80.0"]
    assert [p.get("d") for p in root if p.get("class") == "reference"] == ["M15.0,1V15"]
    bare = figures.whisker(Estimate(math.nan, math.nan, math.nan, 0, 0), (0.0, 1.0))
    assert "circle" not in bare and "interval" not in bare
