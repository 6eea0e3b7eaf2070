"""The CUDA ops on a GPU: against the twins, CUDA graphs, streams and determinism. Run by scripts/gpu_check.sh."""

from __future__ import annotations

import itertools

import pytest
import torch
from kernel_cases import DTYPES, LAYOUTS, Problem, make_problem, random_matrix

from leaml_plugin import ops
from leaml_plugin.ops import reference

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

SHAPES = [(65, 1030), (3, 256), (130, 33), (17, 2048), (0, 8), (4, 0), (9, 1)]


@pytest.fixture(autouse=True, scope="module")
def compiled():
    info = ops.build_info()["cuda"]
    assert info["loaded"], f"a GPU is here, but the CUDA kernels are not: {info['cause']}"


def to_cuda(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda").copy_(tensor)


def on_cuda(problem: Problem) -> Problem:
    options = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in problem.options.items()}
    states = [{name: t.cuda() for name, t in state.items()} for state in problem.states]
    moved = (
        [to_cuda(t) for t in problem.params],
        [r.cuda() for r in problem.rows],
        [to_cuda(t) for t in problem.grads],
    )
    return Problem(*moved, states, options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("wide", [False, True])
def test_relevance(dtype, layout, dim, wide):
    weights = [random_matrix(s, dtype, layout, i) for i, s in enumerate(SHAPES)]
    grads = [random_matrix(s, torch.float32 if wide else dtype, layout, 40 + i) for i, s in enumerate(SHAPES)]
    got = [torch.ones(4, s[dim], device="cuda") for s in SHAPES]
    wanted = [torch.ones(4, s[dim], dtype=torch.float64) for s in SHAPES]
    count = len(SHAPES)
    norm = ops.neuron_relevance_(
        [to_cuda(w) for w in weights], [to_cuda(g) for g in grads], got, criteria=list(ops.CRITERIA), dims=dim
    )
    twin = reference.neuron_relevance_(
        weights, grads, wanted, [0, 1, 2, 3], [dim] * count, list(range(count)), dtype=torch.float64
    )
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a.cpu().double(), b, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(norm.cpu().double(), twin.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", ["dense", "compact", "fused"])
@pytest.mark.parametrize("eight_bit", [False, True])
@pytest.mark.parametrize("precision", ["nearest", "stochastic", "master"])
def test_sparse_adamw(dtype, layout, mode, eight_bit, precision):
    cpu = make_problem(
        SHAPES, dtype, None, layout, 0.4, compact=mode == "compact", eight_bit=eight_bit,
        master=precision == "master", stochastic_rounding=precision == "stochastic",
        lr=torch.tensor([1e-2]), clip_coef=torch.tensor([0.5]), grad_scale=torch.tensor([4.0]),
        found_inf=torch.tensor([0.0]),
    )  # fmt: skip
    before = [p.clone() for p in cpu.params]
    gpu = on_cuda(cpu)
    for _ in range(3):
        cpu.step("reference")
        lists, options = gpu.arguments()
        if mode == "fused":
            ops.relevance_sparse_adamw_(*lists, [torch.zeros(s[0], device="cuda") for s in SHAPES], **options)
        else:
            ops.sparse_adamw_(*lists, **options)
    for param, wanted, rows, old in zip(gpu.params, cpu.params, cpu.rows, before):
        got = param.cpu()
        keep = torch.ones(got.shape[0], dtype=torch.bool)
        keep[rows] = False
        assert torch.equal(got[keep], old[keep])
        # the device contracts multiply-add: a rounding in half precision or a code may fall to the neighbour
        coarse = {torch.float32: 0.0, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[dtype]
        loose = 5e-3 if eight_bit else 1e-5
        torch.testing.assert_close(got.float(), wanted.float(), rtol=coarse + 1e-5, atol=loose + coarse * 1e-2)


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_select(scope):
    scores = [torch.randn(5000).round(decimals=1) for _ in range(5)]
    with ops.use_backend("reference"):
        wanted = ops.select_top(scores, 0.1, scope=scope)
    got = ops.select_top([s.cuda() for s in scores], 0.1, scope=scope)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(got, wanted))


def test_two_runs_give_the_same_bits():
    results = []
    for _ in range(2):
        gpu = on_cuda(make_problem([(300, 700)] * 4, torch.bfloat16, eight_bit=True, stochastic_rounding=True))
        out = [torch.zeros(300, device="cuda") for _ in gpu.params]
        norm = ops.neuron_relevance_(gpu.params, gpu.grads, out)
        lists, options = gpu.arguments()
        ops.sparse_adamw_(*lists, **options)
        results.append([norm, *out, *gpu.tensors()])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_a_step_is_captured_by_a_cuda_graph():
    plain = on_cuda(make_problem([(64, 512)] * 3, density=0.3, lr=torch.tensor([1e-2])))
    graphed = on_cuda(make_problem([(64, 512)] * 3, density=0.3, lr=torch.tensor([1e-2])))
    out = [torch.zeros(64, device="cuda") for _ in range(3)]

    def step(problem):
        lists, options = problem.arguments()
        norm = ops.neuron_relevance_(problem.params, problem.grads, out)
        ops.sparse_adamw_(*lists, **options, clip_coef=ops.clip_coefficient(norm, 1.0))

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(graphed)
    for _ in range(5):
        graph.replay()
        step(plain)
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(plain.tensors(), graphed.tensors()))


def test_the_current_stream_is_used():
    stream = torch.cuda.Stream()
    gpu = on_cuda(make_problem([(512, 4096)], density=1.0))
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        gpu.grads[0].zero_()
        lists, options = gpu.arguments()
        ops.sparse_adamw_(*lists, **options)
    stream.synchronize()
    assert gpu.states[0]["exp_avg"].count_nonzero() == 0


def test_more_tensors_than_one_launch_takes():
    for count, dtype in itertools.product((500,), (torch.float32,)):
        cpu = make_problem([(6, 64)] * count, dtype, density=0.5)
        gpu = on_cuda(cpu)
        out = [torch.zeros(6, device="cuda") for _ in range(count)]
        ops.neuron_relevance_(gpu.params, gpu.grads, out)
        cpu.step("reference")
        lists, options = gpu.arguments()
        ops.sparse_adamw_(*lists, **options)
        for a, b in zip(gpu.params, cpu.params):
            torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-6)


def test_another_device_is_refused_by_name():
    with pytest.raises(ValueError, match="one call takes one device"):
        ops.neuron_relevance_([torch.zeros(2, 2, device="cuda")], [torch.zeros(2, 2)], [torch.zeros(2, device="cuda")])
