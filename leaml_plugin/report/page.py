"""The page of one run: ``report.html`` and, beside it, ``report_files/`` with the pictures in chunks.

Covers: gathering what the template shows, and writing the page so that a reader sees the old one or the new one.
Does not cover: reading artifacts (``facts``), drawing (``figures``), comparing runs (``comparison``).

The page needs nothing but itself and its folder. A content policy inside it forbids every other source, and every
script but the page's own by its hash, so that a text which slipped through the escaping could still not run.
Equal runs give equal bytes: no time, no folder of this machine.
"""

from __future__ import annotations

import base64
import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from leaml_plugin import __version__
from leaml_plugin.artifacts import RunDirectory, write_text
from leaml_plugin.errors import LeamlError
from leaml_plugin.report import figures, gallery, words
from leaml_plugin.report.facts import NOT_FILTERED, Facts

_HERE = Path(__file__).parent / "templates"
MOST_TEMPLATES = 60
LOSS_NAMES = {"qa": "QA", "caption": "captions", "vqa": "VQA"}


def write_report(
    run: RunDirectory | str | os.PathLike[str], *, title: str | None = None, pictures: int = 10_000
) -> Path:
    """Write the report of a run, finished or not, and return its path.

    Args:
        run: a run directory.
        title: the heading; the model's name and the method if None.
        pictures: the most pictures of each gallery; of more, a sample by the hash of their ids. Counts are of all.

    Raises:
        LeamlError: there is no run, it has not begun, or one of its files is damaged.
    """
    facts = Facts(run)
    path = facts.run.report
    if not facts.begun:  # the directory of a demo or a study has a page of its own, which is not ours to replace
        raise LeamlError(f"{facts.run.path} holds no stage of an adaptation: name the --output of 'leaml adapt'.")
    folder = files_of(path)
    written: set[str] = set()
    galleries = {
        "pseudo": gallery.build("pseudo", *facts.gallery(pictures), pair_statuses(facts), folder, written),
        "answers": gallery.build(
            "answers", *facts.answered(pictures), {"right": "right", "wrong": "wrong"}, folder, written
        ),
    }
    context = {
        "title": title or heading(facts),
        "facts": facts,
        "files": folder.name if written else "",
        "galleries": galleries,
        "losses": losses(facts),
        "heat": heat(facts),
        "overlap": facts.overlap,
        "settings": words.settings(facts.config),
        "fingerprints": words.settings(facts.inputs),
        "templates": facts.by_template[:MOST_TEMPLATES],
        "template_scale": figures.scale_of([e for r in facts.by_template for e in (r.exact, r.blind) if e]),
    }
    write_page(path, "report.html", context)
    gallery.sweep(folder, written)
    return path


def files_of(page: Path) -> Path:
    """The folder of a page's chunks."""
    return page.with_name(page.stem + "_files")


def write_page(path: Path, template: str, context: Mapping[str, Any]) -> None:
    """Render a template and write it atomically."""
    html = _environment().get_template(template).render(context)
    # half of a surrogate pair, which JSON may hold, has no UTF-8 form
    write_text(path, html.encode("utf-8", "replace").decode("utf-8"))


@cache
def _environment() -> jinja2.Environment:
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = (_HERE / "page.css").read_text(encoding="utf-8")
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    env.globals.update(
        version=__version__,
        style=Markup(style),
        script=Markup(script),
        policy=(
            "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
            f"script-src 'sha256-{digest}' 'strict-dynamic'; base-uri 'none'; form-action 'none'"
        ),
        families=words.FAMILY_NAMES,
        whisker=figures.whisker,
        reason_text=words.reason_text,
        isnan=math.isnan,
    )
    env.filters.update(
        count=words.count,
        percent=words.percent,
        points=words.points,
        interval=words.interval,
        estimate=words.estimate,
        reason=words.reason_name,
        script_json=lambda data: Markup(gallery.script_json(data)),
    )
    return env


def heading(facts: Facts) -> str:
    model = words.without_machine(facts.config.get("model", ""))
    method = {"leaml": "LEAML", "labels": "labels alone"}.get(facts.config.get("method", ""), "")
    return ", ".join(part for part in (model, method) if part) or "LEAML run"


def pair_statuses(facts: Facts) -> dict[str, str]:
    """Status -> words for the pseudo-QA gallery: kept first, then the reasons by frequency."""
    return {
        "": "kept",
        **{r: "not filtered yet" if r == NOT_FILTERED else words.reason_name(r) for r in facts.reasons},
    }


def losses(facts: Facts) -> list[dict[str, Any]]:
    """A chart for each training log, with its gradient norm beside it."""
    out = []
    for stage, name in (("train_generator", "QA generator"), ("finetune", "VQA fine-tuning")):
        steps = facts.log(stage)
        if not steps:
            continue
        names = [k for k in steps[0] if k not in ("step", "lr", "grad_norm")]
        series = [figures.Series(LOSS_NAMES.get(k, k), _points(steps, k)) for k in names]
        ends = [
            (s.name, first, last)
            for s in series
            if s.points
            for first, last in [(_mean(s.points[: _tenth(s.points)]), _mean(s.points[-_tenth(s.points) :]))]
        ]
        chart = figures.lines(series, title=f"Loss of the {name} by step", y_label="nats per token")
        norm = [figures.Series("", _points(steps, "grad_norm"))]
        out.append(
            {
                "stage": stage,
                "name": name,
                "steps": len(steps),
                "ends": ends,
                "chart": chart,
                "norm": figures.lines(norm, title=f"Gradient norm of the {name} by step", y_label="gradient norm"),
            }
        )
    return out


def _points(steps: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(s["step"], s[name]) for s in steps if s.get(name) is not None and math.isfinite(s[name])]


def _tenth(points: Sequence[Any]) -> int:
    return max(1, len(points) // 10)


def _mean(points: Sequence[tuple[float, float]]) -> float:
    return sum(y for _, y in points) / len(points)


#: Matrices that the relevance stage may write, with what a cell says.
HEAT = {
    "share": ("Selected neurons", "share of the neurons of a module that is selected"),
    "relevance": ("Relevance", "share of the whole model's relevance that lies in a module"),
    "captured": ("Captured relevance", "share of a module's relevance that its selected neurons hold"),
}


def heat(facts: Facts) -> list[dict[str, Any]]:
    """Heat maps as tables: one row per kind of module, one column per layer, for each stack of layers."""
    data = facts.heatmap
    if not data:
        return []
    # "model.layers.3" is column 3 of the stack "model.layers"
    stacks: dict[str, list[tuple[str, int]]] = {}
    for i, layer in enumerate(data["layers"]):
        stack, _, last = layer.rpartition(".")
        stacks.setdefault(stack if last.isdigit() else "", []).append((last if last.isdigit() else layer, i))
    out = []
    for key, (name, text) in HEAT.items():
        if key not in data:
            continue
        matrix = data[key]
        values = [v for row in matrix for v in row if v is not None]
        top = max(values, default=0.0)
        flat = bool(values) and max(values) - min(values) < 0.005
        for stack, layers in stacks.items():
            kinds = [
                (kind, [matrix[i][k] for _, i in layers])
                for k, kind in enumerate(data["kinds"])
                if any(matrix[i][k] is not None for _, i in layers)
            ]
            out.append(
                {
                    "key": key,
                    "name": name,
                    "text": text,
                    "stack": stack,
                    "layers": [layer or "–" for layer, _ in layers],
                    "kinds": kinds,
                    "top": top,
                    "flat": flat,
                    "wide": len(layers) > 14,
                }
            )
    return out
