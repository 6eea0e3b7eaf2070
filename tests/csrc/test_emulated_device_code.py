"""The CUDA ops, host side and kernels, run on the CPU, against their twins; with mutants that must be caught."""

from __future__ import annotations

import math
import sys
from fractions import Fraction
from pathlib import Path

import emulated
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))
from kernel_cases import DTYPES, FFN_SLOTS, Problem, dtypes, ffn_problem, layouts, make_problem, random_matrix

from leaml_plugin.ops import reference

pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="no C++ compiler to build the emulated device code")

CACHE = emulated.ROOT / "build" / "emulation"
small_shapes = st.tuples(
    st.sampled_from((0, 1, 2, 9, 17)), st.sampled_from((0, 1, 5, 8, 32, 255, 256, 257, 512, 520, 784))
)
fewer = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="session")
def device():
    return emulated.build(CACHE)


@pytest.fixture(scope="session")
def device_in_fp32():
    return emulated.build(CACHE, device_arithmetic=True)


def check_relevance(device, shape_list, dtype, grad_dtype, layout, dim, seed=0):
    weights = [random_matrix(s, dtype, layout, seed + i) for i, s in enumerate(shape_list)]
    grads = [random_matrix(s, grad_dtype, layout, seed + 50 + i) for i, s in enumerate(shape_list)]
    check_relevance_of(device, weights, grads, dim)


def check_relevance_of(device, weights, grads, dim=0):
    got = [torch.ones(4, w.shape[dim]) for w in weights]
    wanted = [torch.ones(4, w.shape[dim], dtype=torch.float64) for w in weights]
    count = len(weights)
    norm = device.relevance_(weights, grads, got, dims=dim)
    twin = reference.neuron_relevance_(
        weights, grads, wanted, [0, 1, 2, 3], [dim] * count, list(range(count)), dtype=torch.float64
    )
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-5)
    assert norm == pytest.approx(twin.item(), rel=1e-5)


def check_step(device, problem, fused=False, steps=2, slots=None):
    """Bit for bit: on the CPU both round every operation the same way."""
    twin = problem.copy()
    own = list(range(len(twin.params))) if slots is None else slots
    sizes = dict(zip(own, (p.shape[0] for p in twin.params)))
    for _ in range(steps):
        wanted = [torch.zeros(4, sizes[slot]) for slot in sorted(sizes)]
        if fused:
            reference.neuron_relevance_(twin.params, twin.grads, wanted, [0, 1, 2, 3], [0] * len(own), own)
        out = device.step(problem, fused, slots)
        twin.step("reference")
        if fused:
            torch.testing.assert_close(out, wanted, rtol=2e-5, atol=2e-5)
    for got, expected in zip(problem.tensors(), twin.tensors()):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.95, 0.9999), (0.0, 0.9), (0.99, 0.0)])
def test_the_coefficients_in_the_arithmetic_of_a_gpu(device, device_in_fp32, betas):
    """fp32 there, fp64 on the CPU; both against exact ones over 1 to 1,000,000 steps."""
    lr, decay = 3e-4, 0.1
    differ = False

    def rest(beta, step):  # of 1
        return 1 - Fraction(beta) ** step if step < 300 or not beta else -math.expm1(step * math.log(beta))

    for step in sorted({*range(1, 300), *(int(1.07**i) for i in range(84, 205)), 10**6}):
        wanted = [1 - lr * decay, lr / rest(betas[0], step), 1 / math.sqrt(rest(betas[1], step))]
        for which, bound in ((device, 1e-7), (device_in_fp32, 3e-7)):
            got = which.row_coefficients(lr, betas, decay, step)
            assert got == pytest.approx(wanted, rel=bound, abs=0), (step, which is device)
        differ |= got != device.row_coefficients(lr, betas, decay, step)
    assert differ == any(betas)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("eight_bit", [False, True])
def test_steps_in_the_arithmetic_of_a_gpu(device_in_fp32, fused, eight_bit):
    problem = make_problem([(9, 300), (17, 512)], density=0.5, eight_bit=eight_bit)
    for state, age in zip(problem.states, (0, 12_345)):
        state["step"] += age + torch.arange(len(state["step"]))
    twin = problem.copy()
    for _ in range(3):
        device_in_fp32.step(problem, fused)
        twin.step("reference")
    assert not all(torch.equal(a, b) for a, b in zip(problem.params, twin.params))
    for got, wanted in zip(problem.tensors(), twin.tensors()):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-7)


@fewer
@given(
    shape_list=st.lists(small_shapes, min_size=1, max_size=3),
    dtype=dtypes,
    wide_grad=st.booleans(),
    layout=layouts,
    dim=st.sampled_from((0, 1)),
)
def test_relevance(device, shape_list, dtype, wide_grad, layout, dim):
    check_relevance(device, shape_list, dtype, torch.float32 if wide_grad else dtype, layout, dim)


@pytest.mark.parametrize("columns", [3, 256])  # one by one, and 16 bytes at a time
def test_long_columns_keep_their_precision(device, columns):
    """One running fp32 sum of each warp's rows is off by 2e-5."""
    w, g, out = torch.ones(20000, columns), torch.full((20000, columns), 0.1), torch.zeros(3, columns)
    device.relevance_([w], [g], [out], [0, 1, 2], dims=1)
    tenth = g[0, 0].double()
    for got, each in zip(out.double(), (tenth, tenth, tenth**2)):
        torch.testing.assert_close(got, (20000 * each).expand(columns), rtol=2e-6, atol=0)


def test_long_rows_keep_their_precision(device):
    """A lane adds up a 32nd of a row."""
    w, g, out = torch.ones(2, 20000), torch.full((2, 20000), 0.1), torch.zeros(2)
    device.relevance_([w], [g], [out.unsqueeze(0)], [0])
    torch.testing.assert_close(out.double(), (20000 * g[0, 0].double()).expand(2), rtol=1e-5, atol=0)


@fewer
@given(
    shape_list=st.lists(small_shapes, min_size=1, max_size=3),
    dtype=dtypes,
    wide_grad=st.booleans(),
    layout=layouts,
    density=st.sampled_from((0.1, 0.5, 1.0)),
    mode=st.sampled_from(("dense", "compact", "fused")),
    eight_bit=st.booleans(),
    precision=st.sampled_from(("nearest", "stochastic", "master")),
    scaled=st.booleans(),
)
def test_sparse_adamw_and_the_fusion(
    device, shape_list, dtype, wide_grad, layout, density, mode, eight_bit, precision, scaled
):
    problem = make_problem(
        shape_list,
        dtype,
        torch.float32 if wide_grad else dtype,
        layout,
        density,
        compact=mode == "compact",
        eight_bit=eight_bit,
        master=precision == "master",
        stochastic_rounding=precision == "stochastic",
    )
    if scaled:
        problem.options |= {
            "lr": torch.tensor([2e-3]),
            "clip_coef": torch.tensor([0.3]),
            "grad_scale": torch.tensor([3.0]),
            "found_inf": torch.tensor([0.0]),
            "maximize": True,
        }
    check_step(device, problem, fused=mode == "fused" and not scaled)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ffn_parts_join_in_the_last_pass(device, dtype):
    """Gate and up by rows, down by columns: two launches feed one slot each. Outputs are strided, one is nobody's."""
    sizes = [(20, 300), (9, 16)]
    weights, grads, slots = [], [], []
    for slot, (inner, hidden) in enumerate(sizes):
        for i, shape in enumerate([(inner, hidden), (inner, hidden), (hidden, inner)]):
            weights.append(random_matrix(shape, dtype, "contiguous", 10 * slot + i))
            grads.append(random_matrix(shape, dtype, "contiguous", 10 * slot + i + 5))
            slots.append(2 * slot)
    sizes.insert(1, (7, 0))
    got = [torch.ones(inner, 4).t() for inner, _ in sizes]
    wanted = [torch.ones(4, inner, dtype=torch.float64) for inner, _ in sizes]
    norm = device.relevance_(weights, grads, got, [3, 1, 2, 0], [0, 0, 1] * 2, slots)
    twin = reference.neuron_relevance_(weights, grads, wanted, [3, 1, 2, 0], [0, 0, 1] * 2, slots, dtype=torch.float64)
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-5)
    assert norm == pytest.approx(twin.item(), rel=1e-5)


def test_more_tensors_than_one_launch_takes(device):
    """1,100 tensors of all dtypes, shuffled: every limit of a launch's arguments is passed."""
    sizes = [(1 + i % 3, 8 * (i % 4)) for i in range(1100)]
    parts = [make_problem([size], DTYPES[i * i % 3], density=0.5, seed=i) for i, size in enumerate(sizes)]
    whole = Problem(
        [p.params[0] for p in parts],
        [p.rows[0] for p in parts],
        [p.grads[0] for p in parts],
        [p.states[0] for p in parts],
        {"lr": 1e-2, "seed": 3, "stochastic_rounding": True},
    )
    check_relevance_of(device, whole.params, whole.grads)
    check_step(device, whole.copy(), steps=1)
    check_step(device, whole, fused=True, steps=1)


@pytest.mark.parametrize("kind", [{}, {"master": True}, {"eight_bit": True}], ids=["fp32", "masters", "8bit"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_fusion_joins_the_three_weights_of_ffn_neurons(device, dtype, kind):
    check_step(device, ffn_problem(dtype, 70, 300, **kind), fused=True, slots=FFN_SLOTS)


@pytest.mark.parametrize("fused", [False, True])
def test_rows_without_elements_do_not_hide_8_bit_states(device, fused):
    """Their scales are empty, so their pointers are null; every step still counts."""
    for shapes in ([(2, 256), (17, 0)], [(17, 0), (2, 256)], [(3, 0)]):
        check_step(device, make_problem(shapes, density=1.0, eight_bit=True), fused)


def test_the_longest_rows_start_first_and_keep_their_random_numbers(device):
    problem = make_problem([(8, 64), (8, 1024), (8, 256)], torch.bfloat16, stochastic_rounding=True, density=1.0)
    check_step(device, problem)
    before = device.native.leaml_launches()
    device.step(problem)
    assert device.native.leaml_launches() == before + 1


def test_an_index_out_of_range_is_an_error_and_touches_nothing(device):
    for row in (9, -1):
        problem = make_problem([(9, 32)], density=0.1)
        problem.rows[0] = torch.tensor([row])
        before = problem.copy()
        with pytest.raises(RuntimeError, match="stopped itself"):
            device.step(problem)
        assert all(torch.equal(a, b) for a, b in zip(problem.tensors(), before.tensors()))


def test_what_is_refused_is_refused_before_the_first_launch(device):
    """The second tensor's columns lie too far apart, and its dtype comes in a later launch than the first's."""
    problem = make_problem([(4, 16), (1, 2)], density=1.0)
    apart = torch.zeros((1 << 23) + 1, dtype=torch.bfloat16)
    problem.grads[1] = torch.ones(1, 2, dtype=torch.bfloat16)
    problem.params[1] = torch.as_strided(apart, (1, 2), (1, (1 << 23) - 1))
    device.step(problem)
    assert problem.params[1].ne(0).all()
    problem.params[1] = torch.as_strided(apart, (1, 2), (1, 1 << 23))
    before = [t.clone() for t in problem.tensors()]
    with pytest.raises(RuntimeError, match="at most 8388607"):
        device.step(problem)
    assert all(torch.equal(a, b) for a, b in zip(problem.tensors(), before))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("eight_bit", [False, True])
def test_rows_that_begin_off_a_16_byte_boundary(device, dtype, eight_bit):
    problem = make_problem([(5, 512), (5, 264)], dtype, density=0.6, eight_bit=eight_bit)

    def shifted(t):
        return torch.zeros(t.numel() + 1, dtype=dtype)[1:].view(t.shape).copy_(t)

    problem.params = [shifted(p) for p in problem.params]
    problem.grads[0] = shifted(problem.grads[0])  # the second stays aligned
    check_relevance_of(device, problem.params, problem.grads)
    twin = problem.copy()
    device.step(problem)
    twin.step("reference")
    assert all(torch.equal(a, b) for a, b in zip(problem.tensors(), twin.tensors()))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_found_inf_changes_nothing(device, fused, layout):
    problem = make_problem([(9, 256)], layout=layout, found_inf=torch.tensor([1.0]))
    before = problem.copy()
    device.step(problem, fused)
    assert all(torch.equal(a, b) for a, b in zip(problem.tensors(), before.tensors()))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("eight_bit", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_bad_gradients_spoil_the_same_elements_as_on_the_cpu(device, bad, dtype, eight_bit, fused):
    problem = make_problem([(6, 600), (3, 512)], dtype, density=1.0, eight_bit=eight_bit, stochastic_rounding=True)
    problem.grads[0][2, 300] = problem.grads[0][3, 599] = problem.grads[1][1, 0] = bad
    twin = problem.copy()
    wanted = [torch.zeros(4, 6), torch.zeros(4, 3)]
    norm = reference.neuron_relevance_(problem.params, problem.grads, wanted, [0, 1, 2, 3], [0, 0], [0, 1])
    got = [torch.zeros(4, 6), torch.zeros(4, 3)]
    own = device.relevance_(problem.params, problem.grads, got)
    assert torch.tensor(own).isnan() == norm.isnan() and own != 0
    for i in range(2):
        out = device.step(problem, fused)
        twin.step("reference")
        if fused and i == 0:
            got += out
    for a, b in zip(got, wanted * 2):
        assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.isinf(), b.isinf())
    for a, b in zip(problem.tensors(), twin.tensors()):
        assert torch.equal(a.isnan(), b.isnan())
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    assert problem.params[0].isnan().any()


def test_many_rows_are_found_by_the_cooperative_search(device):
    for density in (0.02, 0.3, 0.97):
        check_step(device, make_problem([(1100, 4)], density=density), fused=True, steps=1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_aligned_rows_use_16_byte_accesses_and_others_do_not(device, dtype):
    problem = make_problem([(8, 512)], dtype, density=0.5)
    before = device.native.leaml_vector_accesses()
    device.step(problem)
    rows, lanes, blocks = 4, 32, 2
    # m and v are fp32: two accesses of 16 bytes each way; the weight is read and written, the gradient read
    per_block = 8 + 3 * (2 if dtype == torch.float32 else 1)
    assert device.native.leaml_vector_accesses() - before == rows * lanes * blocks * per_block
    before = device.native.leaml_vector_accesses()
    device.step(make_problem([(8, 512)], dtype, layout="every_other", density=0.5))
    assert device.native.leaml_vector_accesses() == before


def columns_problem(shape_list, dtype, compact_dtype=None, density=0.5, **options):
    """Weights whose neurons are columns in memory; their gradients too, or compact ones of a dtype in rows."""
    grad = compact_dtype or dtype
    problem = make_problem(shape_list, dtype, grad, "transposed", density, compact=bool(compact_dtype), **options)
    if compact_dtype:
        problem.grads = [g.contiguous() for g in problem.grads]
    return problem


@pytest.mark.parametrize("compact_dtype", [None, "own", torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("eight_bit", [False, True])
@pytest.mark.parametrize("precision", ["nearest", "stochastic", "master"])
def test_columns_are_stepped_in_tiles(device, dtype, compact_dtype, eight_bit, precision):
    """More neurons and longer ones than a tile takes, less, none; rows beside columns in one call."""
    options = {
        "eight_bit": eight_bit,
        "master": precision == "master",
        "stochastic_rounding": precision == "stochastic",
        "lr": torch.tensor([2e-3]),
        "clip_coef": torch.tensor([0.3]),
        "grad_scale": torch.tensor([3.0]),
        "found_inf": torch.tensor([0.0]),
    }
    compact_dtype = dtype if compact_dtype == "own" else compact_dtype
    shapes = [(130, 512), (70, 300), (3, 1), (5, 33), (2, 257), (9, 0)]
    problem = columns_problem(shapes, dtype, compact_dtype, **options)
    problem.params[2] = problem.params[2].contiguous()
    before = device.native.leaml_launches()
    check_step(device, problem, steps=3)
    assert device.native.leaml_launches() == before + 3 * 3  # rows, columns, their step counts
    problem.options["found_inf"] = torch.tensor([1.0])
    unchanged = problem.copy()
    device.step(problem)
    assert all(torch.equal(a, b) for a, b in zip(problem.tensors(), unchanged.tensors()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("eight_bit", [False, True])
def test_the_fusion_takes_columns_beside_rows(device, dtype, eight_bit):
    """Weights and gradients of columns; of columns and rows; of rows and columns; of rows."""
    problem = columns_problem([(40, 300), (17, 256), (9, 64), (9, 300)], dtype, eight_bit=eight_bit)
    problem.grads[1] = problem.grads[1].contiguous()
    problem.params[2] = problem.params[2].contiguous()
    problem.params[3], problem.grads[3] = problem.params[3].contiguous(), problem.grads[3].contiguous()
    check_step(device, problem, fused=True)


def test_columns_leave_their_states_to_16_byte_accesses(device):
    problem = columns_problem([(64, 512)], torch.bfloat16, torch.float32, master=True)
    before = device.native.leaml_vector_accesses()
    device.step(problem)
    rows, lanes, blocks = 32, 32, 2
    # moments and master are fp32: two accesses each way; the gradient is read, the weight written to shared memory
    assert device.native.leaml_vector_accesses() - before == rows * lanes * blocks * (3 * 4 + 2 + 1)


def test_a_column_out_of_range_is_an_error_and_touches_nothing(device):
    problem = columns_problem([(90, 300)], torch.float32, density=0.5)
    problem.rows[0][-1] = 90
    before = problem.copy()
    with pytest.raises(RuntimeError, match="stopped itself"):
        device.step(problem)
    assert torch.equal(problem.states[0]["step"], before.states[0]["step"])
    last = slice(32, None)  # the tile of the bad one, its first block
    assert torch.equal(problem.states[0]["exp_avg"][last], before.states[0]["exp_avg"][last])


def test_the_emulation_sees_a_barrier_that_not_all_lanes_reach(device):
    assert b"barrier" in device.native.leaml_broken_barrier()


MUTANTS = (
    # a reduction that forgets half the warp
    ("offset = kWarp / 2; offset > 0; offset /= 2) x +=", "offset = kWarp / 4; offset > 0; offset /= 2) x +="),
    # moments of an unaligned 8-bit row that are not the same in its two walks
    ("const float g = (to_float(g_at[i * gc]) * r.call.unscale) *", "const float g = to_float(g_at[i * gc]) *"),
    # a step that takes the gradient of another row
    ("item.compact ? j : row", "item.compact ? row : j"),
    # random numbers that depend on the order of the launch
    ("item.index = int32_t(i)", "item.index = int32_t(args->count)"),
    # tiles that lie apart though they take half as many neurons
    ("first = number % groups * item.tile", "first = number % groups * kMaxTile"),
    # columns whose sums start anew and are not kept
    ("shared[0][own][at] += wg[i]", "shared[0][own][at] = wg[i]"),
    # a second launch whose partial norms overwrite the first's
    ("    used += blocks;\n", ""),
)


def test_mutants_are_caught():
    """One build with all faults, each seen by the check of the part it is in."""
    mutant = emulated.build(CACHE, MUTANTS)
    with pytest.raises(AssertionError):
        check_relevance(mutant, [(5, 300)], torch.float32, torch.float32, "contiguous", 0)
    with pytest.raises(AssertionError):
        check_relevance(mutant, [(1030, 5)], torch.float32, torch.float32, "contiguous", 1)
    scaled = {"grad_scale": torch.tensor([4.0]), "clip_coef": torch.tensor([0.5])}
    with pytest.raises(AssertionError):
        check_step(mutant, make_problem([(9, 300)], density=1.0, eight_bit=True, **scaled))
    with pytest.raises(AssertionError):
        check_step(mutant, make_problem([(9, 40)], density=0.3))
    sizes = [(4, 32), (4, 64)]
    check_step(mutant, make_problem(sizes[::-1], torch.bfloat16, stochastic_rounding=True, density=1.0))
    with pytest.raises(AssertionError):
        check_step(mutant, make_problem(sizes, torch.bfloat16, stochastic_rounding=True, density=1.0))
    with pytest.raises(AssertionError):
        check_step(mutant, columns_problem([(40, 20)], torch.float32))
    check_step(mutant, columns_problem([(40, 20)], torch.float32, torch.float32))
    many = [torch.ones(1, 1) for _ in range(400)]
    with pytest.raises(AssertionError, match="400"):
        check_relevance_of(mutant, many, many)
