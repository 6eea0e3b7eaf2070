"""The in-place path: compact gradients are the dense ones, only selected neurons move, and torch's tools work on it."""

from __future__ import annotations

import copy
import doctest

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from leaml_plugin import LeamlError, Selection, SparseAdamW, attach, selective
from leaml_plugin.selection import all_neurons, linears


def model_of(dtype: torch.dtype = torch.float32, conv: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    first = Conv1D(12, 6) if conv else nn.Linear(6, 12)
    return nn.Sequential(first, nn.GELU(), nn.Linear(12, 5)).to(dtype)


def chosen(columns: bool = False) -> Selection:
    rows, cols = {"0": torch.tensor([1, 4, 7])}, {"2": torch.tensor([1, 4, 7])}
    sizes = {"0": 12, "2": 12}
    if columns:
        return Selection(rows, cols, sizes=sizes, granularity="ffn")
    return Selection(rows | {"2": torch.tensor([0, 3])}, sizes={"0": 12, "2": 5})


def inputs(n: int = 8, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(n, 3, 6, generator=torch.Generator().manual_seed(3)).to(dtype)


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).float().square().mean()


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def test_docstring_example():
    result = doctest.testmod(selective)
    assert result.attempted >= 8 and result.failed == 0


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("columns", [False, True])
def test_compact_gradient_is_the_dense_one(conv, columns):
    model, x = model_of(conv=conv), inputs().requires_grad_()
    loss_of(model, x).backward()
    dense = {n: m.weight.grad.clone() for n, m in linears(model).items()}
    dense_x, x.grad = x.grad.clone(), None
    if conv:
        dense["0"] = dense["0"].t()
    model.zero_grad()
    out = model(x)
    handle = attach(model, chosen(columns))
    assert torch.equal(model(x), out)
    loss_of(model, x).backward()
    torch.testing.assert_close(x.grad, dense_x)
    for name, axis, index in handle.selection:
        want = dense[name].index_select(axis, index)
        got = dict(handle.named_parameters())[name].grad
        torch.testing.assert_close(got, want if axis == 0 else want.t())
    assert all(p.grad is None for n, p in model.named_parameters() if "selected" not in n)


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("shape", [(6,), (1, 6), (0, 6), (5, 6), (2, 3, 6), (2, 1, 3, 6), "strided", "expanded"])
def test_odd_inputs(shape, columns):
    """Any number of leading axes, empty batches, transposed and expanded inputs: as the plain Linear."""
    if shape == "strided":
        x = torch.randn(6, 4, 3).permute(2, 1, 0)
    elif shape == "expanded":
        x = torch.randn(1, 1, 6).expand(3, 4, 6)
    else:
        x = torch.randn(shape)
    plain, tuned = nn.Sequential(nn.Linear(6, 4)), nn.Sequential(nn.Linear(6, 4))
    tuned.load_state_dict(plain.state_dict())
    index = torch.tensor([0, 3])
    rows, cols = ({}, {"0": index}) if columns else ({"0": index}, {})
    handle = attach(tuned, Selection(rows, cols))
    for model in (plain, tuned):
        model(x).square().sum().backward()
    want = plain[0].weight.grad.index_select(int(columns), index)
    torch.testing.assert_close(next(handle.parameters()).grad, want.t() if columns else want)


@pytest.mark.parametrize("columns", [False, True])
def test_a_module_used_twice_gets_both_gradients(columns):
    plain, tuned = nn.Sequential(nn.Linear(6, 6)), nn.Sequential(nn.Linear(6, 6))
    tuned.load_state_dict(plain.state_dict())
    index = torch.tensor([0, 3])
    handle = attach(tuned, Selection({}, {"0": index}) if columns else Selection({"0": index}))
    x = torch.randn(3, 6)
    for model in (plain, tuned):
        model(model(x)).square().sum().backward()
    want = plain[0].weight.grad.index_select(int(columns), index)
    torch.testing.assert_close(next(handle.parameters()).grad, want.t() if columns else want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("make", [SparseAdamW, torch.optim.AdamW, torch.optim.SGD])
def test_only_selected_neurons_move(dtype, columns, make):
    model = model_of(dtype)
    before = bits(model)
    with attach(model, chosen(columns)) as handle:
        optimizer = make(handle.parameters(), lr=0.05)
        for _ in range(5):
            loss_of(model, inputs(dtype=dtype)).backward()
            optimizer.step()
            optimizer.zero_grad()
    after = bits(model)
    assert after.keys() == before.keys() and type(model[0]) is nn.Linear
    assert torch.equal(before["0.bias"], after["0.bias"]) and torch.equal(before["2.bias"], after["2.bias"])
    for name, axis, index in chosen(columns):
        changed = (before[f"{name}.weight"] != after[f"{name}.weight"]).any(1 - axis)
        assert changed.nonzero().flatten().tolist() == index.tolist()
        # delta: what was there + delta = what is there now, to the rounding of the base
        _, where, delta = handle.delta()[name]
        rows = before[f"{name}.weight"].float().index_select(axis, where)
        tuned = (rows if axis == 0 else rows.t()) + delta
        want = after[f"{name}.weight"].index_select(axis, where)
        torch.testing.assert_close(tuned.to(dtype), want if axis == 0 else want.t())


@pytest.mark.parametrize("columns", [False, True])
def test_any_optimizer_gives_what_dense_training_gives(columns):
    """All optimizers agree with dense AdamW whose gradients are masked and that decays nothing.

    ``eps`` is large so that rounding in gradients that are almost 0 is not blown up to whole steps.
    """
    results = []
    for make in (torch.optim.AdamW, SparseAdamW, None):
        model = model_of()
        if make is None:
            optimizer = torch.optim.AdamW(
                [m.weight for m in linears(model).values()], lr=0.01, weight_decay=0, eps=1e-3
            )
            masks = {n: torch.zeros_like(m.weight) for n, m in linears(model).items()}
            for name, axis, index in chosen(columns):
                masks[name].index_fill_(axis, index, 1.0)
        else:
            optimizer = make(attach(model, chosen(columns)).parameters(), lr=0.01, weight_decay=0, eps=1e-3)
        for step in range(30):
            loss_of(model, inputs() + step).backward()
            if make is None:
                for name, m in linears(model).items():
                    m.weight.grad *= masks[name]
            optimizer.step()
            optimizer.zero_grad()
        results.append([model[0].weight.detach().clone(), model[2].weight.detach().clone()])
    for adamw, sparse, dense in zip(*results):
        torch.testing.assert_close(adamw, sparse, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(adamw, dense, rtol=1e-6, atol=1e-6)


def test_all_neurons_is_full_fine_tuning_of_the_linears():
    tuned, plain = model_of(), model_of()
    sparse = SparseAdamW(attach(tuned, all_neurons(linears(tuned))).parameters(), lr=0.01)
    dense = torch.optim.AdamW([m.weight for m in linears(plain).values()], lr=0.01)
    for _ in range(20):
        for model, optimizer in ((tuned, sparse), (plain, dense)):
            loss_of(model, inputs()).backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(tuned[0].weight, plain[0].weight, rtol=1e-6, atol=1e-6)


def test_masters_keep_updates_that_bf16_would_lose():
    model = nn.Sequential(nn.Linear(4, 4, bias=False)).bfloat16()
    model[0].weight.data.fill_(1.0)
    handle = attach(model, Selection({"0": torch.tensor([0])}))
    optimizer = torch.optim.SGD(handle.parameters(), lr=1.0)
    for _ in range(8):  # 8 steps of 2^-10: each alone is below half a bf16 step at 1.0
        next(handle.parameters()).grad = torch.full((1, 4), -(2.0**-10))
        optimizer.step()
    assert model[0].weight[0].tolist() == [1.0078125] * 4 and model[0].weight[1].tolist() == [1.0] * 4


def test_under_autocast():
    model, x = model_of(), inputs()
    with torch.autocast("cpu", torch.bfloat16):
        want = model(x)
        loss_of(model, x).backward()
    dense = model[0].weight.grad[chosen().rows["0"]].clone()
    handle = attach(model, chosen())
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
        assert out.dtype == torch.bfloat16 and torch.equal(out, want)
        out.float().square().mean().backward()
    grad = next(handle.parameters()).grad
    assert grad.dtype == torch.float32
    torch.testing.assert_close(grad, dense, rtol=0.05, atol=1e-3)


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_gradient_checkpointing(reentrant):
    model, x = model_of(), inputs().requires_grad_()
    handle = attach(model, chosen())
    loss_of(model, x).backward()
    want = [p.grad.clone() for p in handle.parameters()]
    for p in handle.parameters():
        p.grad = None
    checkpoint(model, x, use_reentrant=reentrant).float().square().mean().backward()
    for p, grad in zip(handle.parameters(), want):
        torch.testing.assert_close(p.grad, grad)


def test_gradient_accumulation_adds_up():
    model, x = model_of(), inputs()
    handle = attach(model, chosen())
    loss_of(model, x).backward()
    want = [p.grad.clone() for p in handle.parameters()]
    for p in handle.parameters():
        p.grad = None
    for half in x.chunk(2):
        (loss_of(model, half) / 2).backward()
    for p, grad in zip(handle.parameters(), want):
        torch.testing.assert_close(p.grad, grad)
    norm = nn.utils.clip_grad_norm_(handle.parameters(), 1e-4)
    assert norm > 1e-4
    clipped = nn.utils.get_total_norm([p.grad for p in handle.parameters()])
    assert float(clipped) == pytest.approx(1e-4, rel=1e-2)


@pytest.mark.parametrize("checkpointed", ["no", "reentrant", "not reentrant"])
@pytest.mark.parametrize("autocast", [False, True])
def test_columns_under_autocast_and_checkpointing(autocast, checkpointed):
    """The gradient of input columns is that of the plain Linear under the same tools."""

    def gradients(model, parameters):
        x = inputs().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = checkpoint(model, x, use_reentrant=checkpointed == "reentrant") if checkpointed != "no" else model(x)
        assert out.dtype == (torch.bfloat16 if autocast else torch.float32)
        out.float().square().mean().backward()
        return [p.grad for p in parameters]

    model = model_of()
    dense = gradients(model, [model[0].weight, model[2].weight])
    handle = attach(model, chosen(columns=True))
    rows, columns = gradients(model, list(handle.parameters()))
    assert rows.dtype == columns.dtype == torch.float32 and columns.shape == (3, 5)
    tolerance = {"rtol": 0.05, "atol": 1e-3} if autocast else {}
    torch.testing.assert_close(rows, dense[0][[1, 4, 7]], **tolerance)
    torch.testing.assert_close(columns, dense[1][:, [1, 4, 7]].t(), **tolerance)


@pytest.mark.parametrize("columns", [False, True])
def test_the_work_of_the_weight_gradient_scales_with_the_density(columns):
    """Counted, not timed: 2 * tokens * k * fan operations, and gradients of k * fan numbers."""
    tokens, neurons, fan = 24, 200, 32
    for k in (1, 10, 20, 200):
        layer = nn.Linear(neurons, fan) if columns else nn.Linear(fan, neurons)
        model, index = nn.Sequential(layer, nn.Linear(layer.out_features, 4)), {"0": torch.arange(k)}
        selection = Selection({} if columns else index, index if columns else {}, sizes={"0": neurons})
        (p,) = attach(model, selection).parameters()
        loss = model(torch.randn(tokens, layer.in_features)).square().mean()
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        through_the_second = 2 * tokens * 4 * layer.out_features
        assert counter.get_total_flops() == through_the_second + 2 * tokens * k * fan
        assert p.grad.numel() == k * fan


@pytest.mark.slow
@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_with_checkpointing_and_autocast(autocast, columns):
    """All three tools at once, forward, backward and step, against the eager model without any but autocast."""
    results = []
    for together in (False, True):
        torch.compiler.reset()
        model = model_of()
        handle = attach(model, chosen(columns))
        optimizer = SparseAdamW(handle.parameters(), lr=0.01, eps=1e-3)

        def forward(x, model=model, together=together):
            return checkpoint(model, x, use_reentrant=False) if together else model(x)

        run = torch.compile(forward, backend="aot_eager", fullgraph=True) if together else forward
        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = run(inputs()).float().square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append((loss.detach(), model[0].weight.detach(), model[2].weight.detach()))
    tolerance = {"rtol": 1e-2, "atol": 1e-3} if autocast else {}
    for got, wanted in zip(results[1], results[0]):
        torch.testing.assert_close(got, wanted, **tolerance)
    assert not torch.equal(results[0][1], model_of()[0].weight)


@pytest.mark.slow
def test_under_inductor():
    """The default backend, which compiles code of its own for the backward pass too."""
    results = []
    for backend in (None, "inductor"):
        model = model_of()
        handle = attach(model, chosen(columns=True))
        optimizer = SparseAdamW(handle.parameters(), lr=0.01)
        run = torch.compile(model, backend=backend, fullgraph=True) if backend else model
        for _ in range(3):
            loss = loss_of(run, inputs())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append((loss.detach(), model[0].weight.detach(), model[2].weight.detach()))
    for got, wanted in zip(results[1], results[0]):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("columns", [False, True])
def test_under_compile(columns):
    eager, compiled = model_of(), model_of()
    losses = []
    for model in (eager, compiled):
        handle = attach(model, chosen(columns))
        optimizer = SparseAdamW(handle.parameters(), lr=0.01)
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if model is compiled else model
        for _ in range(4):
            loss = loss_of(run, inputs())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    torch.testing.assert_close(eager[0].weight, compiled[0].weight)


def test_state_dict_resumes_exactly():
    """Stop after 3 of 6 steps, in bf16 with masters: model and optimizer state give the same bits."""

    def start():
        model = model_of(torch.bfloat16)
        handle = attach(model, chosen())
        return model, handle, SparseAdamW(handle.parameters(), lr=0.01)

    def run(model, optimizer, steps):
        for step in steps:
            loss_of(model, inputs(dtype=torch.bfloat16) + step).backward()
            optimizer.step()
            optimizer.zero_grad()

    model, _, optimizer = start()
    run(model, optimizer, range(3))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    run(model, optimizer, range(3, 6))
    again, _, resumed = start()
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    run(again, resumed, range(3, 6))
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key


def test_loading_weights_only_updates_the_masters():
    model = model_of()
    handle = attach(model, chosen())
    other = {k: v + 1 for k, v in model_of().state_dict().items()}
    model.load_state_dict(other, strict=False)
    torch.testing.assert_close(next(handle.parameters()), other["0.weight"][chosen().rows["0"]])
    wrong = model.state_dict() | {"0.selected_index": torch.tensor([0, 1, 2])}
    with pytest.raises(LeamlError, match="other neurons of 0 selected"):
        model.load_state_dict(wrong)


def test_detach_restores_everything():
    model = model_of()
    model[2].bias.requires_grad_(False)
    before, required = bits(model), [p.requires_grad for p in model.parameters()]
    handle = attach(model, chosen())
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["0.selected_weight", "2.selected_weight"]
    optimizer = SparseAdamW(handle.parameters(), lr=0.1)
    loss_of(model, inputs()).backward()
    optimizer.step()
    handle.detach(restore=True)
    handle.detach()
    assert bits(model).keys() == before.keys() and all(torch.equal(v, before[k]) for k, v in bits(model).items())
    assert [p.requires_grad for p in model.parameters()] == required
    assert type(model[0]) is nn.Linear and model[0].forward.__func__ is nn.Linear.forward
    assert handle.delta()["0"][2].abs().max() > 0.05


def test_a_deep_copy_trains_itself_and_not_the_original():
    model = model_of()
    attach(model, chosen())
    twin = copy.deepcopy(model)
    before = bits(model)
    optimizer = SparseAdamW([p for p in twin.parameters() if p.requires_grad], lr=0.1)
    loss_of(twin, inputs()).backward()
    optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in bits(model).items())
    assert torch.equal(twin[0].weight[1], twin[0].selected_weight[0]) and not torch.equal(
        twin[0].weight, model[0].weight
    )


def test_reselect_keeps_survivors_and_is_a_no_op_without_change():
    def run(change):
        model = model_of()
        handle = attach(model, chosen())
        optimizer = SparseAdamW(handle.parameters(), lr=0.01)
        for step in range(6):
            if step == 3 and change is not None:
                handle.reselect(change, optimizer)
            loss_of(model, inputs()).backward()
            optimizer.step()
            optimizer.zero_grad()
        return model, handle, optimizer

    base = bits(run(None)[0])
    assert all(torch.equal(v, base[k]) for k, v in bits(run(chosen())[0]).items())

    new = Selection({"0": torch.tensor([4, 9])}, sizes={"0": 12})  # keeps 4, drops 1 and 7, adds 9; nothing of "2"
    model, handle, optimizer = run(new)
    assert optimizer.state[model[0].selected_weight]["step"].tolist() == [6, 3]
    assert model[2].selected_weight.shape == (0, 12)
    delta = handle.delta()
    assert delta["0"][1].tolist() == [1, 4, 7, 9] and delta["2"][1].tolist() == [0, 3]
    handle.detach()
    start = model_of()
    changed = (model[0].weight != start[0].weight).any(1).nonzero().flatten().tolist()
    assert changed == [1, 4, 7, 9]
    torch.testing.assert_close(start[0].weight[[1, 4, 7, 9]] + delta["0"][2], model[0].weight[[1, 4, 7, 9]])


def test_reselect_to_other_sizes_while_the_last_loss_is_alive():
    """A loop's ``loss`` keeps the graph in which the parameters had their old shapes."""
    model = model_of()
    handle = attach(model, chosen())
    optimizer = SparseAdamW(handle.parameters(), lr=0.01)
    sizes = {"0": 12, "2": 5}
    changes = [Selection({"0": torch.tensor([1, 2, 4, 7]), "2": torch.tensor([3])}, sizes=sizes), chosen()]
    for change in changes:
        loss = loss_of(model, inputs())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        handle.reselect(change, optimizer)
        assert loss.grad_fn is not None and all(p.dtype == torch.float32 for p in handle.parameters())
    loss_of(model, inputs()).backward()
    assert [list(p.grad.shape) for p in handle.parameters()] == [[3, 6], [2, 12]]


def test_reselect_takes_the_optimizer_of_a_trainer_and_no_other_kind():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    model = model_of()
    handle = attach(model, chosen())
    optimizer = SparseAdamW(handle.parameters(), lr=0.01)
    loss_of(model, inputs()).backward()
    optimizer.step()
    change = Selection({"0": torch.tensor([4, 9])}, sizes={"0": 12})
    before = bits(model)
    with pytest.raises(LeamlError, match="states of AdamW cannot follow"):
        handle.reselect(change, torch.optim.AdamW(handle.parameters()))
    assert all(torch.equal(v, before[k]) for k, v in bits(model).items())
    try:
        wrapped = Accelerator(cpu=True).prepare(optimizer)
        assert wrapped is not optimizer
        handle.reselect(change, wrapped)
    finally:
        AcceleratorState._reset_state(True)  # it is one for the whole process
    assert optimizer.state[model[0].selected_weight]["step"].tolist() == [1, 0]


def test_reselect_adds_a_module():
    model = model_of()
    handle = attach(model, Selection({"0": torch.tensor([1])}))
    optimizer = SparseAdamW(handle.parameters(), lr=0.01)
    handle.reselect(chosen(), optimizer)
    loss_of(model, inputs()).backward()
    optimizer.step()
    assert len(optimizer.param_groups[0]["params"]) == 2 and len(optimizer.state) == 2


def test_param_groups_split_by_options():
    handle = attach(model_of(), chosen())
    groups = handle.param_groups(lambda name: {"lr": 0.1 if name == "2" else 0.01})
    assert [g["lr"] for g in groups] == [0.01, 0.1]
    optimizer = SparseAdamW(groups, lr=1.0)
    assert [g["lr"] for g in optimizer.param_groups] == [0.01, 0.1]


@pytest.mark.parametrize(
    "spoil, sentence",
    [
        (lambda m: attach(m, chosen()), "attached already"),
        (lambda m: m.register_module("0", nn.Bilinear(2, 2, 2)), "no Linear"),
        (lambda m: setattr(m[0], "forward", lambda x: x), "adapter"),
        (lambda m: m.register_parameter("tied", m[0].weight), "tied to"),
        (lambda m: m.to("meta"), "not been loaded"),
    ],
)
def test_what_cannot_be_tuned_in_place_is_refused(spoil, sentence):
    model = model_of()
    spoil(model)
    with pytest.raises(LeamlError, match=sentence):
        attach(model, chosen())
