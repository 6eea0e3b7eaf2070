"""The kernels' measurements as Markdown: a table an op, and what was reached of what the project asks of itself.

Covers: rows as ``leaml bench kernels --json`` writes them, from a CPU or a GPU. Does not cover measuring (``kernels``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from leaml_plugin.report.markdown import markdown_table

Row = Mapping[str, Any]
Value = Callable[[Row], float | None]
ASKED = (0.05, 0.10)  # the densities that the bars are about

# peers in the order of the columns; what a row lacks is left out where no row has it
PEERS = {
    "eager": "eager",
    "eager_tuned_malloc": "eager, tuned allocator",
    "eager_with_norm": "eager with the norm",
    "eager_with_norm_tuned_malloc": "eager with the norm, tuned allocator",
    "compile": "torch.compile",
    "compile_with_norm": "torch.compile with the norm",
    "ours_then_norm": "relevance, then the norm by itself",
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
            "Fusion over feed-forward neurons",
            of("fusion_ffn"),
            {**common, "M weights": lambda row: f"{row['parameters'] / 1e6:.0f}", **over},
        ),
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
    heading, reached = bars(rows)
    if reached:
        parts.append("#### Against the bars\n\n" + markdown_table(heading, reached) + "\n")
    return "\n".join(parts)


def relevance_bytes(row: Row) -> int:
    return 2 * row["parameters"] * (4 if row["dtype"] == "float32" else 2)


def bars(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """What the project asks of the kernels, by dtype: the values at the densities asked about, and whether they do.

    Where a bar can be read in two ways, each has its line: peers as a user finds them and with a tuned allocator; the
    limit that the same scattered rows set and that of a stream; the dense optimizer with the masking it needs and
    alone; relevance without and with the norm, which our op returns anyway; the bytes that the fusion's larger part
    needs and the time it takes. A value is rounded to two digits after the point before it is compared.

    Returns:
        The heading and the lines of a table; no lines where nothing was measured.
    """

    def of(op: str) -> list[Row]:
        """Its rows with plain states; at the densities asked about where there are several."""
        return [row for row in rows if row["op"] == op and row["state"] in (None, "fp32") and asked(row)]

    def asked(row: Row) -> bool:
        return row["op"] in RELEVANCE or row["density"] in ASKED

    def peer(name: str) -> Value:
        return lambda row: row["ratio"].get(name)

    def share(row: Row) -> float | None:
        return row["limit_share"]

    def same_rows(row: Row) -> float | None:
        # where no stream stands beside it the limit is the stream itself: on a GPU, and with several threads
        return None if row["stream_share"] is None else row["limit_share"]

    def stream(row: Row) -> float | None:
        return row["limit_share"] if row["stream_share"] is None else row["stream_share"]

    def over_bytes(row: Row) -> float | None:
        """Our time over what relevance's bytes take at the bandwidth just measured."""
        return row["bytes"] / relevance_bytes(row) / row["limit_share"]

    def over_relevance(row: Row) -> float | None:
        return 1 / row["ratio"]["relevance_alone"] if "relevance_alone" in row["ratio"] else None

    # title, op, value, bar (None: 1 / density), whether it is a ceiling
    asks: list[tuple[str, str, Value, float | None, bool]] = []
    for op, title in RELEVANCE.items():
        asks += [
            (f"{title}: at least 0.85 of the limit", op, share, 0.85, False),
            (f"{title}: 5 times eager", op, peer("eager"), 5.0, False),
            (f"{title}: 3 times eager, tuned allocator", op, peer("eager_tuned_malloc"), 3.0, False),
            (f"{title}: 1.1 times torch.compile", op, peer("compile"), 1.1, False),
        ]
        if op == "relevance":
            with_norm = f"{title} with the norm"
            asks += [
                (f"{with_norm}: 5 times eager", op, peer("eager_with_norm"), 5.0, False),
                (f"{with_norm}: 3 times eager, tuned allocator", op, peer("eager_with_norm_tuned_malloc"), 3.0, False),
                (f"{with_norm}: 1.1 times torch.compile", op, peer("compile_with_norm"), 1.1, False),
            ]
    gathered, both = "3 times gather + fused + scatter", "at 5 / 10 %"
    for title, value, bar in (
        ("at least 0.85 of moving the same rows", same_rows, 0.85),
        ("at least 0.85 of a stream", stream, 0.85),
        (gathered, peer("gather_fused_scatter"), 3.0),
        (f"{gathered}, tuned allocator", peer("gather_fused_scatter_tuned_malloc"), 3.0),
        ("1/density times masking + dense fused", peer("dense_fused_masked"), None),
        ("1/density times dense fused alone", peer("dense_fused"), None),
        ("1.8 times torch.compile", peer("compile"), 1.8),
    ):
        asks.append((f"step {both}: {title}", "sparse_adamw", value, bar, False))
    at_most = f"fusion {both}: at most 1.15 times"
    asks += [
        (f"{at_most} the necessary bytes of relevance", "fusion", over_bytes, 1.15, True),
        (f"{at_most} relevance alone", "fusion", over_relevance, 1.15, True),
    ]
    ops = dict.fromkeys(op for _, op, _, _, _ in asks)
    dtypes = list(dict.fromkeys(row["dtype"] for op in ops for row in of(op)))
    lines = []
    for title, op, value, bar, ceiling in asks:
        line = [title]
        for dtype in dtypes:
            own = [row for row in of(op) if row["dtype"] == dtype]
            pairs = [(value(row), bar or 1 / row["density"]) for row in own]
            pairs = [(round(found, 2), round(wanted, 2)) for found, wanted in pairs if found is not None]
            met = all(found <= wanted if ceiling else found >= wanted for found, wanted in pairs)
            values = " / ".join(number(found) for found, _ in pairs)
            line.append(f"{values}, {'met' if met else 'missed'}" if pairs else "not measured")
        if any(cell != "not measured" for cell in line[1:]):
            lines.append(line)
    return ["bar", *map(short, dtypes)], lines
