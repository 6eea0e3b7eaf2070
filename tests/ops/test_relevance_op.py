"""Neuron relevance: compiled code and twin against fp64, accumulation, FFN granularity, AMP, bad values."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DTYPES, bad_values, dtypes, grad_layouts, grad_scales, layouts, random_matrix, shapes

from leaml_plugin import LeamlError, ops
from leaml_plugin.ops import reference

ALL = list(ops.CRITERIA)
pytestmark = pytest.mark.usefixtures("native")


def exact(weights, grads, dims, slots, sizes):
    """The three sums per slot in fp64, ``[3, neurons]`` each."""
    sums = [torch.zeros(3, n, dtype=torch.float64) for n in sizes]
    for w, g, dim, slot in zip(weights, grads, dims, slots):
        w, g = reference.as_rows(w).double(), reference.as_rows(g).double()
        sums[slot] += torch.stack([(w * g).sum(1 - dim), (w * g).abs().sum(1 - dim), (g * g).sum(1 - dim)])
    return sums


def close(got, wanted, tolerance):
    """NaN and infinity (of what fp32 cannot hold) in the same places, all else within ``tolerance`` of fp64."""
    assert torch.equal(got.isnan(), wanted.isnan())
    largest = torch.finfo(torch.float32).max
    edge = (wanted.abs() / largest - 1).abs() < 1e-4  # may round to either side
    infinite = wanted.abs() > largest
    assert torch.equal(got.isinf()[~edge], infinite[~edge])
    rest = ~(wanted.isnan() | infinite | edge)
    assert ((got.double() - wanted).abs() <= tolerance)[rest].all()


def check(out, sums, sqnorm, rtol=2e-6):
    for target, (wg, abs_wg, gg) in zip(out, sums):
        # |sum w*g| cancels: its error is bounded by what was summed, not by the result
        close(target[0], wg.abs(), rtol * abs_wg + 1e-30)
        close(target[1], abs_wg, rtol * abs_wg + 1e-30)
        # squares below 1e-38 have few bits or none
        close(target[2], gg, rtol * gg + 1e-38)
        overflows = gg > torch.finfo(torch.float32).max
        close(target[3], torch.where(overflows, torch.inf, gg.sqrt()), rtol * gg.sqrt() + 1e-19)
    total = sum(s[2].sum() for s in sums)
    close(sqnorm, total, rtol * total + 1e-36)


@settings(max_examples=150, deadline=None)
@given(
    shape_list=st.lists(shapes, min_size=1, max_size=4),
    dtype=dtypes,
    wide_grad=st.booleans(),
    layout=layouts,
    grad_layout=grad_layouts,
    grad_magnitude=grad_scales,
    bad=bad_values,
    dim=st.sampled_from((0, 1)),
    backend=st.sampled_from(("native", "reference")),
    seed=st.integers(0, 2**20),
)
def test_every_shape_dtype_stride_and_magnitude(
    shape_list, dtype, wide_grad, layout, grad_layout, grad_magnitude, bad, dim, backend, seed
):
    weights = [random_matrix(s, dtype, layout, seed + i) for i, s in enumerate(shape_list)]
    grad_dtype = torch.float32 if wide_grad else dtype
    grads = [
        random_matrix(s, grad_dtype, grad_layout, seed + 100 + i, grad_magnitude, bad) for i, s in enumerate(shape_list)
    ]
    sizes = [s[dim] for s in shape_list]
    out = [torch.zeros(4, n) for n in sizes]
    with ops.use_backend(backend):
        sqnorm = ops.neuron_relevance_(weights, grads, out, criteria=ALL, dims=dim)
    count = len(weights)
    check(out, exact(weights, grads, [dim] * count, range(count), sizes), sqnorm)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_every_half_precision_number_is_read_exactly(dtype):
    """All 65,536 bit patterns through the vectorised conversions (as the only element of a row)."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    for grads in (patterns.reshape(-1, 1), patterns.reshape(-1, 64)):
        weights, out = torch.ones_like(grads), torch.zeros(grads.shape[0])
        ops.neuron_relevance_([weights], [grads], [out], criteria="taylor_abs")
        expected = grads.float().abs().double().sum(1).float()
        torch.testing.assert_close(out, expected, rtol=1e-6, atol=0, equal_nan=True)
        out = torch.zeros(grads.shape[0])  # the same as columns of contiguous rows
        columns = grads.t().contiguous()
        ops.neuron_relevance_([torch.ones_like(columns)], [columns], [out], criteria="taylor_abs", dims=1)
        torch.testing.assert_close(out, expected, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_criterion_takes_a_vector_and_equals_its_row(dtype, dim):
    """With and without the absolute sums: another loop, the same bits."""
    w, g = random_matrix((77, 130), dtype, "contiguous", 0), random_matrix((77, 130), dtype, "padded", 1)
    table = torch.zeros(4, w.shape[dim])
    ops.neuron_relevance_([w], [g], [table], criteria=ALL, dims=dim)
    for name, row in zip(ALL, table):
        out = torch.zeros(w.shape[dim])
        ops.neuron_relevance_([w], [g], [out], criteria=name, dims=dim)
        assert torch.equal(out, row)


@pytest.mark.parametrize("dtype", DTYPES)
def test_columns_do_not_depend_on_the_strip_they_are_summed_in(dtype):
    """A matrix of its own, and among others, where strips are wider."""
    w, g = random_matrix((70, 5000), dtype, "contiguous", 0), random_matrix((70, 5000), dtype, "contiguous", 1)
    alone, among = torch.zeros(5000), torch.zeros(5000)
    ops.neuron_relevance_([w], [g], [alone], dims=1)
    others = [torch.zeros(5000) for _ in range(7)]
    ops.neuron_relevance_([w] * 8, [g] * 8, [among, *others], dims=1)
    assert torch.equal(alone, among)
    expected = (w.double() * g.double()).sum(0)
    bound = 1e-5 * (w.double() * g.double()).abs().sum(0)
    assert ((alone - expected.abs()).abs() <= bound).all()


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_micro_batches_accumulate_in_place(backend):
    w = random_matrix((5, 40), torch.bfloat16, "contiguous", 0)
    batches = [random_matrix((5, 40), torch.bfloat16, "contiguous", seed) for seed in (1, 2, 3)]
    out = torch.full((5,), 0.5)
    with ops.use_backend(backend):
        for g in batches:
            ops.neuron_relevance_([w], [g], [out])
    expected = 0.5 + sum((w.double() * g.double()).sum(1).abs() for g in batches)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    hidden=st.sampled_from((1, 3, 64, 257)),
    inner=st.sampled_from((0, 1, 5, 512, 515, 1100)),
    dtype=dtypes,
    layout=layouts,
    backend=st.sampled_from(("native", "reference")),
)
def test_ffn_neuron_is_gate_row_up_row_and_down_column(hidden, inner, dtype, layout, backend):
    def triples(seed):
        return [
            (
                random_matrix((inner, hidden), dtype, layout, seed + 10 * layer),
                random_matrix((inner, hidden), dtype, layout, seed + 10 * layer + 1),
                random_matrix((hidden, inner), dtype, layout, seed + 10 * layer + 2),
            )
            for layer in range(2)
        ]

    weights, dims, slots = ops.ffn_parts(triples(0))
    grads, _, _ = ops.ffn_parts(triples(500))
    out = [torch.zeros(4, inner) for _ in range(2)]
    with ops.use_backend(backend):
        sqnorm = ops.neuron_relevance_(weights, grads, out, criteria=ALL, dims=dims, slots=slots)
    check(out, exact(weights, grads, dims, slots, [inner] * 2), sqnorm)


def test_long_columns_keep_their_precision():
    w, g = torch.full((20000, 3), 1.0), torch.full((20000, 3), 0.1)
    out = torch.zeros(3)
    ops.neuron_relevance_([w], [g], [out], dims=1)
    expected = torch.full((3,), 20000 * float(g[0, 0]), dtype=torch.float64)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=0)  # one running fp32 sum is off by 1e-4


def test_a_bias_is_one_input_wide():
    w, g, out = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 0.5]), torch.zeros(2)
    ops.neuron_relevance_([w], [g], [out])
    assert out.tolist() == [3.0, 1.0]


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_grad_scale_and_found_inf(backend):
    w, g = (
        random_matrix((6, 33), torch.float32, "contiguous", 0),
        random_matrix((6, 33), torch.float32, "contiguous", 1),
    )
    plain, scaled, skipped = torch.zeros(4, 6), torch.zeros(4, 6), torch.zeros(4, 6)
    with ops.use_backend(backend):
        norm = ops.neuron_relevance_([w], [g], [plain], criteria=ALL)
        norm2 = ops.neuron_relevance_([w], [g * 1024], [scaled], criteria=ALL, grad_scale=torch.tensor(1024.0))
        g[2, 3] = torch.inf
        ops.neuron_relevance_([w], [g], [skipped], criteria=ALL, found_inf=torch.tensor([1.0]))
    torch.testing.assert_close(plain, scaled)
    torch.testing.assert_close(norm, norm2)
    assert skipped.count_nonzero() == 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_bad_gradient_spoils_its_neuron_only(bad, dtype, backend):
    w, g = random_matrix((4, 70), dtype, "contiguous", 0), random_matrix((4, 70), dtype, "contiguous", 1)
    g[2, 40] = bad
    out = torch.zeros(4, 4)
    with ops.use_backend(backend):
        sqnorm = ops.neuron_relevance_([w], [g], [out], criteria=ALL)
    assert not out[:, 2].isfinite().any()
    assert out[:, [0, 1, 3]].isfinite().all()
    assert not sqnorm.isfinite()


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "every_other"])
def test_results_do_not_depend_on_the_number_of_threads(layout):
    weights = [random_matrix((300, 700), torch.bfloat16, layout, i) for i in range(3)]
    grads = [random_matrix((300, 700), torch.bfloat16, layout, 9 + i) for i in range(3)]
    square = [random_matrix((400, 400), torch.bfloat16, layout, 20 + i) for i in range(6)]
    results = []
    threads = torch.get_num_threads()
    try:
        for count, dim in itertools.product((1, 2, 5), (0, 1, "ffn")):
            torch.set_num_threads(count)
            if dim == "ffn":
                out = [torch.zeros(4, 400)]
                norm = ops.neuron_relevance_(square[:3], square[3:], out, criteria=ALL, dims=[0, 0, 1], slots=[0] * 3)
            else:
                out = [torch.zeros(4, (300, 700)[dim]) for _ in weights]
                norm = ops.neuron_relevance_(weights, grads, out, criteria=ALL, dims=dim)
            results.append((dim, torch.cat(out, 1), norm))
    finally:
        torch.set_num_threads(threads)
    for dim in (0, 1, "ffn"):
        same = [(o, n) for d, o, n in results if d == dim]
        assert same[0][0].gt(0).all()
        assert all(torch.equal(same[0][0], o) and torch.equal(same[0][1], n) for o, n in same)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("many", [False, True])
def test_one_out_for_two_weights_is_refused(backend, many):
    """Two threads would add to it at once; what slots= joins is one tensor once, and empty tensors are nobody's."""
    count = 40 if many else 2
    weights = [torch.ones(4, 3)] * count
    shared = torch.zeros(4)
    out = [torch.zeros(4) for _ in range(count - 1)] + [shared]
    out[0] = shared
    message = f"out {count - 1}: wanted memory of its own, got that of out 0; weights of the same .* slots="
    with ops.use_backend(backend):
        with pytest.raises(ValueError, match=message):
            ops.neuron_relevance_(weights, weights, out)
        assert all(o.count_nonzero() == 0 for o in out)
        ops.neuron_relevance_(weights, weights, [shared], slots=[0] * count)
        assert shared.tolist() == [3.0 * count] * 4
        empty = torch.zeros(0)
        ops.neuron_relevance_([torch.ones(0, 3)] * 2, [torch.ones(0, 3)] * 2, [empty, empty])
    operator = torch.ops.leaml.neuron_relevance_ if backend == "native" else reference.neuron_relevance_
    with pytest.raises(RuntimeError, match=message):
        operator(weights, weights, [o.unsqueeze(0) for o in out], [0], [0] * count, list(range(count)), None, None)


def test_empty_list():
    assert ops.neuron_relevance_([], [], []).item() == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out": [torch.zeros(5)]}, r"out 0: wanted shape \[4\], got \[5\]"),
        ({"out": [torch.zeros(4, dtype=torch.bfloat16)]}, "out 0: wanted float32"),
        ({"grads": [torch.zeros(4, 5)]}, r"gradient 0: wanted \[4, 3\], got \[4, 5\]"),
        ({"grads": [torch.zeros(4, 3, dtype=torch.bfloat16)]}, "gradient 0: wanted its weight's"),
        ({"weights": [torch.zeros(4, 3, dtype=torch.int32)]}, "weight 0: wanted float32, bfloat16 or float16"),
        ({"dims": 2}, r"dims\[0\]: wanted 0 or 1"),
        ({"slots": [1]}, r"slots\[0\]: wanted 0 to 0, got 1"),
        ({"grads": []}, "grads: wanted one for each of the 1 weights, got 0"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {"weights": [torch.zeros(4, 3)], "grads": [torch.zeros(4, 3)], "out": [torch.zeros(4)], **change}
    with pytest.raises(ValueError, match=message):
        ops.neuron_relevance_(**arguments)


def test_unknown_criterion_is_suggested():
    with pytest.raises(LeamlError, match="did you mean 'taylor'"):
        ops.neuron_relevance_([torch.zeros(1, 1)], [torch.zeros(1, 1)], [torch.zeros(1)], criteria="tailor")


def test_the_op_checks_what_reaches_it_without_the_wrapper():
    w = torch.zeros(4, 3)
    with pytest.raises(RuntimeError, match=r"gradient 0: wanted \[4, 3\] like its weight, got \[4, 2\]"):
        torch.ops.leaml.neuron_relevance_([w], [torch.zeros(4, 2)], [torch.zeros(1, 4)], [0], [0], [0], None, None)
    with pytest.raises(RuntimeError, match="criteria: wanted codes 0 to 3, got 9"):
        torch.ops.leaml.neuron_relevance_([w], [w], [torch.zeros(1, 4)], [9], [0], [0], None, None)
