"""Sparse AdamW: compiled code against twin bit for bit, against torch.optim.AdamW, and what must not move."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    DTYPES,
    bad_values,
    bits,
    dtypes,
    grad_layouts,
    grad_scales,
    laid_out,
    layouts,
    make_problem,
    random_rows,
    same_bits,
    shapes,
)

from leaml_plugin import ops
from leaml_plugin.ops import reference

pytestmark = pytest.mark.usefixtures("native")

BACKENDS = ("native", "reference")


@settings(max_examples=200, deadline=None)
@given(
    shape_list=st.lists(shapes, min_size=1, max_size=3),
    dtype=dtypes,
    wide_grad=st.booleans(),
    layout=layouts,
    grad_layout=grad_layouts,
    grad_magnitude=grad_scales,
    bad=bad_values,
    density=st.sampled_from((0.0, 0.05, 0.3, 1.0)),
    compact=st.booleans(),
    eight_bit=st.booleans(),
    precision=st.sampled_from(("nearest", "stochastic", "master")),
    maximize=st.booleans(),
    scaled=st.booleans(),
    tensor_lr=st.booleans(),
    seed=st.integers(0, 2**40),
)
def test_compiled_code_equals_its_twin_bit_for_bit(
    shape_list, dtype, wide_grad, layout, grad_layout, grad_magnitude, bad, density, compact, eight_bit, precision,
    maximize, scaled, tensor_lr, seed,
):  # fmt: skip
    problem = make_problem(
        shape_list,
        dtype,
        torch.float32 if wide_grad else dtype,
        layout,
        density,
        compact,
        eight_bit,
        master=precision == "master",
        seed=seed % 1000,
        grad_layout=grad_layout,
        grad_magnitude=grad_magnitude,
        bad=bad,
        stochastic_rounding=precision == "stochastic",
        maximize=maximize,
    )
    problem.options["seed"] = seed
    if tensor_lr:
        problem.options["lr"] = torch.tensor([3e-3])
    if scaled:
        problem.options |= {"clip_coef": torch.tensor(0.37), "grad_scale": torch.tensor(3.0)}
        problem.options["found_inf"] = torch.tensor([0.0])
    twin = problem.copy()
    for _ in range(3):
        problem.step("native")
        twin.step("reference")
    for got, wanted in zip(problem.tensors(), twin.tensors()):
        assert same_bits(got, wanted)


@pytest.mark.parametrize("state", ["fp32", "eight_bit", "master", "stochastic"])
@pytest.mark.parametrize("gradient", ["across", "compact", "compact across", "every other"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_columns_of_a_weight_take_the_step_of_rows(dtype, gradient, state):
    """The transposed view of a weight, as FFN granularity trains it, against the same rows lying in memory one by one:
    many more rows and elements than are taken at once, and rows of different ages."""
    options = {
        "eight_bit": state == "eight_bit",
        "master": state == "master",
        "stochastic_rounding": state == "stochastic",
        "compact": gradient.startswith("compact"),
    }
    rows = make_problem([(130, 1030), (70, 40)], dtype, density=0.6, weight_decay=0.1, **options)
    for ages in (s["step"] for s in rows.states):
        ages.copy_(torch.arange(len(ages)) % 3 * 10)
    columns = rows.copy()
    columns.params = [laid_out(p, "transposed") for p in columns.params]
    layout = {"compact": "contiguous", "every other": "every_other"}.get(gradient, "transposed")
    columns.grads = [laid_out(g, layout) for g in columns.grads]
    for _ in range(3):
        rows.step("native")
        columns.step("native")
    for got, wanted in zip(columns.tensors(), rows.tensors()):
        assert torch.equal(bits(got), bits(wanted))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("maximize", [False, True])
def test_a_thousand_steps_of_torch_adamw(backend, maximize):
    shapes_ = [(40, 37), (8, 300), (25, 1)]
    problem = make_problem(shapes_, density=0.4, weight_decay=0.05, maximize=maximize)
    rows, initial = problem.rows, [p.clone() for p in problem.params]
    theirs = [p[r].clone().requires_grad_(True) for p, r in zip(problem.params, rows)]
    optimizer = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.05, maximize=maximize, foreach=False)
    generator = torch.Generator().manual_seed(5)
    for _ in range(1000):
        problem.grads = [torch.randn(*s, generator=generator) for s in shapes_]
        problem.step(backend)
        for param, grad, index in zip(theirs, problem.grads, rows):
            param.grad = grad[index]
        optimizer.step()
    for param, other, index, before, state in zip(problem.params, theirs, rows, initial, problem.states):
        torch.testing.assert_close(param[index], other.detach(), rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(state["exp_avg_sq"], optimizer.state[other]["exp_avg_sq"], rtol=1e-5, atol=1e-9)
        untouched = torch.ones(param.shape[0], dtype=torch.bool)
        untouched[index] = False
        assert torch.equal(param[untouched], before[untouched])


@settings(max_examples=60, deadline=None)
@given(
    shape=shapes,
    dtype=dtypes,
    layout=layouts,
    density=st.sampled_from((0.0, 0.1, 0.5)),
    backend=st.sampled_from(BACKENDS),
    eight_bit=st.booleans(),
    stochastic=st.booleans(),
)
def test_other_rows_and_the_memory_between_rows_keep_their_bits(
    shape, dtype, layout, density, backend, eight_bit, stochastic
):
    problem = make_problem([shape], dtype, None, layout, density, eight_bit=eight_bit, stochastic_rounding=stochastic)
    param, index = problem.params[0], problem.rows[0]
    storage = torch.empty(0, dtype=dtype).set_(param.untyped_storage())
    before, storage_before = param.clone(), storage.clone()
    problem.step(backend)
    untouched = torch.ones(shape[0], dtype=torch.bool)
    untouched[index] = False
    assert torch.equal(bits(param[untouched]), bits(before[untouched]))
    gaps = torch.ones_like(storage, dtype=torch.bool)
    gaps.as_strided(param.shape, param.stride(), param.storage_offset()).fill_(False)
    assert torch.equal(bits(storage[gaps]), bits(storage_before[gaps]))


def test_a_compact_gradient_is_the_dense_one():
    dense = make_problem([(60, 130)], torch.bfloat16, density=0.2)
    compact = dense.copy()
    compact.grads = [g[r] for g, r in zip(dense.grads, dense.rows)]
    dense.step("native")
    compact.step("native")
    assert all(torch.equal(a, b) for a, b in zip(dense.tensors(), compact.tensors()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_columns_through_a_transposed_view(backend):
    """The down projection of an FFN neuron is a column: sparse AdamW runs on ``weight.t()``."""
    columns = make_problem([(70, 33)], density=0.2)
    plain = columns.copy()
    weight = columns.params[0].t().contiguous()
    columns.params, columns.grads = [weight.t()], [columns.grads[0].t().contiguous().t()]
    columns.step(backend)
    plain.step(backend)
    assert torch.equal(weight.t(), plain.params[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("eight_bit", [False, True])
def test_found_inf_changes_nothing(backend, eight_bit):
    problem = make_problem([(9, 300)], torch.float16, eight_bit=eight_bit, found_inf=torch.tensor([1.0]))
    problem.grads[0][:, 3] = torch.inf
    before = problem.copy()
    problem.step(backend)
    assert all(torch.equal(a, b) for a, b in zip(problem.tensors(), before.tensors()))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("eight_bit", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bad_gradient_spoils_its_element_or_its_block(bad, eight_bit, backend):
    problem = make_problem([(6, 600)], density=1.0, eight_bit=eight_bit)
    problem.grads[0][2, 300] = bad
    problem.step(backend)
    state = problem.states[0]
    assert problem.params[0][2, 300].isnan()
    problem.grads[0][2, 300] = 0.0
    problem.step(backend)
    wrong = problem.params[0].isnan()
    if eight_bit:
        assert state["exp_avg_sq_scale"][2].isnan().tolist() == [False, True, False]
        expected = torch.zeros(6, 600, dtype=torch.bool)
        expected[2, 256:512] = True
        assert torch.equal(wrong, expected)
    else:
        assert wrong.nonzero().tolist() == [[2, 300]]


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("master", [False, True])
def test_nan_has_the_same_bits_in_every_path(dtype, master):
    """In vectors, in what is left of them at a row's end, and in rows that are not contiguous."""
    seen = set()
    for layout, sign in itertools.product(("contiguous", "every_other"), (1.0, -1.0)):
        problem = make_problem([(3, 71)], dtype, density=1.0, layout=layout, master=master)
        problem.grads[0].fill_(sign * torch.inf)
        problem.step("native")
        assert problem.params[0].isnan().all()
        seen |= set(bits(problem.params[0]).view(torch.int16).tolist())
    assert len(seen) == 1


THREADED = {
    "packed": {"eight_bit": True, "stochastic_rounding": True},
    "masters": {"master": True},
    "compact": {"compact": True, "stochastic_rounding": True},
    "columns": {"layout": "transposed", "eight_bit": True, "stochastic_rounding": True},
    "columns, masters": {"layout": "transposed", "master": True},
    "columns, compact": {"layout": "transposed", "compact": True, "grad_layout": "contiguous"},
    "strided": {"layout": "every_other", "grad_layout": "padded"},
}


@pytest.mark.parametrize("case", list(THREADED))
def test_results_do_not_depend_on_the_number_of_threads(case):
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            problem = make_problem([(300, 700)] * 3, torch.bfloat16, **THREADED[case])
            for _ in range(3):
                problem.step("native")
            results.append(problem.tensors())
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_the_seed_decides_the_rounding():
    def run(seed):
        problem = make_problem([(20, 100)], torch.bfloat16, density=1.0, stochastic_rounding=True)
        problem.options["seed"] = seed
        problem.step("native")
        return problem.params[0]

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    assert not torch.equal(run(1), run(1 + 2**32))


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("value", [1.0013, -3.14159, 1e-6, 3e-7, -2e-8, 65519.0, 0.0])
def test_stochastic_rounding_is_unbiased_and_lands_on_a_neighbour(dtype, value):
    count = 1 << 16
    key = reference.row_key(3, 0, torch.zeros(1, dtype=torch.int64), torch.ones(1))
    rounded = reference.round_stochastically(torch.full((1, count), value), dtype, reference.random_bits(key, count, 0))
    values = rounded.double().unique()
    exact = float(torch.tensor(value, dtype=torch.float32))
    assert len(values) <= 2
    if len(values) == 2:
        low, high = values.tolist()
        assert low <= exact <= high
        if dtype == torch.float16 and high == torch.inf:
            return
        tolerance = 4 * (high - low) / count**0.5
        assert abs(rounded.double().mean().item() - exact) < tolerance
    else:
        assert values.item() == exact


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_small_updates_survive_in_half_precision(dtype):
    """lr below half a unit in the last place: lost by rounding to nearest, kept by master rows and by chance."""

    def moved(**options):
        master = options.pop("master", False)
        problem = make_problem(
            [(8, 512)], dtype, torch.float32, density=1.0, master=master, weight_decay=0.0, **options
        )
        problem.params[0].fill_(1.0)
        if master:
            problem.states[0]["master"].fill_(1.0)
        problem.grads = [torch.ones(8, 512)]
        problem.options["lr"] = 1e-5
        for _ in range(400):
            problem.step("native")
        return 1.0 - problem.params[0].double().mean().item()

    assert moved() == 0.0
    assert moved(master=True) == pytest.approx(400e-5, rel=0.5)  # the weight's own spacing: 2^-8 or 2^-11
    assert moved(stochastic_rounding=True) == pytest.approx(400e-5, rel=0.1)


def test_eight_bit_states_follow_a_decaying_second_moment():
    """What a bf16 second moment cannot do: forget. 3,000 steps at beta2 = 0.999 leave e^-3 of a burst."""
    problem = make_problem([(16, 1024)], density=1.0, eight_bit=True, lr=0.0)
    torch.manual_seed(0)
    problem.grads = [torch.randn(16, 1024)]
    problem.step("native")
    state = problem.states[0]

    def second_moment():
        return reference.dequantize(state["exp_avg_sq"], state["exp_avg_sq_scale"], signed=False).double()

    start = second_moment().sum(1)
    problem.grads = [torch.zeros(16, 1024)]
    for _ in range(3000):
        problem.step("native")
    torch.testing.assert_close(
        second_moment().sum(1) / start, torch.full((16,), 0.999**3000).double(), rtol=0.1, atol=0
    )


def test_eight_bit_training_ends_where_fp32_states_end():
    target = torch.randn(32, 512, generator=torch.Generator().manual_seed(1))
    losses = []
    for eight_bit in (False, True):
        problem = make_problem([(32, 512)], density=1.0, eight_bit=eight_bit, weight_decay=0.0, lr=3e-2)
        for _ in range(300):
            problem.grads = [problem.params[0] - target]
            problem.step("native")
        losses.append(((problem.params[0] - target) ** 2).mean().item())
    assert losses[1] < max(4 * losses[0], 1e-2)


def test_each_row_has_its_own_age():
    problem = make_problem([(10, 20)], density=1.0)
    problem.states[0]["step"][:5] = 99.0
    fresh = make_problem([(10, 20)], density=1.0)
    problem.step("native")
    fresh.step("native")
    assert torch.equal(problem.params[0][5:], fresh.params[0][5:])
    assert not torch.equal(problem.params[0][:5], fresh.params[0][:5])
    assert problem.states[0]["step"].tolist() == [100.0] * 5 + [1.0] * 5


def test_remapped_state_survives_and_new_rows_start_at_zero():
    old, new = torch.tensor([1, 4, 6, 9]), torch.tensor([0, 4, 5, 9])
    values = torch.arange(8.0).reshape(4, 2)
    (moved,) = ops.remap_rows(old, new, [values], [128.0])
    assert moved.tolist() == [[128.0, 128.0], [2.0, 3.0], [128.0, 128.0], [6.0, 7.0]]
    assert ops.remap_rows(old, old.clone(), [values], [0.0])[0] is values
    assert ops.remap_rows(old[:0], new, [values[:0]], [0.0])[0].tolist() == [[0.0, 0.0]] * 4


def test_state_bytes_are_proportional_to_density():
    param = torch.zeros(1000, 512)
    for density, eight_bit in itertools.product((0.05, 0.1, 0.2), (False, True)):
        k = ops.selected_count(density, 1000)
        state = ops.new_state(param, random_rows(1000, k, 0), eight_bit=eight_bit)
        size = sum(t.numel() * t.element_size() for t in state.values())
        assert size == k * (4 + (512 * 2 + 2 * 2 * 4 if eight_bit else 512 * 8))


def test_the_version_counter_notices():
    problem = make_problem([(4, 4)])
    version = problem.params[0]._version
    problem.step("native")
    assert problem.params[0]._version > version


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_states_are_refused(dtype):
    problem = make_problem([(4, 4)])
    problem.states[0]["exp_avg_sq"] = problem.states[0]["exp_avg_sq"].to(dtype)
    with pytest.raises(ValueError, match="never decays"):
        problem.step("native")
    lists, _ = problem.arguments()
    with pytest.raises(RuntimeError, match="cannot decay at beta2"):
        torch.ops.leaml.sparse_adamw_(
            *lists, [], [], [], None, None, None, None, 1e-3, 0.9, 0.999, 1e-8, 0.0, False, False, 0
        )


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([2, 1], "wanted strictly ascending indices from 0 to 3, got 1 at position 1"),
        ([1, 1], "got 1 at position 1"),
        ([0, 4], "got 4 at position 1"),
        ([-1, 2], "got -1 at position 0"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_rows_are_refused_before_anything_moves(rows, message, backend):
    problem = make_problem([(4, 4), (4, 4)], density=0.5)
    problem.rows[1] = torch.tensor(rows)
    before = problem.copy()
    with pytest.raises(RuntimeError, match=message):
        problem.step(backend)
    assert all(torch.equal(a, b) for a, b in zip(problem.tensors(), before.tensors()))


def test_bad_arguments_are_named():
    def failing(message, **changes):
        problem = make_problem([(6, 4)], density=0.5)
        problem.options |= changes.pop("options", {})
        for name, value in changes.items():
            setattr(problem, name, value)
        with pytest.raises(ValueError, match=message):
            problem.step("native")

    failing(r"gradient 0: wanted \[6, 4\] \(dense\) or \[3, 4\] \(compact\), got \[5, 4\]", grads=[torch.zeros(5, 4)])
    failing("rows 0: wanted int64", rows=[torch.zeros(3, dtype=torch.int32)])
    failing("betas: wanted 0 <= beta < 1", options={"betas": (0.9, 1.0)})
    failing("eps: wanted >= 0", options={"eps": -1.0})
    failing("grad_scale: wanted one element", options={"grad_scale": torch.ones(2)})
    failing("grads: wanted one for each of the 1 params, got 0", grads=[])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_moment_beside_far_larger_ones_does_not_become_zero(backend):
    """Gradients of 1 and, in the same block, of 1e-6 now and then: a state of zero would divide the step by eps."""
    moved = []
    for eight_bit in (True, False):
        problem = make_problem([(4, 256)], density=1.0, eight_bit=eight_bit, lr=1e-3, eps=1e-12, weight_decay=0.0)
        start = problem.params[0].clone()
        for number in range(6):
            problem.grads[0].fill_(0.0 if number % 2 else 1e-6)
            problem.grads[0][:, 0] = 1.0
            problem.step(backend)
        moved.append((problem.params[0] - start)[:, 1:].abs().max().item())
        assert (problem.states[0]["exp_avg_sq"] > 0).all()
    assert moved[0] <= 2 * moved[1]
