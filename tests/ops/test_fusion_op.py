"""The fusion is its two parts, and the selective weight gradient is the rows of the whole one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    FFN_SLOTS,
    bad_values,
    dtypes,
    ffn_problem,
    grad_layouts,
    grad_scales,
    layouts,
    make_problem,
    random_rows,
    same_bits,
    shapes,
)

from leaml_plugin import ops

pytestmark = pytest.mark.usefixtures("native")

ALL = list(ops.CRITERIA)


def same_scores(got, wanted):
    """NaN and infinity in the same places; elsewhere within rounding of what was summed.

    ``[4, neurons]`` each, criteria as in ``ALL``. ``|sum w*g|`` cancels, so its error is measured by the absolute sums.
    """
    finite = wanted.isfinite()
    assert torch.equal(got.isnan(), wanted.isnan()) and torch.equal(got.isinf(), wanted.isinf())
    size = wanted.abs().nan_to_num(0.0, 0.0)
    size[0] = torch.maximum(size[0], size[1])
    assert ((got - wanted).abs() <= 1e-5 * size + 1e-5)[finite].all()


@settings(max_examples=120, deadline=None)
@given(
    shape_list=st.lists(shapes, min_size=1, max_size=3),
    dtype=dtypes,
    wide_grad=st.booleans(),
    layout=layouts,
    grad_layout=grad_layouts,
    grad_magnitude=grad_scales,
    bad=bad_values,
    density=st.sampled_from((0.0, 0.1, 1.0)),
    eight_bit=st.booleans(),
    precision=st.sampled_from(("nearest", "stochastic", "master")),
)
def test_the_fusion_equals_relevance_then_step(
    shape_list, dtype, wide_grad, layout, grad_layout, grad_magnitude, bad, density, eight_bit, precision
):
    """On each backend, and one backend's fusion the other's."""
    results = []
    for backend in ("native", "reference"):
        fused = make_problem(
            shape_list, dtype, torch.float32 if wide_grad else dtype, layout, density, eight_bit=eight_bit,
            master=precision == "master", grad_layout=grad_layout, grad_magnitude=grad_magnitude, bad=bad,
            stochastic_rounding=precision == "stochastic", grad_scale=torch.tensor(2.0),
        )  # fmt: skip
        parts = fused.copy()
        fused_out = [torch.ones(4, s[0]) for s in shape_list]
        parts_out = [torch.ones(4, s[0]) for s in shape_list]
        with ops.use_backend(backend):
            lists, options = fused.arguments()
            fused_norm = ops.relevance_sparse_adamw_(*lists, fused_out, criteria=ALL, **options)
            norm = ops.neuron_relevance_(
                parts.params, parts.grads, parts_out, criteria=ALL, grad_scale=torch.tensor(2.0)
            )  # fmt: skip
            parts.step(backend)
        for got, wanted in zip(fused.tensors(), parts.tensors()):
            assert same_bits(got, wanted)
        for got, wanted in zip([*fused_out, fused_norm], [*parts_out, norm]):
            assert same_bits(got, wanted)
        results.append((fused.tensors(), fused_out, fused_norm))
    (native_tensors, native_out, native_norm), (twin_tensors, twin_out, twin_norm) = results
    assert all(same_bits(got, wanted) for got, wanted in zip(native_tensors, twin_tensors))
    for got, wanted in zip(native_out, twin_out):
        same_scores(got, wanted)
    torch.testing.assert_close(native_norm, twin_norm, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("kind", [{}, {"master": True}, {"eight_bit": True}], ids=["fp32", "masters", "8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ffn_neurons_are_scored_across_their_three_weights(dtype, kind, backend):
    """Row i of gate and up and column i of down: one relevance, one step, as the two parts by themselves."""
    fused = ffn_problem(dtype, 70, 300, **kind)
    before, parts = fused.copy(), fused.copy()
    fused_out, parts_out = [torch.zeros(4, 70), torch.zeros(4, 70)], [torch.zeros(4, 70), torch.zeros(4, 70)]
    with ops.use_backend(backend):
        lists, options = fused.arguments()
        fused_norm = ops.relevance_sparse_adamw_(*lists, fused_out, criteria=ALL, slots=FFN_SLOTS, **options)
        triples = [[parts.params[3 * b], parts.params[3 * b + 1], parts.params[3 * b + 2].t()] for b in range(2)]
        weights, dims, own_slots = ops.ffn_parts(triples)
        grads, _, _ = ops.ffn_parts([[parts.grads[3 * b], parts.grads[3 * b + 1], parts.grads[3 * b + 2].t()]
                                     for b in range(2)])  # fmt: skip
        assert own_slots == FFN_SLOTS
        norm = ops.neuron_relevance_(weights, grads, parts_out, criteria=ALL, dims=dims, slots=own_slots)
        parts.step(backend)
    for got, wanted in zip([*fused.tensors(), *fused_out, fused_norm], [*parts.tensors(), *parts_out, norm]):
        assert same_bits(got, wanted)
    for block in range(2):  # against the definition, in fp64
        own = range(3 * block, 3 * block + 3)
        product = sum((before.params[i].double() * before.grads[i].double()).sum(1) for i in own)
        torch.testing.assert_close(fused_out[block][0].double(), product.abs(), rtol=1e-4, atol=1e-4)
        assert all(not torch.equal(fused.params[i], before.params[i]) for i in own)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ([0, 0], "slots: wanted one for each of the 3 weights, got 2"),
        ([0, 0, 1], r"slots\[2\]: wanted 0 to 0, got 1"),
        (None, "out: wanted one for each of the 3 params, got 1"),
    ],
)
def test_slots_that_do_not_fit_are_refused_before_anything_moves(slots, message, backend):
    problem, out = make_problem([(8, 40), (8, 40), (8, 3)]), torch.zeros(8)
    before = problem.copy()
    lists, options = problem.arguments()
    with ops.use_backend(backend), pytest.raises(ValueError, match=message):
        ops.relevance_sparse_adamw_(*lists, [out], slots=slots, **options)
    assert all(torch.equal(a, b) for a, b in zip(problem.tensors(), before.tensors()))


def test_weights_of_one_slot_must_have_the_same_neurons():
    problem = make_problem([(8, 40), (9, 40)])
    lists, options = problem.arguments()
    with pytest.raises(ValueError, match="slot 0: weight 1 has 9 neurons, an earlier part has 8"):
        ops.relevance_sparse_adamw_(*lists, [torch.zeros(8)], slots=[0, 0], **options)


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_found_inf_stops_both_parts(layout):
    problem = make_problem([(8, 40)], layout=layout, found_inf=torch.tensor(1.0))
    before, out = problem.copy(), [torch.zeros(8)]
    lists, options = problem.arguments()
    ops.relevance_sparse_adamw_(*lists, out, **options)
    assert out[0].count_nonzero() == 0
    assert all(torch.equal(a, b) for a, b in zip(problem.tensors(), before.tensors()))


@pytest.mark.parametrize(
    "kind",
    [{"stochastic_rounding": True}, {"master": True}, {"layout": "transposed", "eight_bit": True}],
    ids=["stochastic", "masters", "columns"],
)
def test_results_do_not_depend_on_the_number_of_threads(kind):
    """Items of several rows and of one: rows of 1.2 MB are more than half of what an item may hold."""
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            problem = make_problem([(600, 1500), (4, 300_000)], torch.float16, **kind)
            out = [torch.zeros(4, 600), torch.zeros(4, 4)]
            lists, options = problem.arguments()
            norm = ops.relevance_sparse_adamw_(*lists, out, criteria=ALL, **options)
            results.append([*problem.tensors(), *out, norm])
    finally:
        torch.set_num_threads(threads)
    assert all(o.gt(0).all() for o in results[0][-3:])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_reselecting_the_same_rows_is_a_numerical_no_op():
    """Every fifth step the scores pick the rows anew; where they pick the same, training goes on bit for bit."""
    steady, moving = make_problem([(50, 64)], density=0.2), make_problem([(50, 64)], density=0.2)
    scores = torch.zeros(50)
    scores[moving.rows[0]] = 1e9
    generator = torch.Generator().manual_seed(3)
    for number in range(20):
        grad = torch.randn(50, 64, generator=generator)
        steady.grads, moving.grads = [grad], [grad]
        steady.step("native")
        lists, options = moving.arguments()
        ops.relevance_sparse_adamw_(*lists, [scores], **options)
        if number % 5 == 4:
            (rows,) = ops.select_top([scores], 0.2)
            names = ["step", "exp_avg", "exp_avg_sq"]
            moved = ops.remap_rows(moving.rows[0], rows, [moving.states[0][n] for n in names], [0.0] * 3)
            moving.rows, moving.states = [rows], [dict(zip(names, moved))]
    assert torch.equal(steady.params[0], moving.params[0])


def test_a_compact_gradient_cannot_give_relevance():
    problem = make_problem([(8, 40)], compact=True)
    lists, options = problem.arguments()
    with pytest.raises(ValueError, match=r"gradient 0: wanted \[8, 40\], got \[2, 40\]"):
        ops.relevance_sparse_adamw_(*lists, [torch.zeros(8)], **options)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_one_out_for_two_weights_is_refused_before_anything_moves(backend):
    problem = make_problem([(8, 40), (8, 3)])
    before, out = problem.copy(), torch.zeros(8)
    lists, options = problem.arguments()
    with (
        ops.use_backend(backend),
        pytest.raises(ValueError, match="out 1: wanted memory of its own, got that of out 0"),
    ):
        ops.relevance_sparse_adamw_(*lists, [out, out], **options)
    assert out.count_nonzero() == 0
    assert all(torch.equal(a, b) for a, b in zip(problem.tensors(), before.tensors()))


def test_the_squared_norm_clips_as_clip_grad_norm_does():
    params = [torch.randn(30, 40), torch.randn(17)]
    grads = [torch.randn(30, 40), torch.randn(17)]
    sqnorm = ops.neuron_relevance_(params, grads, [torch.zeros(30), torch.zeros(17)])
    for param, grad in zip(params, grads):
        param.grad = grad.clone()
    norm = torch.nn.utils.clip_grad_norm_(params, 1.5)
    torch.testing.assert_close(sqnorm.sqrt(), norm)
    torch.testing.assert_close(grads[0] * ops.clip_coefficient(sqnorm, 1.5), params[0].grad)
    assert ops.clip_coefficient(sqnorm, 1e9).item() == 1.0


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.sampled_from(((), (1,), (3, 5), (0,), (2, 3, 4))),
    sizes=st.tuples(st.sampled_from((1, 8, 33)), st.sampled_from((1, 16, 31))),
    density=st.sampled_from((0.0, 0.3, 1.0)),
    dtype=dtypes,
)
def test_the_weight_gradient_of_the_selected_rows(tokens, sizes, density, dtype):
    width, neurons = sizes
    x, grad = torch.randn(*tokens, width).to(dtype), torch.randn(*tokens, neurons).to(dtype)
    rows = random_rows(neurons, ops.selected_count(density, neurons), 0)
    whole = grad.double().reshape(-1, neurons).t() @ x.double().reshape(-1, width)
    got = ops.selected_weight_grad(x, grad, rows)
    assert got.shape == (rows.numel(), width) and got.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-2}[dtype]
    torch.testing.assert_close(got.double(), whole[rows], rtol=tolerance, atol=tolerance)


def test_the_weight_gradient_is_differentiable_and_compiles():
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(6, 7, dtype=torch.float64, requires_grad=True)
    rows = torch.tensor([1, 4])
    assert torch.autograd.gradcheck(lambda a, b: ops.selected_weight_grad(a, b, rows), (x, grad))
    compiled = torch.compile(ops.selected_weight_grad, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, grad, rows), ops.selected_weight_grad(x, grad, rows))
