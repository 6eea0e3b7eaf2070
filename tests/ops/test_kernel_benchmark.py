"""The kernel benchmark measures what it says and writes the keys that others read. Its times are not tested."""

from __future__ import annotations

import json

import pytest
import torch

from leaml_plugin import LeamlError, ops
from leaml_plugin.benchmark import kernels, limits, peers


def test_rows_have_the_promised_keys(tmp_path, native):
    target = tmp_path / "rows.json"
    config = kernels.Config(
        ops=("relevance", "sparse_adamw"), dtypes=("float32",), densities=(0.1,), model="tiny", device="cpu", pairs=3,
        compile=False, peers=("eager",), json=target,
    )  # fmt: skip
    kernels.run(config)
    rows = json.loads(target.read_text())
    relevance = ["relevance", "relevance_all", "relevance_columns"]
    assert [row["op"] for row in rows] == [*relevance, "sparse_adamw", "sparse_adamw_columns"]
    for row in rows:
        assert {"op", "dtype", "density", "device", "time_ms", "limit_share", "ratio"} <= set(row)
        assert row["time_ms"] > 0 and row["ratio"]["eager"] > 0 and row["limit_share"] > 0


def test_a_share_scales_the_limit_to_the_bytes_needed():
    times = [{"ours": 2.0, "peer": 6.0, "limit": 4.0}] * 3
    values = kernels.summary(times, limit_bytes=50, measured_bytes=200)
    assert values["ratio"] == {"peer": 3.0}
    assert values["limit_share"] == 0.5  # 50 bytes take 1 ms, we took 2


def test_the_limit_of_scattered_rows_stands_apart_from_that_of_a_stream():
    times = [{"ours": 2.0, "limit": 4.0, "same_bytes": 1.5}] * 3
    values = kernels.summary(times, limit_bytes=50, measured_bytes=200)
    assert values["limit_share"] == 0.75 and values["stream_share"] == 0.5
    assert values["ratio"] == {}


def test_a_product_is_held_against_one_with_nothing_to_gather():
    values = kernels.summary([{"ours": 2.0, "same_product": 1.0, "peer": 3.0}] * 3, None, 0)
    assert values["limit_share"] == 0.5 and "stream_share" not in values
    assert values["ratio"] == {"peer": 1.5}


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_rows_are_the_limit_of_one_thread_only(native, monkeypatch, threads):
    monkeypatch.setattr(kernels.Bench, "tuned_allocator", lambda self: None)
    config = kernels.Config(
        ops=("sparse_adamw",), dtypes=("float32",), densities=(0.1,), model="tiny", device="cpu", pairs=3,
        threads=threads, compile=False, peers=("eager",),
    )  # fmt: skip
    before = torch.get_num_threads()
    try:
        row = next(row for row in kernels.run(config) if row.op == "sparse_adamw")
    finally:
        torch.set_num_threads(before)
    assert row.limit_share > 0
    if threads == 1:
        assert row.limit_by.keys() == {"limit", "same_bytes"} and row.stream_share > 0
    else:
        assert row.limit_by == {"limit": "torch"} and row.stream_share is None


def test_every_kind_of_state_has_its_rows_and_bytes(native, monkeypatch):
    monkeypatch.setattr(kernels.Bench, "tuned_allocator", lambda self: None)
    config = kernels.Config(
        ops=("sparse_adamw", "fusion"), dtypes=("bfloat16",), densities=(0.1,), model="tiny", device="cpu", pairs=3,
        compile=False,
    )  # fmt: skip
    rows = {(row.op, row.state): row for row in kernels.run(config)}
    columns, forward = ("sparse_adamw_columns", "fp32"), ("fusion_ffn", "fp32")
    assert rows.keys() == {columns, forward, *((op, state) for op in config.ops for state in kernels.STATES)}
    dense = {"gather_fused_scatter", "eager", "dense_fused_masked", "dense_fused"}
    assert dense <= rows["sparse_adamw", "fp32"].ratio.keys() and dense <= rows[columns].ratio.keys()
    assert rows[forward].ratio.keys() == {"eager", "our_two_parts", "relevance_alone"}
    whole = {"eager", "relevance_gather_fused_scatter", "relevance_dense_fused_masked", "our_two_parts"}
    assert whole <= rows["fusion", "fp32"].ratio.keys()
    layers = kernels.Layers("tiny", torch.bfloat16, torch.device("cpu"), rows["fusion", "fp32"].layers)
    layers.select(0.1)
    for state, each in {"fp32": 6 + 16, "8bit": 6 + 4 + 4 * 4 / 256, "master": 4 + 24}.items():
        assert rows["sparse_adamw", state].bytes == round(layers.selected * each)
    # in the fusion the weight (but where a master stands for it) and the gradient are read for the relevance anyway
    assert rows["fusion", "fp32"].bytes == 4 * layers.parameters + layers.selected * (2 + 16)
    assert rows["fusion", "master"].bytes == 4 * layers.parameters + layers.selected * (2 + 24)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_feed_forward_neurons_are_three_weights_with_one_selection(native, dtype):
    layers = kernels.Layers("tiny", dtype, torch.device("cpu"), 2)
    forward = layers.feed_forward(0.1)
    assert forward.slots == [0, 0, 0, 1, 1, 1] and len(forward.out) == 2
    assert forward.weights[2].data_ptr() == layers.weights[6].data_ptr() and forward.weights[2].shape == (688, 256)
    assert forward.parameters == 6 * 688 * 256 and forward.selected == 6 * 69 * 256
    assert all(torch.equal(forward.rows[i], forward.rows[i // 3 * 3]) for i in range(6))
    size = dtype.itemsize
    written = sum(len(((line * 688 + forward.rows[i]) * size // 64).unique()) for i in (2, 5) for line in range(256))
    wanted = 2 * forward.parameters * size + 16 * forward.selected + 4 * 69 * 256 * size + 64 * written
    assert limits.feed_forward_bytes(forward) == wanted

    before = [w.clone() for w in forward.weights]
    eager = kernels.Layers("tiny", dtype, torch.device("cpu"), 2).feed_forward(0.1)
    ops.relevance_sparse_adamw_(*forward.step_lists, forward.out, slots=forward.slots, lr=peers.LR)
    peers.eager_fusion_feed_forward(*eager.step_lists[:5], eager.out, torch.ones(()), *peers.HYPER)
    for got, wanted in zip(forward.out, eager.out):
        assert wanted.median() > 1e-4
        torch.testing.assert_close(got, wanted, rtol=1e-2, atol=1e-5)
    for got, wanted, old, rows in zip(forward.weights, eager.weights, before, forward.rows):
        moved, meant = (got - old)[rows].float(), (wanted - old)[rows].float()
        assert (moved != 0).float().mean() > 0.8  # some are smaller than half a unit of bf16
        # a bf16 weight near the middle of two numbers may fall to either
        assert torch.isclose(moved, meant, rtol=1e-2, atol=1e-7).float().mean() > 0.98


def test_selection_and_the_weight_gradient_have_their_peers_and_limits(native, monkeypatch):
    monkeypatch.setattr(kernels.Bench, "compiled", lambda self, function: function)
    config = kernels.Config(
        ops=("select", "weight_grad"), dtypes=("float32",), densities=(0.1, 0.2), model="tiny", device="cpu", pairs=3
    )  # fmt: skip
    rows = {(row.op, row.model, row.density): row for row in kernels.run(config)}
    models = [("select", "tiny"), ("select", "qwen2.5-vl-7b"), ("weight_grad", "tiny")]
    assert rows.keys() == {(*key, density) for key in models for density in config.densities}
    neurons = 28 * (3 * 3584 + 2 * 512 + 2 * 18944)  # q, o, down; k, v; gate, up
    for density in config.densities:
        large, product = rows["select", "qwen2.5-vl-7b", density], rows["weight_grad", "tiny", density]
        assert large.bytes == 4 * neurons and large.limit_share > 0
        # compiled anew for each density: at those that the bars are about
        assert large.ratio.keys() == {"topk", "sort", *(["compile"] if density == 0.1 else [])}
        assert product.ratio.keys() == {"whole_gradient", "whole_then_select", "compile"}
        assert product.limit_share > 0 and product.limit_by.keys() == {"same_product"}


def test_what_is_compiled_anew_for_each_density_is_so_where_it_tells_most(native):
    bench = kernels.Bench(kernels.Config(model="tiny", device="cpu"))
    densities = (0.01, 0.05, 0.1, 0.2)
    assert [d for d in densities if bench.compiles(d)] == list(densities)
    assert [d for d in densities if bench.compiles(d, sparing=True)] == [0.05, 0.1]
    bench.device = torch.device("cuda")
    assert [d for d in densities if bench.compiles(d)] == [0.05, 0.1]
    assert [d for d in densities if bench.compiles(d, sparing=True)] == [0.1]


def test_relevance_has_its_peers_with_the_norm(native, monkeypatch):
    monkeypatch.setattr(kernels.Bench, "tuned_allocator", lambda self: None)
    monkeypatch.setattr(kernels.Bench, "compiled", lambda self, function: function)
    config = kernels.Config(ops=("relevance",), dtypes=("float32",), model="tiny", device="cpu", pairs=3)
    rows = {row.op: row.ratio.keys() for row in kernels.run(config)}
    with_norm = {"eager_with_norm", "compile_with_norm", "ours_then_norm"}
    assert rows["relevance"] == {"eager", "compile", *with_norm}
    assert rows["relevance_all"] == rows["relevance_columns"] == {"eager", "compile"}


def test_the_peer_with_the_norm_computes_what_the_op_returns(native):
    layers = kernels.Layers("tiny", torch.float32, torch.device("cpu"), 1)
    out = [torch.zeros_like(o) for o in layers.out]
    wanted = ops.neuron_relevance_(layers.weights, layers.grads, layers.out)
    torch.testing.assert_close(peers.relevance_and_squared_norm(layers.weights, layers.grads, out), wanted)
    for own, expected in zip(out, layers.out):
        torch.testing.assert_close(own, expected)


def test_the_product_of_the_limit_is_that_of_the_op(native):
    x, grad, rows = torch.randn(9, 6), torch.randn(9, 20), torch.tensor([0, 3, 4, 19])
    wanted = ops.selected_weight_grad(x, grad, rows)
    for way in limits.same_product(x, grad, rows):
        torch.testing.assert_close(way.run(), wanted)
    torch.testing.assert_close(peers.eager_weight_grad(x, grad, rows), wanted)


def test_peers_of_the_fusion_do_the_same_work(native):
    ours, eager, gathered = (kernels.Layers("tiny", torch.float32, torch.device("cpu"), 1) for _ in range(3))
    for layers in (ours, eager, gathered):
        layers.select(0.3)
    ops.relevance_sparse_adamw_(*ours.step_lists, ours.out, lr=peers.LR)
    peers.eager_fusion(*eager.step_lists[:5], eager.out, torch.ones(()), *peers.HYPER)
    peers.gather_fused_scatter(gathered)()
    for i, weight in enumerate(ours.weights):
        torch.testing.assert_close(eager.weights[i], weight)
        torch.testing.assert_close(gathered.weights[i], weight)
        torch.testing.assert_close(eager.out[i], ours.out[i])


@pytest.mark.parametrize("dim", [0, 1])
def test_masking_leaves_the_gradients_of_the_selected_only(native, monkeypatch, dim):
    taken = []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: taken.append(self.param_groups[0]["params"]))
    layers = kernels.Layers("tiny", torch.float32, torch.device("cpu"), 1)
    layers.select(0.3)
    layers = layers.turned(0.3) if dim else layers
    masked, _ = peers.masked_dense(layers, "fused")
    masked.run()
    for param, whole, rows in zip(taken[0], layers.grads, layers.rows):
        assert param.is_contiguous()
        grad = (param.grad.t() if dim else param.grad).clone()
        assert torch.equal(grad[rows], whole[rows])
        grad[rows] = 0
        assert not grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [7, 40, 256])
def test_the_bytes_of_columns_are_those_of_their_lines(dtype, width):
    size = dtype.itemsize
    buffer = torch.zeros(33 * width, dtype=dtype)
    matrix = buffer[width : width + 32 * width].view(32, width)  # rows begin anywhere within a line
    columns = torch.randperm(width)[: max(1, width // 8)]
    for line in (32, 64):
        places = {
            (row, (matrix.data_ptr() + (row * width + column) * size) // line)
            for row in range(32)
            for column in columns.tolist()
        }
        assert limits.touched_lines(matrix, columns, line) == len(places)


def test_the_bytes_of_a_step_over_columns(native):
    layers = kernels.Layers("tiny", torch.float32, torch.device("cpu"), 1).turned(1.0)
    # of all columns every line is touched: weight both ways, gradient once; moments both ways
    assert limits.column_bytes(layers) == layers.parameters * (3 * 4 + 16)
    layers = layers.turned(0.001)  # one column each
    rows = sum(weight.shape[1] for weight in layers.weights)
    assert limits.column_bytes(layers) == rows * (3 * 64 + 16)


@pytest.mark.parametrize("columns", [5, 64, 200, 2048])
def test_moving_the_same_bytes_changes_none(native, columns):
    for dtype in (torch.float32, torch.bfloat16):
        layers = kernels.Layers("tiny", dtype, torch.device("cpu"), 1)
        if dtype == torch.float32:  # any row length that four bytes divide
            layers.weights = [w[:, :columns].contiguous() for w in layers.weights]
            layers.grads = [g[:, :columns].contiguous() for g in layers.grads]
        layers.select(0.3)
        held = [*layers.weights, *layers.grads, *layers.exp_avg, *layers.exp_avg_sq]
        before = [t.clone() for t in held]
        for way in limits.same_bytes(layers):
            way.run()
            assert all(torch.equal(a, b) for a, b in zip(before, held)), way.name


def test_row_traffic_refuses_odd_sizes(native):
    from leaml_plugin import _native

    with pytest.raises(ValueError, match="got 6 and 8 bytes"):
        _native.RowTraffic().add(8, 8, 8, 8, 6, 8)
    with pytest.raises(ValueError, match="whole steps of 256 bytes, got 100"):
        _native.RowTraffic().move(100)


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("words", [0, 1, 63, 64, 65, 1000, 4096, 10_000])
def test_a_stream_reads_every_word_and_changes_none(native, words, prefetch):
    from leaml_plugin import _native

    a, b = torch.randint(-(2**31), 2**31, (2, words + 1), dtype=torch.int32)  # the word after the end is not to count
    before = a.clone()
    wanted = (a[:words] ^ b[:words]).sum(dtype=torch.int64).item() % 2**32
    for streams in (2, 4):
        assert _native.stream_read(a.data_ptr(), b.data_ptr(), 4 * words, prefetch, streams) == wanted
    _native.stream_rewrite(a.data_ptr(), 4 * words, prefetch)
    assert torch.equal(a, before)


def test_a_stream_refuses_odd_sizes(native):
    from leaml_plugin import _native

    with pytest.raises(ValueError, match=r"stream_read: wanted .* got 6 bytes"):
        _native.stream_read(8, 8, 6, False)
    with pytest.raises(ValueError, match="wanted 2 or 4 streams, got 3"):
        _native.stream_read(8, 8, 8, False, 3)
    with pytest.raises(ValueError, match=r"stream_rewrite: wanted .* got -4 bytes"):
        _native.stream_rewrite(8, -4, True)


def test_the_fastest_way_is_the_limit_by_the_median():
    times = {"torch": iter([9, 9, 5, 5, 5]), "plain": iter([9, 9, 1, 7, 7]), "prefetch": iter([9, 9, 4, 4, 90])}
    ways = [limits.Contender(name, lambda name=name: name) for name in times]
    chosen, by = limits.fastest("limit", ways, lambda contender: next(times[contender.name]))
    assert by == "prefetch" and chosen.name == "limit" and chosen.run() == "prefetch"


def test_several_threads_are_not_held_against_loops_of_one(native):
    cpu = torch.device("cpu")
    for read_only, torch_ways in ((True, ["torch", "torch_dot"]), (False, ["torch"])):
        one = [way.name for way in limits.Limit(8, cpu, read_only, threads=1).candidates]
        assert one == [*torch_ways, "plain", "prefetch", *(["plain_4", "prefetch_4"] if read_only else [])]
        assert [way.name for way in limits.Limit(8, cpu, read_only, threads=2).candidates] == torch_ways


def test_bad_options_are_named():
    with pytest.raises(LeamlError, match="did you mean 'sparse_adamw'"):
        kernels.run(kernels.Config(ops=("sparse_adam",)))
    with pytest.raises(LeamlError, match="fractions above 0"):
        kernels.run(kernels.Config(densities=(5.0,)))
