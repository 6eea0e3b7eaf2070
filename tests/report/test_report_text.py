"""Terminal tables, and the summary a run ends with."""

import dataclasses

import pytest

from leaml_plugin.artifacts import write_records
from leaml_plugin.metrics import Estimate
from leaml_plugin.records import Skipped
from leaml_plugin.report import summary, table, write_report

ROWS = [
    {
        "method": "image-blind majority",
        "exact match": Estimate(0.36, 0.33, 0.39, 600, 200),
        "above blind": None,
        "seeds": 1,
    },
    {
        "method": "LEAML",
        "exact match": Estimate(0.0712, 0.05, 0.1, 600, 200),
        "above blind": Estimate(-0.2888, -0.31, 0.01, 600, 200),
        "seeds": 12,
    },
]


def test_columns_are_aligned():
    assert table(ROWS).split("\n") == [
        "method                exact match          above blind            seeds",
        "--------------------  -------------------  ---------------------  -----",
        "image-blind majority  36.0 (33.0 to 39.0)      –                      1",
        "LEAML                  7.1 (5.0 to 10.0)   −28.9 (−31.0 to +1.0)     12",
    ]


def test_estimates_may_come_as_json():
    plain = [{k: dataclasses.asdict(v) if isinstance(v, Estimate) else v for k, v in row.items()} for row in ROWS]
    assert table(plain) == table(ROWS)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"),
        (float("nan"), "–"),
        (True, "yes"),
        (3, "3"),
        (0.12345, "0.123"),
        (12345.6, "12346"),
        (1e-7, "1.00e-07"),
        ({"value": 0.5}, "50.0"),
        (Estimate(0.5, float("nan"), float("nan"), 1, 1), "50.0"),
        ("two\nlines \x1b[31mred", "two lines  [31mred"),
        ("ポリープ", "ポリープ"),
    ],
)
def test_values(value, shown):
    assert table([{"a": value}]).split("\n")[2].strip() == shown


def test_wide_letters_count_twice():
    lines = table([{"a": "ポリープ", "b": 1}, {"a": "polyp", "b": 22}]).split("\n")
    assert lines[2] == "ポリープ   1" and lines[3] == "polyp     22"


def test_no_rows_no_table_and_missing_cells_are_dashes():
    assert table([]) == ""
    assert table([{"a": 1}, {"b": "x"}]).split("\n")[2:] == ["1  –", "–  x"]


def test_summary_says_what_the_run_found(shared_run):
    text = summary(shared_run)
    assert "above it (points)" in text and "pseudo-QA" in text
    last = text.split("\n")[-1].split()
    assert last[:2] == ["all", "160"]
    assert int(last[1]) == sum(map(int, last[2:]))  # written = kept + every reason


def test_summary_of_a_run_with_nothing_to_say(make_run):
    assert summary(make_run(pictures=2, stages=("inputs",))) == ""


def test_summary_and_page_tell_how_many_pictures_were_left_out(make_run):
    run = make_run(pictures=4)
    assert "could not be used" not in summary(run)
    write_records(run.skipped, [Skipped(f"p{i}", (), "<b>truncated</b>") for i in range(3)])
    assert summary(run).endswith(f"3 unlabelled pictures could not be used; {run.skipped} tells why.")
    assert "3 unlabelled pictures could not be used" in write_report(run).read_text()
