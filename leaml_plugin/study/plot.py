"""The study's picture, from result files: accuracy against labels, templates, and pseudo-answers against the truth.

Needs matplotlib (``pip install 'leaml_plugin[report]'``). Equal results give an equal file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from leaml_plugin.artifacts import atomic_path
from leaml_plugin.errors import LeamlError
from leaml_plugin.study.protocol import METHODS, budget_of
from leaml_plugin.study.summary import Row, best_baseline, rows

# Okabe and Ito's palette: distinguishable for colour-blind readers
COLORS = {
    "leaml": "#D55E00", "joint": "#0072B2", "full": "#009E73", "lora": "#56B4E9", "attention": "#CC79A7",
    "no-distillation": "#E69F00", "all-neurons": "#999999", "random-neurons": "#666666", "full-vision": "#004D40",
    "all-labels": "#000000", "full-longer": "#76c7a0", "joint-lora": "#004488", "leaml-lora": "#F4A582",
    "leaml-rounds": "#B2182B", "leaml-model-teacher": "#762A83", "joint-model-teacher": "#9970AB",
}  # fmt: skip


def draw(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the figure to ``path`` (SVG, PNG or PDF by its ending): one row of three panels a world."""
    try:
        import matplotlib
    except ImportError as error:
        raise LeamlError("the plot needs matplotlib; pip install 'leaml_plugin[report]'.") from error
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "leaml", "font.size": 8, "axes.spines.top": False})
    matplotlib.rcParams["axes.spines.right"] = False
    from matplotlib import pyplot as plt

    table = rows(results)
    worlds = list(dict.fromkeys(r.world for r in table))
    if not worlds:
        raise LeamlError("there are no results to draw; run the study first.")
    figure, axes = plt.subplots(
        len(worlds), 3, figsize=(13, 3.6 * len(worlds)), squeeze=False, gridspec_kw={"width_ratios": [3, 4, 2]}
    )
    for world, (left, middle, right) in zip(worlds, axes):
        own = [r for r in table if r.world == world]
        _curves(left, own)
        _templates(middle, own)
        _pseudo(right, own)
        left.set_title(world, loc="left", fontweight="bold")
    figure.tight_layout()
    with atomic_path(path) as temporary:
        kind = path.suffix.lstrip(".") or "svg"
        metadata = {"Date": None} if kind == "svg" else None
        figure.savefig(temporary, format=kind, metadata=metadata, dpi=120)
    plt.close(figure)


def _curves(axes: Any, own: Sequence[Row]) -> None:
    for method in dict.fromkeys(r.method for r in own):
        points = sorted((r for r in own if r.method == method), key=lambda r: r.labels)
        if method in ("blind", "all-labels", "zero-shot") or METHODS[method].truth:  # what knows the truth is no result
            continue
        x = [r.results[0]["label_questions"] for r in points]
        y = [100 * r.accuracy for r in points]
        bands = [r.ci95 or (r.accuracy, r.accuracy) for r in points]
        color = COLORS.get(method)
        axes.plot(x, y, "o-", color=color, label=METHODS[method].title, markersize=4)
        if len(points) > 1:
            low, high = zip(*bands)
            axes.fill_between(x, [100 * v for v in low], [100 * v for v in high], color=color, alpha=0.15, linewidth=0)
        else:
            error = [[y[0] - 100 * bands[0][0]], [100 * bands[0][1] - y[0]]]
            axes.errorbar(x, y, yerr=error, color=color, capsize=2)
    for method, style in (("all-labels", "--"), ("zero-shot", ":")):
        found = [r for r in own if r.method == method]
        if found:
            axes.axhline(100 * found[0].accuracy, color="black", linestyle=style, linewidth=1)
            axes.annotate(METHODS[method].title, (0.99, 100 * found[0].accuracy), xycoords=("axes fraction", "data"),
                          ha="right", va="bottom", fontsize=7)  # fmt: skip
    blind = 100 * max(r.blind_majority for r in own)
    axes.axhline(blind, color="gray", linestyle="-.", linewidth=1)
    axes.annotate("image-blind majority", (0.99, blind), xycoords=("axes fraction", "data"), ha="right", va="bottom",
                  fontsize=7, color="gray")  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel("labelled questions")
    axes.set_ylabel("exact match, %")
    axes.legend(fontsize=6, frameon=False, loc="best")


def _templates(axes: Any, own: Sequence[Row]) -> None:
    labels = _smallest(own)
    base = best_baseline(own, own[0].world, labels)
    shown = ("leaml", "all-labels", base.method if base else "")
    chosen = [r for r in own if r.labels == budget_of(r.method, labels) and r.method in shown]
    names = sorted({name for r in chosen for name in r.results[0]["by_template"]})
    for number, r in enumerate(chosen):
        heights = []
        for name in names:
            cells = [x["by_template"][name] for x in r.results if name in x["by_template"]]
            heights.append(100 * sum(c["accuracy"] for c in cells) / len(cells) if cells else 0.0)
        at = [i + 0.27 * (number - (len(chosen) - 1) / 2) for i in range(len(names))]
        axes.bar(at, heights, 0.25, color=COLORS.get(r.method, "gray"), label=METHODS[r.method].title)
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right")
    axes.set_ylabel(f"exact match, % ({100 * labels:g} % of labels)")
    axes.legend(fontsize=6, frameon=False)


def _smallest(own: Sequence[Row]) -> float:
    return min((r.labels for r in own if r.labels > 0), default=0.0)


def _pseudo(axes: Any, own: Sequence[Row]) -> None:
    labels = _smallest(own)
    chosen = [r for r in own if r.labels == labels and r.pseudo is not None and not METHODS[r.method].truth]
    axes.barh([METHODS[r.method].title for r in chosen], [100 * (r.pseudo or 0) for r in chosen],
              color=[COLORS.get(r.method, "gray") for r in chosen])  # fmt: skip
    axes.invert_yaxis()
    axes.set_xlabel("pseudo-answers that are right, %")
