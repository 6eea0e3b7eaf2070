"""The kernels' measurements as Markdown: a table an op, and what was reached of what the project asks of itself.

Covers: rows as ``leaml bench kernels --json`` writes them, from a CPU or a GPU. Does not cover measuring (``kernels``).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from leaml_plugin.report.markdown import markdown_table

Row = Mapping[str, Any]

# peers in the order of the columns; what a row lacks is left out where no row has it
PEERS = {
    "eager": "eager",
    "eager_tuned_malloc": "eager, tuned allocator",
    "eager_with_norm": "eager with the norm",
    "eager_with_norm_tuned_malloc": "eager with the norm, tuned allocator",
    "compile": "torch.compile",
    "relevance_gather_fused_scatter": "eager relevance, gather + fused + scatter",
    "relevance_dense_fused_masked": "eager relevance, masking + dense fused",
    "gather_fused_scatter": "gather + fused + scatter",
    "gather_fused_scatter_tuned_malloc": "the same, tuned allocator",
    "dense_fused_masked": "masking + dense fused",
    "dense_fused": "dense fused alone",
    "dense_foreach_masked": "masking + dense foreach",
    "bitsandbytes_8bit": "bitsandbytes 8-bit, dense",
    "apex_fused": "apex, dense",
    "topk": "topk",
    "sort": "stable sort",
    "whole_gradient": "the whole gradient",
    "our_two_parts": "our two parts apart",
}
# ops, and how the bars call them
RELEVANCE = {
    "relevance": "relevance",
    "relevance_all": "relevance by all four criteria",
    "relevance_columns": "relevance of columns",
}
STATES = {"fp32": "fp32", "8bit": "8-bit", "master": "fp32 + masters"}


def number(value: float) -> str:
    """Three digits: ``0.86``, ``2.41``, ``14.2``, ``451``."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def ratio(row: Row, peer: str) -> str:
    """``2.41 [2.38-2.45]``: the median and the 20th to 80th percentile of the paired runs."""
    if peer not in row["ratio"]:
        return ""
    low, high = row["spread"][peer]
    return f"{number(row['ratio'][peer])} [{number(low)}-{number(high)}]"


def short(dtype: str) -> str:
    return {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[dtype]


def density(row: Row) -> str:
    return "" if row["density"] is None else f"{100 * row['density']:g} %"


def table(rows: Sequence[Row], first: Mapping[str, Any]) -> str:
    """One line a row: the columns of ``first`` (title -> value of a row), then the peers that any row has."""
    peers = [peer for peer in PEERS if any(peer in row["ratio"] for row in rows)]
    lines = [[*(value(row) for value in first.values()), *(ratio(row, peer) for peer in peers)] for row in rows]
    return markdown_table([*first, *(PEERS[peer] for peer in peers)], lines)


def page(rows: Sequence[Row]) -> str:
    """All tables. Raises nothing: an op that was not measured has none."""

    def of(op: str, *states: str | None) -> list[Row]:
        return [row for row in rows if row["op"] == op and (not states or row["state"] in states)]

    common = {
        "dtype": lambda row: short(row["dtype"]),
        "density": density,
        "ms": lambda row: number(row["time_ms"]),
        "share of the limit": lambda row: number(row["limit_share"]) if row["limit_share"] else "",
    }
    stream = {"of a stream": lambda row: number(row["stream_share"]) if row["stream_share"] else ""}
    state = {"states": lambda row: STATES[row["state"]]}
    over = {
        "over relevance alone": lambda row: (
            number(1 / row["ratio"]["relevance_alone"]) if "relevance_alone" in row["ratio"] else ""
        ),
        "necessary bytes over relevance's": lambda row: number(row["bytes"] / relevance_bytes(row)),
    }
    parts = []
    if rows:
        some = rows[0]
        machine = some["machine"]
        layers = next((row for row in rows if row["layers"]), some)
        parts.append(
            f"{machine['date']}, {machine['device']}, {machine['threads']} thread(s), torch {machine['torch']}, "
            f"{layers['layers']} decoder layers of {layers['model']} ({layers['parameters'] / 1e6:.0f} M weights), "
            f"{machine['clock']}, {some['pairs']} paired runs. Columns with a peer's name: the peer's time / ours, "
            "median [20th to 80th percentile].\n"
        )
    product = {"share of the same product without gathering": common["share of the limit"]}
    lines = {"share of its cache lines' stream": common["share of the limit"]}
    without_share = {name: common[name] for name in ("dtype", "density", "ms")}
    without_density = {name: value for name, value in common.items() if name != "density"}
    # one op a heading; its rows, and the columns before the peers'
    found: list[tuple[str, list[Row], Mapping[str, Any]]] = [
        ("Relevance", of("relevance"), without_density),
        ("Relevance by all four criteria", of("relevance_all"), without_density),
        ("Relevance of columns", of("relevance_columns"), without_density),
        ("Sparse AdamW", of("sparse_adamw", "fp32"), {**common, **stream}),
        ("Sparse AdamW of columns", of("sparse_adamw_columns"), {**without_share, **lines}),
        ("Fusion: relevance of all neurons and the masked step", of("fusion", "fp32"), {**common, **over}),
        (
            "Other states: the step",
            of("sparse_adamw", "8bit", "master"),
            {**state, **common, "fp32 states / this": lambda row: ratio(row, "ours_fp32_state")},
        ),
        ("Other states: the fusion", of("fusion", "8bit", "master"), {**state, **common, **over}),
        ("Selective weight gradient", of("weight_grad"), {**without_share, **product}),
        (
            "Selection over a whole model's neurons",
            of("select"),
            {
                "model": lambda row: row["model"],
                "density": density,
                "ms": common["ms"],
                "share of reading the scores": common["share of the limit"],
            },
        ),
    ]
    for heading, some_rows, columns in found:
        if some_rows:
            parts.append(f"#### {heading}\n\n{table(some_rows, columns)}\n")
    reached = bars(rows)
    if reached:
        dtypes = list(dict.fromkeys(row["dtype"] for row in rows if row["op"] in (*RELEVANCE, "sparse_adamw")))
        parts.append("#### Against the bars\n\n" + markdown_table(["bar", *map(short, dtypes)], reached) + "\n")
    return "\n".join(parts)


def relevance_bytes(row: Row) -> int:
    return 2 * row["parameters"] * (4 if row["dtype"] == "float32" else 2)


def bars(rows: Sequence[Row]) -> list[list[str]]:
    """What the project asks of the kernels, by dtype: the values at the densities asked about, and whether they do.

    A value is rounded to two digits after the point before it is compared.
    """
    steps = [row for row in rows if row["op"] == "sparse_adamw" and row["state"] == "fp32"]
    asked = {
        d: [row for row in steps if row["density"] == d] for d in (0.05, 0.10) if any(r["density"] == d for r in steps)
    }
    relevance = {title: [row for row in rows if row["op"] == op] for op, title in RELEVANCE.items()}
    fused = [row for row in rows if row["op"] == "fusion" and row["state"] == "fp32" and row["density"] == 0.05]
    dtypes = list(dict.fromkeys(row["dtype"] for row in [*itertools.chain(*relevance.values()), *steps]))

    def peer(name: str) -> Any:
        return lambda row: row["ratio"].get(name)

    def share(row: Row) -> float | None:
        return row["limit_share"]

    per_op: list[tuple[str, list[tuple[Sequence[Row], Any, float]]]] = []
    for title, own in relevance.items():
        per_op += [
            (f"{title}: at least 0.85 of the limit", [(own, share, 0.85)]),
            (f"{title}: 5 times eager", [(own, peer("eager"), 5.0)]),
            (f"{title}: 3 times eager, tuned allocator", [(own, peer("eager_tuned_malloc"), 3.0)]),
            (f"{title}: 1.1 times torch.compile", [(own, peer("compile"), 1.1)]),
        ]
    per_op += [
        ("step at 5 / 10 %: at least 0.85 of the limit", [(own, share, 0.85) for own in asked.values()]),
        (
            "step: 3 times gather + fused + scatter",
            [(own, peer("gather_fused_scatter"), 3.0) for own in asked.values()],
        ),
        (
            "step: 1/density times masking + dense fused",
            [(own, peer("dense_fused_masked"), 1 / d) for d, own in asked.items()],
        ),
        ("step: 1.8 times torch.compile", [(own, peer("compile"), 1.8) for own in asked.values()]),
    ]
    out = []
    for title, parts in per_op:
        line = [title]
        for dtype in dtypes:
            pairs = [(value(row), bar) for own, value, bar in parts for row in own if row["dtype"] == dtype]
            pairs = [(found, bar) for found, bar in pairs if found is not None]
            met = all(round(found, 2) >= round(bar, 2) for found, bar in pairs)
            values = " / ".join(number(found) for found, _ in pairs)
            line.append(f"{values}, {'met' if met else 'missed'}" if pairs else "not measured")
        if any(cell != "not measured" for cell in line[1:]):
            out.append(line)
    if fused:
        # time over the necessary time of the larger part, relevance: what it needs at the bandwidth just measured
        line = ["fusion at 5 %: at most 1.15 times the necessary bytes of relevance"]
        for dtype in dtypes:
            own_rows = [row for row in fused if row["dtype"] == dtype]
            values_ = [row["bytes"] / relevance_bytes(row) / row["limit_share"] for row in own_rows]
            met = all(round(v, 2) <= 1.15 for v in values_)
            text = " / ".join(number(v) for v in values_)
            line.append(f"{text}, {'met' if met else 'missed'}" if values_ else "not measured")
        out.append(line)
    return out
