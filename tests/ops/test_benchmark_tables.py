"""The kernels' tables: every number comes from the rows, a missed bar is called missed."""

from __future__ import annotations

import json

import pytest

from leaml_plugin import LeamlError
from leaml_plugin.benchmark import kernels, tables
from leaml_plugin.report.markdown import MARKS


def row(op, dtype="float32", density=0.05, state="fp32", share=0.9, **ratio):
    values = kernels.Row(
        op=op, dtype=dtype, density=density, device="a processor", time_ms=2.0, limit_share=share, ratio=ratio,
        spread={name: (value - 0.1, value + 0.1) for name, value in ratio.items()}, state=state, stream_share=0.7,
        bytes=1120, model="tiny", layers=2, parameters=125, pairs=9,
        machine={"date": "2026-01-01", "device": "a processor", "threads": 1, "torch": "2.11", "clock": "wall"},
    )  # fmt: skip
    return vars(values)


def cells(page, start):
    (found,) = [line for line in page.splitlines() if line.startswith(f"| {start}")]
    return [cell.strip() for cell in found.strip("|").split("|")][1:]


def test_a_table_has_the_peers_that_were_measured():
    page = tables.page([row("sparse_adamw", compile=2.5), row("sparse_adamw", density=0.1, eager=7.0)])
    assert "| dtype | density | ms | share of the limit | of a stream | eager | torch.compile |" in page
    assert "| fp32 | 5 % | 2.00 | 0.90 | 0.70 |  | 2.50 [2.40-2.60] |" in page
    assert "| fp32 | 10 % | 2.00 | 0.90 | 0.70 | 7.00 [6.90-7.10] |  |" in page


def test_a_share_says_of_what_it_is():
    page = tables.page([row("weight_grad", compile=1.1), row("sparse_adamw_columns"), row("select", topk=1.5)])
    assert "| dtype | density | ms | share of the same product without gathering | torch.compile |" in page
    assert "| dtype | density | ms | share of its cache lines' stream |" in page
    assert "| model | density | ms | share of reading the scores | topk |" in page
    assert "| tiny | 5 % | 2.00 | 0.90 | 1.50 [1.40-1.60] |" in page


def test_bars_are_met_or_missed_by_their_number():
    steps = [
        row("sparse_adamw", gather_fused_scatter=3.0, dense_fused_masked=20.0, compile=1.79),
        row("sparse_adamw", density=0.1, gather_fused_scatter=2.99, dense_fused_masked=10.1, compile=1.9, share=0.85),
        row("sparse_adamw", "bfloat16", dense_fused_masked=19.9, share=0.849),
        row("sparse_adamw", density=0.2, gather_fused_scatter=1.0),  # not asked about
        row("sparse_adamw", state="8bit", share=0.1),
    ]
    page = tables.page(steps)
    assert cells(page, "step at 5 / 10 %: at least 0.85 of moving") == ["0.90 / 0.85, met", "0.85, met"]
    assert cells(page, "step at 5 / 10 %: 3 times gather") == ["3.00 / 2.99, missed", "not measured"]
    assert cells(page, "step at 5 / 10 %: 1/density") == ["20.0 / 10.1, met", "19.9, missed"]
    assert cells(page, "step at 5 / 10 %: 1.8 times") == ["1.79 / 1.90, missed", "not measured"]


def test_a_bar_that_reads_in_two_ways_has_two_lines():
    step = row(
        "sparse_adamw", gather_fused_scatter=4.0, gather_fused_scatter_tuned_malloc=2.7, dense_fused_masked=21.0,
        dense_fused=16.0,
    )  # fmt: skip
    page = tables.page([step])
    assert cells(page, "step at 5 / 10 %: at least 0.85 of moving") == ["0.90, met"]
    assert cells(page, "step at 5 / 10 %: at least 0.85 of a stream") == ["0.70, missed"]
    assert cells(page, "step at 5 / 10 %: 3 times gather + fused + scatter |") == ["4.00, met"]
    assert cells(page, "step at 5 / 10 %: 3 times gather + fused + scatter, tuned") == ["2.70, missed"]
    assert cells(page, "step at 5 / 10 %: 1/density times masking") == ["21.0, met"]
    assert cells(page, "step at 5 / 10 %: 1/density times dense fused alone") == ["16.0, missed"]
    # with several threads, and on a GPU, a stream is the limit itself
    page = tables.page([{**step, "stream_share": None}])
    assert "of moving the same rows" not in page
    assert cells(page, "step at 5 / 10 %: at least 0.85 of a stream") == ["0.90, met"]


def test_relevance_is_held_against_peers_with_the_norm_too():
    whole = {"density": None, "state": None}
    with_peers = row(
        "relevance", **whole, eager=6.0, eager_with_norm=7.0, eager_tuned_malloc=2.0, eager_with_norm_tuned_malloc=3.1,
        compile=1.0, compile_with_norm=1.09, ours_then_norm=1.6,
    )  # fmt: skip
    page = tables.page([with_peers, row("relevance_columns", **whole, eager=4.0)])
    assert cells(page, "relevance: 5 times eager") == ["6.00, met"]
    assert cells(page, "relevance: 3 times eager") == ["2.00, missed"]
    assert cells(page, "relevance with the norm: 5 times eager") == ["7.00, met"]
    assert cells(page, "relevance with the norm: 3 times eager") == ["3.10, met"]
    assert cells(page, "relevance: 1.1 times torch.compile") == ["1.00, missed"]
    assert cells(page, "relevance with the norm: 1.1 times torch.compile") == ["1.09, missed"]
    assert cells(page, "relevance of columns: 5 times eager") == ["4.00, missed"]
    assert "relevance of columns with the norm" not in page
    assert "| relevance, then the norm by itself |" in page and "| 1.60 [1.50-1.70] |" in page


def test_the_fusion_is_held_against_the_bytes_of_relevance():
    # 125 weights: relevance needs 1000 bytes, the fusion 1120; at the limit it takes 1.12 of relevance's time
    met, missed = row("fusion", share=1.0, relevance_alone=0.9), row("fusion", share=0.9, relevance_alone=0.8)
    bar, beside = "fusion at 5 / 10 %: at most 1.15 times the", "fusion at 5 / 10 %: at most 1.15 times relevance alone"
    page = tables.page([met, row("relevance")])
    assert cells(page, bar) == ["1.12, met"] and cells(page, beside) == ["1.11, met"]
    page = tables.page([missed, row("relevance")])
    assert cells(page, bar) == ["1.24, missed"] and cells(page, beside) == ["1.25, missed"]
    both = [met, {**missed, "density": 0.1}, {**missed, "density": 0.2}]  # the last is not asked about
    assert cells(tables.page(both), bar) == ["1.12 / 1.24, missed"]
    assert "| fp32 | 5 % | 2.00 | 1.00 | 1.11 | 1.12 |" in tables.page([met])
    # without that peer there is nothing to say about it
    page = tables.page([row("fusion", share=1.0, our_two_parts=1.05)])
    assert "| fp32 | 5 % | 2.00 | 1.00 |  | 1.12 | 1.05 [0.95-1.15] |" in page
    assert "relevance alone |" not in page.partition("Against the bars")[2]


def test_a_page_from_the_rows_of_a_file(tmp_path):
    page, rows = tmp_path / "page.md", tmp_path / "rows.json"
    page.write_text(f"before\n{MARKS[0]}\nold\n{MARKS[1]}\nafter\n")
    for content in ([row("relevance")], {"device": "a GPU", "kernels": [row("relevance")]}):
        rows.write_text(json.dumps(content))
        kernels.run(kernels.Config(rows=rows, page=page))
        text = page.read_text()
        assert "#### Relevance" in text and "old" not in text
        assert text.startswith("before\n") and text.endswith("after\n")


def test_a_page_without_marks_or_rows_of_something_else_are_refused(tmp_path):
    page, rows = tmp_path / "page.md", tmp_path / "rows.json"
    page.write_text("no marks")
    rows.write_text('[{"something": 1}]')
    with pytest.raises(LeamlError, match="has no line"):
        kernels.run(kernels.Config(rows=rows, page=page))
    with pytest.raises(LeamlError, match="wanted the rows that"):
        kernels.run(kernels.Config(rows=rows))
