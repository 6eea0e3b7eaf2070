"""Tables in files: sorted, added up and searched in blocks as they would be in memory."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leaml_plugin import tables
from leaml_plugin.tables import Index, Table, added_up, columns, in_order

NUMBERS = st.one_of(st.integers(-3, 3).map(float), st.sampled_from([np.nan, -np.inf, np.inf, 0.0, -0.0]))


def table_of(rows):
    return columns(
        a=np.array([a for a, _ in rows], np.int64),
        b=np.array([b for _, b in rows], np.float64),
        n=np.arange(len(rows), dtype=np.int64),
    )


def parts(rows, size):
    return [rows[i : i + size] for i in range(0, len(rows), size)]


@given(st.lists(st.tuples(st.integers(-2, 2), NUMBERS), max_size=60), st.integers(1, 9), st.integers(1, 20))
@settings(max_examples=300, deadline=None)
def test_sorting_in_runs_is_sorting_at_once(rows, run, size):
    """Equal rows stay in their order, whatever the runs and the blocks; NaN comes last."""
    whole = table_of(rows)
    for by in (("a", "b"), ("b",), ("n",)):
        want = whole[np.lexsort([whole[name] for name in reversed(by)])]
        out = list(in_order(parts(whole, size), by, run))
        got = np.concatenate([whole[:0], *out])
        assert got.tobytes() == want.tobytes()


@pytest.mark.parametrize("kind", ["random", "sorted", "reversed", "equal"])
def test_little_of_what_is_merged_is_in_memory(monkeypatch, kind):
    """Each round reads about as much as one run, and sorted runs are not sorted again and again."""
    count, run = 40_000, 1000
    a = {"random": np.random.default_rng(0).integers(0, 99, count), "sorted": np.arange(count)}
    a |= {"reversed": a["sorted"][::-1], "equal": np.zeros(count, np.int64)}
    rows = columns(a=a[kind], n=np.arange(count))
    sorted_rows, real = [], tables._order
    monkeypatch.setattr(tables, "_order", lambda rows, by: sorted_rows.append(len(rows)) or real(rows, by))
    out = list(in_order(parts(rows, 3000), ("a", "n"), run))
    assert np.concatenate(out).tobytes() == rows[np.lexsort([rows["n"], rows["a"]])].tobytes()
    assert max(sorted_rows) <= 40 * tables._LEAST and sum(sorted_rows) < 8 * count


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), max_size=40), st.integers(1, 7))
def test_rows_with_equal_keys_are_added_up_across_blocks(rows, size):
    whole = columns(k=np.array([k for k, _ in rows], np.int64), v=np.array([v for _, v in rows], np.int64))
    want = []
    for k, v in rows:
        if want and want[-1][0] == k:
            want[-1][1] += v
        else:
            want.append([k, v])
    got = [list(row) for block in added_up(parts(whole, size), ("k",)) for row in block.tolist()]
    assert got == want


def test_a_table_is_read_by_number_and_in_blocks():
    table = Table(table_of([]).dtype)
    assert len(table) == 0 and len(table.read(0, 5)) == 0 and list(table.blocks()) == []
    whole = table_of([(n, n / 2) for n in range(10)])
    for part in parts(whole, 4):
        table.append(part)
    assert len(table) == 10 and table.read(3, 99).tobytes() == whole[3:].tobytes()
    assert [len(block) for block in table.blocks(4)] == [4, 4, 2]
    assert len(table.read(10, 20)) == 0


@pytest.mark.parametrize("stride", [1, 2, 128])
@pytest.mark.parametrize("hashes", [None, 3])
def test_an_index_finds_the_first_item_of_each_text(monkeypatch, stride, hashes):
    monkeypatch.setattr(tables, "STRIDE", stride)
    monkeypatch.setattr(tables, "RUN", 7)
    if hashes:  # many texts to a hash
        monkeypatch.setattr(tables, "text_key", lambda text: len(text) % hashes)
    texts = [f"{n % 150:x}" * (n % 5 + 1) for n in range(400)]
    index = Index(texts, texts.__getitem__)
    assert [index.find(text) for text in texts] == [texts.index(text) for text in texts]
    assert index.find("other") is None and Index([], texts.__getitem__).find("0") is None
