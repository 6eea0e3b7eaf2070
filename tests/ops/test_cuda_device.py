"""The CUDA ops on a GPU: against the twins, CUDA graphs, streams, determinism, the optimizer, torch.compile, autocast.

Run by scripts/gpu_check.sh. ``test_every_kernel_once`` is what compute-sanitizer sees: few launches of every kernel.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_cases import DTYPES, FFN_SLOTS, LAYOUTS, Problem, ffn_problem, make_problem, random_matrix

from leaml_plugin import ops
from leaml_plugin.ops import reference
from leaml_plugin.optim import SparseAdamW
from leaml_plugin.selection import NeuronScores, random_selection
from leaml_plugin.selective import attach

DEVICE = "cuda"
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

# the last has no columns: what tells 8-bit states must not hang on it
SHAPES = [(65, 1030), (3, 256), (130, 33), (17, 2048), (0, 8), (9, 1), (4, 0)]
PAIRS = [(dtype, wide) for dtype in DTYPES for wide in (False, True) if not (wide and dtype == torch.float32)]


@pytest.fixture(autouse=True, scope="module")
def compiled():
    info = ops.build_info()["cuda"]
    assert info["loaded"], f"a GPU is here, but the CUDA kernels are not: {info['cause']}"


def to_device(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=DEVICE).copy_(tensor)


def on_device(problem: Problem) -> Problem:
    options = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in problem.options.items()}
    states = [{name: t.to(DEVICE, copy=True) for name, t in state.items()} for state in problem.states]
    moved = (
        [to_device(t) for t in problem.params],
        [r.to(DEVICE) for r in problem.rows],
        [to_device(t) for t in problem.grads],
    )
    return Problem(*moved, states, options)


def check_relevance(shapes, dtype, wide, layout, dim):
    weights = [random_matrix(s, dtype, layout, i) for i, s in enumerate(shapes)]
    grads = [random_matrix(s, torch.float32 if wide else dtype, layout, 40 + i) for i, s in enumerate(shapes)]
    got = [torch.ones(4, s[dim]).to(DEVICE) for s in shapes]
    wanted = [torch.ones(4, s[dim], dtype=torch.float64) for s in shapes]
    count = len(shapes)
    norm = ops.neuron_relevance_(
        [to_device(w) for w in weights], [to_device(g) for g in grads], got, criteria=list(ops.CRITERIA), dims=dim
    )
    twin = reference.neuron_relevance_(
        weights, grads, wanted, [0, 1, 2, 3], [dim] * count, list(range(count)), dtype=torch.float64
    )
    for a, b in zip(got, wanted):
        # |sum w*g| cancels: its error goes with sum |w*g|
        a = a.cpu().double()
        assert ((a[0] - b[0]).abs() <= 2e-6 * b[1]).all()
        torch.testing.assert_close(a[1:], b[1:], rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(norm.cpu().double(), twin.double(), rtol=1e-5, atol=1e-6)


def take_step(problem: Problem, fused: bool) -> list[torch.Tensor]:
    lists, options = problem.arguments()
    if not fused:
        ops.sparse_adamw_(*lists, **options)
        return []
    out = [torch.zeros(p.shape[0]).to(DEVICE) for p in problem.params]
    ops.relevance_sparse_adamw_(*lists, out, **options)
    return out


def check_step(shapes, dtype, wide, layout, mode, eight_bit, precision, steps, grads_in_rows=False):
    cpu = make_problem(
        shapes, dtype, torch.float32 if wide else dtype, layout, 0.4, compact=mode == "compact", eight_bit=eight_bit,
        master=precision == "master", stochastic_rounding=precision == "stochastic",
        lr=torch.tensor([1e-2]), clip_coef=torch.tensor([0.5]), grad_scale=torch.tensor([4.0]),
        found_inf=torch.tensor([0.0]),
    )  # fmt: skip
    if grads_in_rows:
        cpu.grads = [g.contiguous() for g in cpu.grads]
    before = [p.clone() for p in cpu.params]
    gpu = on_device(cpu)
    for number in range(steps):
        out = take_step(gpu, mode == "fused")
        if mode == "fused" and number == 0:
            wanted = [torch.zeros(p.shape[0]) for p in cpu.params]
            with ops.use_backend("reference"):
                ops.neuron_relevance_(cpu.params, cpu.grads, wanted, grad_scale=cpu.options["grad_scale"])
            for a, b in zip(out, wanted):
                torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-4)
        cpu.step("reference")
    for param, wanted, rows, old in zip(gpu.params, cpu.params, cpu.rows, before):
        got = param.cpu()
        keep = torch.ones(got.shape[0], dtype=torch.bool)
        keep[rows] = False
        assert torch.equal(got[keep], old[keep])
        # bias corrections are fp32 on the device: a rounding in half precision may fall to the neighbour
        coarse = {torch.float32: 0.0, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[dtype]
        loose = 5e-3 if eight_bit else 1e-5
        torch.testing.assert_close(got.float(), wanted.float(), rtol=coarse + 1e-5, atol=loose + coarse * 1e-2)
    for own, twin in zip(gpu.states, cpu.states):
        assert torch.equal(own["step"].cpu(), twin["step"])
        if not eight_bit:  # no bias correction in the moments: the device rounds every operation as the CPU does
            assert torch.equal(own["exp_avg"].cpu(), twin["exp_avg"])
            assert torch.equal(own["exp_avg_sq"].cpu(), twin["exp_avg_sq"])


def test_every_kernel_once():
    """Every instance of every kernel, aligned and not, with ends of rows; what compute-sanitizer runs."""
    shapes = [(9, 528), (5, 33), (2, 256), (3, 0)]
    for dtype, wide in PAIRS:
        for layout in ("contiguous", "padded"):
            for dim in (0, 1):
                check_relevance(shapes, dtype, wide, layout, dim)
            for eight_bit in (False, True):
                for mode, precision in (("dense", "stochastic"), ("fused", "master")):
                    check_step(shapes, dtype, wide, layout, mode, eight_bit, precision, steps=1)
        for eight_bit in (False, True):  # of columns
            check_step([(90, 300), (5, 33)], dtype, wide, "transposed", "dense", eight_bit, "stochastic", steps=1)
            check_step([(90, 512)], dtype, wide, "transposed", "compact", eight_bit, "master", 1, grads_in_rows=True)


@pytest.mark.parametrize("kind", [{}, {"master": True}, {"eight_bit": True}], ids=["fp32", "masters", "8bit"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_fusion_joins_the_three_weights_of_ffn_neurons(dtype, kind):
    """Weights and states bit for bit what the two parts by themselves make of them."""
    fused = on_device(ffn_problem(dtype, 70, 300, **kind))
    parts = on_device(ffn_problem(dtype, 70, 300, **kind))
    fused_out, parts_out = ([torch.zeros(4, 70, device=DEVICE) for _ in range(2)] for _ in range(2))
    lists, options = fused.arguments()
    norm = ops.relevance_sparse_adamw_(*lists, fused_out, criteria=list(ops.CRITERIA), slots=FFN_SLOTS, **options)
    wanted = ops.neuron_relevance_(
        parts.params, parts.grads, parts_out, criteria=list(ops.CRITERIA), slots=FFN_SLOTS
    )  # fmt: skip
    take_step(parts, fused=False)
    for got, own in zip(fused.tensors(), parts.tensors()):
        assert torch.equal(got, own)
    for got, own in zip([*fused_out, norm], [*parts_out, wanted]):
        torch.testing.assert_close(got, own, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype, wide", PAIRS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dim", [0, 1])
def test_relevance(dtype, wide, layout, dim):
    check_relevance(SHAPES, dtype, wide, layout, dim)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", ["dense", "compact", "fused"])
@pytest.mark.parametrize("eight_bit", [False, True])
@pytest.mark.parametrize("precision", ["nearest", "stochastic", "master"])
def test_sparse_adamw(dtype, layout, mode, eight_bit, precision):
    check_step(SHAPES, dtype, layout == "padded", layout, mode, eight_bit, precision, steps=3)


@pytest.mark.parametrize("dtype, wide", PAIRS, ids=str)
@pytest.mark.parametrize("mode", ["dense", "compact", "fused"])
@pytest.mark.parametrize("eight_bit", [False, True])
@pytest.mark.parametrize("precision", ["nearest", "stochastic", "master"])
@pytest.mark.parametrize("grads_in_rows", [False, True])
def test_a_step_of_columns(dtype, wide, mode, eight_bit, precision, grads_in_rows):
    """Down projections: several tiles each way, with ends."""
    shapes = [(130, 512), (70, 300), (3, 1), (5, 33), (2, 257), (9, 0)]
    check_step(shapes, dtype, wide, "transposed", mode, eight_bit, precision, 3, grads_in_rows)


@pytest.mark.parametrize("columns", [3, 256])
def test_long_columns_keep_their_precision(columns):
    w, g = torch.ones(20000, columns).to(DEVICE), torch.full((20000, columns), 0.1).to(DEVICE)
    out = torch.zeros(columns).to(DEVICE)
    ops.neuron_relevance_([w], [g], [out], dims=1)
    expected = (20000 * g[0, 0].double()).expand(columns)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=0)  # one running fp32 sum is off by 1e-4


def test_shapes_of_a_real_layer():
    """Rows of a 7B model, bf16: long sums, many blocks."""
    shapes = [(64, 3584), (48, 18944), (512, 3584)]
    check_relevance(shapes, torch.bfloat16, False, "contiguous", 0)
    check_relevance([(3584, 512)], torch.bfloat16, False, "contiguous", 1)
    check_step(shapes, torch.bfloat16, False, "contiguous", "fused", False, "master", steps=2)
    check_step([(1894, 3584)], torch.bfloat16, True, "transposed", "compact", False, "master", 2, grads_in_rows=True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("eight_bit", [False, True])
def test_bad_gradients_spoil_the_same_elements_as_on_the_cpu(bad, dtype, eight_bit):
    cpu = make_problem([(6, 600), (3, 512)], dtype, density=1.0, eight_bit=eight_bit)
    cpu.grads[0][2, 300] = cpu.grads[1][1, 0] = bad
    gpu = on_device(cpu)
    out, wanted = [torch.zeros(4, n).to(DEVICE) for n in (6, 3)], [torch.zeros(4, n) for n in (6, 3)]
    ops.neuron_relevance_(gpu.params, gpu.grads, out, criteria=list(ops.CRITERIA))
    with ops.use_backend("reference"):
        ops.neuron_relevance_(cpu.params, cpu.grads, wanted, criteria=list(ops.CRITERIA))
    for a, b in zip(out, wanted):
        assert torch.equal(a.isnan().cpu(), b.isnan()) and torch.equal(a.isinf().cpu(), b.isinf())
    for _ in range(2):
        take_step(gpu, False)
        cpu.step("reference")
    for a, b in zip(gpu.params, cpu.params):
        assert torch.equal(a.isnan().cpu(), b.isnan())
        # the NaN that a processor makes of infinities has a sign of its own; torch has more than one NaN in bf16
        if bad != bad and dtype == torch.float16:
            assert torch.equal(a.cpu().view(torch.int16)[b.isnan()], b.view(torch.int16)[b.isnan()])


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_found_inf_changes_nothing(layout):
    for fused in (False, True):
        gpu = on_device(make_problem([(9, 256)], layout=layout, found_inf=torch.tensor([1.0])))
        before = [t.clone() for t in gpu.tensors()]
        out = take_step(gpu, fused)
        assert all(torch.equal(a, b) for a, b in zip(gpu.tensors(), before))
        assert all(o.count_nonzero() == 0 for o in out)


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_select(scope):
    scores = [torch.randn(5000).round(decimals=1) for _ in range(5)]
    scores[2][7] = float("nan")
    with ops.use_backend("reference"):
        wanted = ops.select_top(scores, 0.1, scope=scope)
    got = ops.select_top([s.to(DEVICE) for s in scores], 0.1, scope=scope)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(got, wanted))


def test_two_runs_give_the_same_bits():
    results = []
    for _ in range(2):
        gpu = on_device(make_problem([(300, 700)] * 4, torch.bfloat16, eight_bit=True, stochastic_rounding=True))
        out = [torch.zeros(300).to(DEVICE) for _ in gpu.params]
        norm = ops.neuron_relevance_(gpu.params, gpu.grads, out)
        out += take_step(gpu, False) + take_step(gpu, True)
        results.append([norm, *out, *gpu.tensors()])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_the_fusion_gives_the_bits_of_its_two_parts():
    apart = on_device(make_problem([(300, 704), (40, 512)], torch.bfloat16, stochastic_rounding=True))
    joined = on_device(make_problem([(300, 704), (40, 512)], torch.bfloat16, stochastic_rounding=True))
    out = [torch.zeros(n).to(DEVICE) for n in (300, 40)]
    ops.neuron_relevance_(apart.params, apart.grads, out)
    take_step(apart, False)
    fused = take_step(joined, True)
    assert all(torch.equal(a, b) for a, b in zip(apart.tensors(), joined.tensors()))
    torch.testing.assert_close(fused, out, rtol=1e-5, atol=1e-5)


def test_more_tensors_than_one_launch_takes():
    cpu = make_problem([(6, 64), (3, 8)] * 250, torch.float32, density=0.5)
    gpu = on_device(cpu)
    out = [torch.zeros(p.shape[0]).to(DEVICE) for p in gpu.params]
    norm = ops.neuron_relevance_(gpu.params, gpu.grads, out)
    wanted = sum(g.double().square().sum() for g in cpu.grads)
    torch.testing.assert_close(norm.cpu().double(), wanted, rtol=1e-5, atol=0)
    cpu.step("reference")
    take_step(gpu, False)
    for a, b in zip(gpu.params, cpu.params):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-6)


def test_another_device_is_refused_by_name():
    for first, second in ((DEVICE, "cpu"), ("cpu", DEVICE)):
        with pytest.raises(ValueError, match="one call takes one device"):
            ops.neuron_relevance_(
                [torch.zeros(2, 2, device=first)], [torch.zeros(2, 2, device=second)], [torch.zeros(2, device=first)]
            )


# --- what only a GPU has ----------------------------------------------------------------------------------------------


def test_a_step_is_captured_by_a_cuda_graph():
    """Relevance, clipping by its norm and the step: replays read the gradients and scalars of their own moment."""

    def fresh() -> tuple[Problem, list[torch.Tensor]]:
        problem = on_device(make_problem([(64, 512)] * 3, density=0.3, lr=torch.tensor([1e-2])))
        return problem, [torch.zeros(64, device=DEVICE) for _ in range(3)]

    def step(problem, out):
        lists, options = problem.arguments()
        norm = ops.neuron_relevance_(problem.params, problem.grads, out)
        ops.sparse_adamw_(*lists, **options, clip_coef=ops.clip_coefficient(norm, 1.0))

    plain, graphed, warm = fresh(), fresh(), fresh()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(*warm)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(*graphed)
    for number in range(5):
        for problem, _ in (plain, graphed):
            problem.grads[0].mul_(1.5)
            problem.options["lr"].fill_(1e-2 / (number + 1))
        graph.replay()
        step(*plain)
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(plain[0].tensors(), graphed[0].tensors()))
    assert all(torch.equal(a, b) for a, b in zip(plain[1], graphed[1]))


def test_no_step_waits_for_the_device():
    problem = on_device(make_problem([(64, 512)] * 3, torch.bfloat16, lr=torch.tensor([1e-2])))
    out = [torch.zeros(64, device=DEVICE) for _ in range(3)]
    w = torch.nn.Parameter(problem.params[0].clone())
    optimizer = SparseAdamW([{"params": [w], "rows": [problem.rows[0]]}], max_grad_norm=1.0, relevance="fisher")
    w.grad = problem.grads[0].clone()
    for attempt in range(2):  # the first makes the states
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if attempt else "default")
        try:
            norm = ops.neuron_relevance_(problem.params, problem.grads, out)
            lists, options = problem.arguments()
            ops.relevance_sparse_adamw_(*lists, out, **options, clip_coef=ops.clip_coefficient(norm, 1.0))
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_the_current_stream_is_used():
    stream = torch.cuda.Stream()
    gpu = on_device(make_problem([(512, 4096)], density=1.0))
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        gpu.grads[0].zero_()
        take_step(gpu, False)
    stream.synchronize()
    assert gpu.states[0]["exp_avg"].count_nonzero() == 0


def test_a_row_out_of_range_is_an_error():
    """In a process of its own: as with torch's own indexing, the device is lost to the process."""
    code = (
        "import torch; from leaml_plugin import ops; w = torch.ones(4, 32, device='cuda'); "
        "r = torch.tensor([4], device='cuda'); s = ops.new_state(w, r.clamp(max=3)); "
        "ops.sparse_adamw_([w], [r], [torch.ones_like(w)], [s['exp_avg']], [s['exp_avg_sq']], [s['step']], lr=0.1); "
        "torch.cuda.synchronize(); print('went on')"
    )
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode != 0 and "went on" not in result.stdout, result
    assert "CUDA" in result.stderr or "cuda" in result.stderr, result.stderr[-2000:]


class Layers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(48, 96), torch.nn.Linear(96, 16)

    def forward(self, x):
        return self.second(torch.nn.functional.gelu(self.first(x)))


def trained(device: str, eight_bit: bool = False, steps: int = 20, compile: bool = False) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    model = Layers().to(device)
    x, y = torch.randn(64, 48).to(device), torch.randn(64, 16).to(device)
    scores = NeuronScores({"first": torch.arange(96.0), "second": torch.arange(16.0)})
    handle = attach(model, random_selection(scores, 0.25))
    optimizer = SparseAdamW(handle.parameters(), lr=1e-2, max_grad_norm=1.0, eight_bit=eight_bit)
    forward = torch.compile(model) if compile else model
    for _ in range(steps):
        optimizer.zero_grad()
        (forward(x) - y).square().mean().backward()
        optimizer.step()
    handle.detach()
    return tuple(p.detach().cpu() for p in model.parameters())


def test_selected_neurons_learn_as_on_the_cpu():
    for a, b in zip(trained(DEVICE), trained("cpu")):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    # the same random numbers: a code that falls to its neighbour now and then
    for a, b in zip(trained(DEVICE, eight_bit=True), trained("cpu", eight_bit=True)):
        assert (a - b).abs().mean() < 1e-3


def test_selected_neurons_learn_under_compile():
    for a, b in zip(trained(DEVICE, compile=True), trained(DEVICE)):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_autocast_with_a_grad_scaler():
    """fp16 with a scale that overflows at first: those steps are skipped on the device, the rest train."""
    torch.manual_seed(0)
    model = Layers().to(DEVICE)
    x, y = torch.randn(64, 48).to(DEVICE), torch.randn(64, 16).to(DEVICE)
    scores = NeuronScores({"first": torch.arange(96.0), "second": torch.arange(16.0)})
    optimizer = SparseAdamW(attach(model, random_selection(scores, 0.5)).parameters(), lr=1e-2, max_grad_norm=1.0)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**40)
    losses = []
    for _ in range(90):
        optimizer.zero_grad()
        with torch.autocast(DEVICE, dtype=torch.float16):
            loss = (model(x).float() - y).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert scaler.get_scale() < 2.0**40
    assert all(p.isfinite().all() for p in model.parameters())
    assert losses[0] == losses[1] and losses[-1] < 0.9 * losses[0]


def test_an_optimizer_step_is_captured_by_a_cuda_graph():
    """After one step outside, which makes the states."""

    def fresh():
        torch.manual_seed(1)
        w = torch.nn.Parameter(torch.randn(64, 256, device=DEVICE).bfloat16())
        rows = torch.arange(0, 64, 3, device=DEVICE)
        optimizer = SparseAdamW(
            [{"params": [w], "rows": [rows]}], lr=torch.tensor(1e-2, device=DEVICE), max_grad_norm=1.0
        )
        w.grad = torch.randn(64, 256, device=DEVICE).bfloat16()
        optimizer.step()
        return w, optimizer

    (plain, first), (graphed, second) = fresh(), fresh()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        second.step()
    for _ in range(4):
        graph.replay()
        first.step()
    torch.cuda.synchronize()
    assert torch.equal(plain, graphed)
    for a, b in zip(first.state[plain].values(), second.state[graphed].values()):
        assert torch.equal(a, b)


def test_states_travel_between_devices():
    torch.manual_seed(0)
    w = torch.nn.Parameter(torch.randn(16, 32).to(DEVICE))
    optimizer = SparseAdamW([{"params": [w], "rows": [torch.arange(0, 16, 2)]}], lr=1e-2)
    w.grad = torch.ones_like(w)
    optimizer.step()
    other = torch.nn.Parameter(w.detach().cpu().clone())
    resumed = SparseAdamW([{"params": [other], "rows": [torch.arange(0, 16, 2)]}], lr=1e-2)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other.grad = torch.ones_like(other)
    optimizer.step()
    resumed.step()
    torch.testing.assert_close(w.detach().cpu(), other.detach(), rtol=1e-6, atol=1e-7)
