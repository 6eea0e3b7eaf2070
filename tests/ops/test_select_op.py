"""Selection: exact counts, ties by index, scopes, NaN, against a sort in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leaml_plugin import LeamlError, ops

pytestmark = pytest.mark.usefixtures("native")

BACKENDS = ("native", "reference")
# few distinct values, so that ties are the rule
numbers = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5, 1e-40, -1e-40, 3e38, math.inf, -math.inf, math.nan])


def by_sorting(vectors, ids, counts):
    """Python's sort as the oracle: highest score first, then the lower position."""
    entries = [
        (group, -math.inf if math.isnan(x) else x, position)
        for position, (group, x) in enumerate(
            (group, x) for group, vector in zip(ids, vectors) for x in vector.tolist()
        )
    ]
    chosen = set()
    for group, count in enumerate(counts):
        own = sorted((e for e in entries if e[0] == group), key=lambda e: (-e[1], e[2]))
        chosen |= {position for _, _, position in own[:count]}
    result, start = [], 0
    for vector in vectors:
        n = vector.numel()
        result.append([p - start for p in sorted(chosen) if start <= p < start + n])
        start += n
    return result


@settings(max_examples=200, deadline=None)
@given(
    lists=st.lists(st.lists(numbers, max_size=12), min_size=1, max_size=5),
    density=st.sampled_from((0.0, 0.1, 0.25, 0.5, 0.9, 1.0)),
    scope=st.sampled_from(("layer", "group", "model")),
    backend=st.sampled_from(BACKENDS),
    data=st.data(),
)
def test_against_a_sort(lists, density, scope, backend, data):
    vectors = [torch.tensor(values, dtype=torch.float32) for values in lists]
    count = len(vectors)
    groups = data.draw(st.lists(st.integers(5, 7), min_size=count, max_size=count)) if scope == "group" else None
    ids = {"layer": list(range(count)), "model": [0] * count, "group": groups}[scope]
    order = list(dict.fromkeys(ids))
    ids = [order.index(i) for i in ids]
    counts = [
        ops.selected_count(density, sum(v.numel() for v, i in zip(vectors, ids) if i == g)) for g in range(len(order))
    ]
    with ops.use_backend(backend):
        chosen = ops.select_top(vectors, density, scope=scope, groups=groups)
    assert [rows.tolist() for rows in chosen] == by_sorting(vectors, ids, counts)
    assert all(rows.dtype == torch.int64 for rows in chosen)


@pytest.mark.parametrize("size", [4095, 4096, 70001])
def test_long_vectors_take_the_histogram_path(size):
    scores = (torch.randn(size, generator=torch.Generator().manual_seed(0)) * 4).round() / 8
    with ops.use_backend("reference"):
        wanted = ops.select_top([scores, scores[:100].clone()], 0.1, scope="model")
    got = ops.select_top([scores, scores[:100].clone()], 0.1, scope="model")
    assert all(torch.equal(a, b) for a, b in zip(got, wanted))


@pytest.mark.parametrize(
    ("density", "neurons", "count"), [(0, 9, 0), (1, 9, 9), (0.1, 4, 1), (0.1, 25, 3), (0.5, 0, 0)]
)
def test_counts(density, neurons, count):
    assert ops.selected_count(density, neurons) == count


def test_all_nan_still_fills_the_count_by_index():
    assert ops.select_top([torch.full((6,), math.nan)], 0.5)[0].tolist() == [0, 1, 2]


def test_bad_arguments_are_named():
    with pytest.raises(LeamlError, match="did you mean 'layer'"):
        ops.select_top([torch.zeros(2)], 0.5, scope="layers")
    with pytest.raises(ValueError, match="density: wanted a fraction"):
        ops.select_top([torch.zeros(2)], 10)
    with pytest.raises(ValueError, match="groups: wanted with scope='group'"):
        ops.select_top([torch.zeros(2)], 0.5, scope="group")
    with pytest.raises(RuntimeError, match="counts 0: wanted 0 to 2, got 3"):
        torch.ops.leaml.select_top([torch.zeros(2)], [0], [3])
