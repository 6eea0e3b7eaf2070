"""The CUDA device code, run on the CPU, against the reference twins; with mutants that these tests must catch."""

from __future__ import annotations

import sys
from pathlib import Path

import emulated
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))
from kernel_cases import DTYPES, dtypes, layouts, make_problem, random_matrix

from leaml_plugin.ops import reference

pytest.importorskip("pybind11", reason="the emulated device code is bound with pybind11")
pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="no C++ compiler to build the emulated device code")

CACHE = emulated.ROOT / "build" / "emulation"
small_shapes = st.tuples(
    st.sampled_from((0, 1, 2, 9, 17)), st.sampled_from((0, 1, 5, 8, 32, 255, 256, 257, 512, 520, 784))
)
fewer = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="session")
def device():
    return emulated.build(CACHE, "device")


def check_relevance(device, shape_list, dtype, grad_dtype, layout, dim, seed=0):
    weights = [random_matrix(s, dtype, layout, seed + i) for i, s in enumerate(shape_list)]
    grads = [random_matrix(s, grad_dtype, layout, seed + 50 + i) for i, s in enumerate(shape_list)]
    slots = list(range(len(weights)))
    got = [torch.ones(4, s[dim]) for s in shape_list]
    wanted = [torch.ones(4, s[dim], dtype=torch.float64) for s in shape_list]
    dims = [dim] * len(weights)
    norm = device.relevance_(weights, grads, got, [0, 1, 2, 3], dim, slots)
    twin = reference.neuron_relevance_(weights, grads, wanted, [0, 1, 2, 3], dims, slots, dtype=torch.float64)
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-5)
    assert norm == pytest.approx(twin.item(), rel=1e-5)


def check_step(device, problem, fused=False, steps=2):
    """Bit for bit: on the CPU both round every operation the same way."""
    twin = problem.copy()
    for _ in range(steps):
        wanted = [torch.zeros(4, p.shape[0]) for p in twin.params]
        if fused:
            reference.neuron_relevance_(
                twin.params, twin.grads, wanted, [0, 1, 2, 3], [0] * len(wanted), list(range(len(wanted)))
            )
        sums = device.step(problem, fused)
        twin.step("reference")
        if fused:
            for (wg, abs_wg, gg), table in zip(sums, wanted):
                torch.testing.assert_close(torch.stack([wg.abs(), abs_wg, gg]), table[:3], rtol=2e-5, atol=2e-5)
    for got, expected in zip(problem.tensors(), twin.tensors()):
        assert torch.equal(got, expected)


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


def test_ffn_parts_join_in_the_last_pass(device):
    """Gate and up rows of one slot; columns are a launch of their own."""
    weights = [random_matrix((20, 300), torch.bfloat16, "contiguous", i) for i in range(2)]
    grads = [random_matrix((20, 300), torch.bfloat16, "contiguous", 9 + i) for i in range(2)]
    got, wanted = [torch.zeros(4, 20)], [torch.zeros(4, 20)]
    device.relevance_(weights, grads, got, [0, 1, 2, 3], 0, [0, 0])
    reference.neuron_relevance_(weights, grads, wanted, [0, 1, 2, 3], [0, 0], [0, 0])
    torch.testing.assert_close(got, wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_found_inf_changes_nothing(device, fused):
    problem = make_problem([(9, 256)], found_inf=torch.tensor([1.0]))
    before = problem.copy()
    device.step(problem, fused)
    assert all(torch.equal(a, b) for a, b in zip(problem.tensors(), before.tensors()))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("eight_bit", [False, True])
def test_bad_gradients_spoil_the_same_elements_as_on_the_cpu(device, bad, eight_bit):
    problem = make_problem([(6, 600)], density=1.0, eight_bit=eight_bit)
    problem.grads[0][2, 300] = bad
    twin = problem.copy()
    for _ in range(2):
        device.step(problem)
        twin.step("reference")
    assert torch.equal(problem.params[0].isnan(), twin.params[0].isnan())
    assert problem.params[0].isnan().any()


def test_many_rows_are_found_by_the_cooperative_search(device):
    for density in (0.02, 0.3, 0.97):
        check_step(device, make_problem([(1100, 4)], density=density), fused=True, steps=1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_aligned_rows_use_16_byte_accesses_and_others_do_not(device, dtype):
    problem = make_problem([(8, 512)], dtype, density=0.5)
    before = device.module.vector_accesses()
    device.step(problem)
    rows, lanes, blocks = 4, 32, 2
    # m and v are fp32: two accesses of 16 bytes each way; the weight is read and written, the gradient read
    per_block = 8 + 3 * (2 if dtype == torch.float32 else 1)
    assert device.module.vector_accesses() - before == rows * lanes * blocks * per_block
    before = device.module.vector_accesses()
    device.step(make_problem([(8, 512)], dtype, layout="every_other", density=0.5))
    assert device.module.vector_accesses() == before


def test_the_emulation_sees_a_barrier_that_not_all_lanes_reach(device):
    with pytest.raises(RuntimeError, match="barrier"):
        device.module.broken_barrier()


MUTANTS = (
    # a reduction that forgets half the warp
    ("offset = kWarp / 2; offset > 0; offset /= 2) x +=", "offset = kWarp / 4; offset > 0; offset /= 2) x +="),
    # a row's end that raises the scale of its block
    ("if (position<wide, Vector>(lane, i) >= valid) m[i] = v[i] = 0.0f;", ";"),
    # a step that takes the gradient of another row
    ("(item.compact ? j : row)", "(item.compact ? row : j)"),
)


def test_mutants_are_caught():
    """One build with three faults, each seen by the check of the part it is in."""
    mutant = emulated.build(CACHE, "mutant", MUTANTS, fp32_only=True)
    with pytest.raises(AssertionError):
        check_relevance(mutant, [(5, 300)], torch.float32, torch.float32, "contiguous", 0)
    decaying = make_problem([(9, 300)], density=1.0, eight_bit=True)
    decaying.step("reference")
    decaying.grads = [torch.zeros(9, 300)]  # so that a leftover of the row's end would be the largest of its block
    with pytest.raises(AssertionError):
        check_step(mutant, decaying, steps=1)
    with pytest.raises(AssertionError):
        check_step(mutant, make_problem([(9, 40)], density=0.3))
