"""SparseAdamW as a torch optimizer: equality with torch.optim.AdamW, compact state, schedulers, scaler, reselection."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from leaml_plugin import LeamlError, RelevanceScorer, Selection, SparseAdamW, attach

ROWS = torch.tensor([1, 4, 5, 9])


def weight(dtype: torch.dtype = torch.float32, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*(shape or (12, 7)), generator=torch.Generator().manual_seed(0)).to(dtype))


def gradient(step: int, shape=(12, 7), scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(100 + step))


def sparse(p, **kw) -> SparseAdamW:
    return SparseAdamW([{"params": [p], "rows": [ROWS]}], **{"lr": 0.01, **kw})


def test_equals_torch_adamw_on_the_same_rows_over_1000_steps():
    p, q = weight(), nn.Parameter(weight().detach()[ROWS])
    ours, theirs = sparse(p), torch.optim.AdamW([q], lr=0.01)
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 1000) for o in (ours, theirs)]
    before = p.detach().clone()
    for step in range(1000):
        p.grad = gradient(step)
        q.grad = p.grad[ROWS]
        for o in (ours, theirs, *schedulers):
            o.step()
    torch.testing.assert_close(p[ROWS], q, rtol=1e-6, atol=1e-6)
    others = [i for i in range(12) if i not in ROWS.tolist()]
    assert torch.equal(p[others], before[others])


@pytest.mark.parametrize("shape", [(), (5,), (6, 3), (4, 3, 2)])
def test_without_rows_it_is_adamw_for_any_shape(shape):
    p = nn.Parameter(torch.ones(shape))
    q = nn.Parameter(torch.ones(shape))
    ours, theirs = SparseAdamW([p], lr=0.1, maximize=True), torch.optim.AdamW([q], lr=0.1, maximize=True)
    for step in range(10):
        p.grad = torch.full(shape, 0.3 * (step - 4))
        q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(p, q)


def test_a_channels_last_convolution_trains_as_any_other():
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        conv = nn.Conv2d(3, 4, 3).to(memory_format=layout)
        optimizer = SparseAdamW([{"params": [conv.weight], "rows": [torch.tensor([1, 3])]}], lr=0.1)
        for step in range(3):
            conv.weight.grad = gradient(step, (4, 3, 3, 3)).contiguous(memory_format=layout)
            optimizer.step()
        assert conv.weight.is_contiguous(memory_format=layout)
        results.append(conv.weight.detach().contiguous())
    assert torch.equal(*results)


def test_state_is_compact():
    p = weight()
    optimizer = sparse(p)
    p.grad = gradient(0)
    optimizer.step()
    state = optimizer.state[p]
    assert state["exp_avg"].shape == state["exp_avg_sq"].shape == (4, 7) and state["step"].tolist() == [1] * 4
    assert optimizer.state_bytes() == 2 * 4 * 7 * 4 + 4 * 4 + 4 * 8  # moments, step counters, row indices


@pytest.mark.parametrize("eight_bit", [False, True])
@pytest.mark.parametrize("dtype, masters", [(torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)])
def test_state_dict_round_trip_is_exact(dtype, masters, eight_bit):
    def start():
        p = weight(dtype)
        return p, sparse(p, master_weights=masters, eight_bit=eight_bit, seed=3)

    def run(p, optimizer, steps):
        for step in steps:
            p.grad = gradient(step).to(dtype)
            optimizer.step()

    p, optimizer = start()
    run(p, optimizer, range(5))
    saved = copy.deepcopy((p.detach(), optimizer.state_dict()))
    run(p, optimizer, range(5, 10))
    q, resumed = start()
    q.data.copy_(saved[0])
    resumed.load_state_dict(saved[1])
    kinds = {k: v.dtype for k, v in resumed.state[q].items()}
    assert kinds == {k: v.dtype for k, v in optimizer.state[p].items()}
    run(q, resumed, range(5, 10))
    assert torch.equal(p, q)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_of_the_optimizer_goes_on_by_itself(copied):
    p = weight()
    optimizer = sparse(p, max_grad_norm=0.5, relevance="fisher")
    p.grad = gradient(0)
    optimizer.step()
    twin = copied(optimizer)
    (q,) = twin.param_groups[0]["params"]
    before = p.detach().clone()
    q.grad = gradient(1)
    twin.step()
    assert torch.equal(p, before) and not torch.equal(q, before)
    p.grad = gradient(1)
    optimizer.step()
    assert torch.equal(p, q) and torch.equal(optimizer.relevance(p), twin.relevance(q))
    assert torch.equal(optimizer.grad_norm, twin.grad_norm)


def test_a_refused_group_is_not_stepped():
    p, q = weight(), weight()
    optimizer = sparse(p)
    for rows in ([torch.tensor([12])], [ROWS, ROWS]):
        with pytest.raises(LeamlError, match=r"out of range|2 row lists"):
            optimizer.add_param_group({"params": [q], "rows": rows})
    assert [group["params"] for group in optimizer.param_groups] == [[p]]
    optimizer.add_param_group({"params": [q], "rows": [ROWS]})
    assert torch.equal(optimizer.state[q]["rows"], ROWS)


def test_state_of_another_kind_of_training_is_refused_and_changes_nothing():
    p, q = weight(), weight()
    theirs, dense, ours = torch.optim.AdamW([q]), SparseAdamW([q]), sparse(p)
    p.grad = q.grad = gradient(0)
    for optimizer in (theirs, dense, ours):
        optimizer.step()
    with pytest.raises(LeamlError, match="not saved by SparseAdamW"):
        ours.load_state_dict(theirs.state_dict())
    with pytest.raises(LeamlError, match="no selected rows"):
        ours.load_state_dict(dense.state_dict())
    assert torch.equal(ours.state[p]["rows"], ROWS) and ours.param_groups[0]["lr"] == 0.01
    for _ in range(2):  # torch adds a default of its own at the first loading
        ours.load_state_dict(ours.state_dict())
    ours.step()


def test_a_sparse_gradient_is_refused():
    embedding = nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(LeamlError, match="takes dense gradients"):
        SparseAdamW(embedding.parameters()).step()


def test_loading_does_not_share_memory_with_the_saved_state():
    p = weight()
    optimizer = sparse(p)
    p.grad = gradient(0)
    optimizer.step()
    saved = optimizer.state_dict()
    other = weight()
    twin = sparse(other)
    twin.load_state_dict(saved)
    other.grad = gradient(1)
    twin.step()
    assert optimizer.state[p]["step"].tolist() == [1] * 4


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5}])
def test_grad_scaler_unscales_and_skips(options):
    plain, scaled = weight(), weight()
    reference, optimizer = sparse(plain, **options), sparse(scaled, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    for step in range(4):
        scaled.grad = gradient(step) * scaler.get_scale()
        plain.grad = gradient(step)
        if step == 2:
            scaled.grad[1, 2] = math.inf
            plain.grad = None
            state = copy.deepcopy(optimizer.state[scaled])
            before = scaled.detach().clone()
        scaler.scale(torch.ones(()))  # what scale(loss) does to initialise the scaler
        scaler.step(optimizer)
        scaler.update()
        if step == 2:
            assert torch.equal(scaled, before) and scaler.get_scale() == 512.0
            assert all(torch.equal(v, state[k]) for k, v in optimizer.state[scaled].items())
        reference.step()
    torch.testing.assert_close(scaled, plain, rtol=1e-5, atol=1e-6)


def test_clipping_inside_the_step_equals_clip_grad_norm():
    p, q, r, s = weight(), weight(torch.float32, 6, 3), weight(), weight(torch.float32, 6, 3)
    inside = SparseAdamW([p, q], lr=0.1, eps=1.0, max_grad_norm=1.0)
    outside = torch.optim.AdamW([r, s], lr=0.1, eps=1.0)
    for step in range(3):
        p.grad, q.grad = gradient(step), gradient(step + 50, (6, 3))
        r.grad, s.grad = p.grad.clone(), q.grad.clone()
        norm = nn.utils.clip_grad_norm_([r, s], 1.0)
        inside.step()
        outside.step()
        torch.testing.assert_close(inside.grad_norm, norm)
        assert torch.equal(p.grad, gradient(step))
    torch.testing.assert_close(p, r)
    torch.testing.assert_close(q, s)


def test_fp16_gradients_times_a_loss_scale_do_not_overflow_the_norm():
    """Their norm is 10^5 and more, beyond what fp16 holds; the step must be that of the same gradients in fp32."""
    half = weight(torch.float16)
    full = nn.Parameter(half.detach().float())
    ours, exact = sparse(half, eps=1.0, max_grad_norm=0.5), sparse(full, eps=1.0, max_grad_norm=0.5)
    for step in range(3):
        half.grad = (gradient(step) / 4).half() * 65536
        full.grad = half.grad.float() / 65536
        assert half.grad.isfinite().all() and torch.nn.utils.get_total_norm([half.grad]).isinf()
        ours.grad_scale, ours.found_inf = torch.tensor([65536.0]), torch.tensor([0.0])  # as GradScaler does
        ours.step()
        exact.step()
        assert ours.grad_norm.dtype == torch.float32
        torch.testing.assert_close(ours.grad_norm.reshape(()), exact.grad_norm)
    torch.testing.assert_close(ours.state[half]["master"], full.detach()[ROWS])
    torch.testing.assert_close(ours.state[half]["exp_avg"], exact.state[full]["exp_avg"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_norm_for_clipping_has_fp32_precision(dtype, transposed):
    """Of matrices in both memory orders, a vector, a scalar, a convolution in channels-last and an empty matrix."""
    params, exact = [], 0.0
    for number, shape in enumerate([(700, 900), (4, 3, 3, 3), (50,), (), (0, 5)]):
        p = nn.Parameter(torch.zeros(shape, dtype=dtype))
        p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(number)).to(dtype)
        if transposed and p.dim() == 2:
            p.grad = p.grad.t().contiguous().t()
        if transposed and p.dim() == 4:
            p.grad = p.grad.contiguous(memory_format=torch.channels_last)
        params.append(p)
        exact += float(p.grad.double().square().sum())
    optimizer = SparseAdamW(params, lr=0.0, max_grad_norm=1.0)
    optimizer.step()
    assert optimizer.grad_norm.dtype == torch.float32
    assert float(optimizer.grad_norm) == pytest.approx(math.sqrt(exact), rel=1e-5)


def test_a_norm_that_is_known_is_not_taken_again():
    """The relevance pass emits it: the same step, for one step only, at no further read of the gradients."""
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(7, 12, bias=False), nn.Tanh(), nn.Linear(12, 3, bias=False)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    optimizers = [
        SparseAdamW([{"params": [n[0].weight, n[2].weight], "rows": [ROWS, ROWS[:1]]}], eps=1.0, max_grad_norm=0.05)
        for n in nets
    ]
    linear = {name: m for name, m in nets[0].named_children() if isinstance(m, nn.Linear)}
    scorer = RelevanceScorer(linear, gradients="keep")
    for step in range(4):
        for net, optimizer in zip(nets, optimizers):
            optimizer.zero_grad()
            (net(gradient(step)).square().sum() * (1 + step)).backward()
        if step < 3:
            scorer.accumulate()
            optimizers[0].use_squared_norm(scorer.squared_norm)
        for optimizer in optimizers:
            optimizer.step()
        torch.testing.assert_close(optimizers[0].grad_norm, optimizers[1].grad_norm)
        assert float(optimizers[0].grad_norm) > 0.05
    for ours, theirs in zip(nets[0].parameters(), nets[1].parameters()):
        torch.testing.assert_close(ours, theirs)


def test_a_norm_that_was_given_is_used_once_and_only_for_its_gradients():
    p = weight()
    optimizer = sparse(p, max_grad_norm=1.0)

    def norm_of(step, before=lambda: None, closure=None):
        p.grad = gradient(step)
        optimizer.use_squared_norm(torch.tensor([16.0], dtype=torch.float64))
        before()
        optimizer.step(closure)
        return float(optimizer.grad_norm)

    measured = float(gradient(0).norm())
    assert norm_of(0) == 4.0
    optimizer.step()
    assert float(optimizer.grad_norm) == pytest.approx(measured)
    # gradients of another backward pass
    assert norm_of(0, lambda: (optimizer.zero_grad(), setattr(p, "grad", gradient(0)))) == pytest.approx(measured)
    assert norm_of(0, closure=lambda: None) == pytest.approx(measured)
    assert norm_of(0, closure=lambda: optimizer.use_squared_norm(torch.tensor(9.0))) == 3.0
    # a copy and a scheduler's wrapper around step()
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    assert norm_of(0) == 4.0
    scheduler.step()
    optimizer.use_squared_norm(torch.tensor(16.0))
    twin = copy.deepcopy(optimizer)
    twin.param_groups[0]["params"][0].grad = gradient(0)
    twin.step()
    assert float(twin.grad_norm) == pytest.approx(measured)


@pytest.mark.parametrize("unscaled", [False, True])
def test_a_given_norm_under_grad_scaler(unscaled):
    """A step that the scaler skips has used it up too."""
    p = weight()
    optimizer = sparse(p, max_grad_norm=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    for bad in (False, True):
        p.grad = gradient(0) * 8
        if bad:
            p.grad[1, 1] = math.inf
        optimizer.use_squared_norm(torch.tensor(16.0 if unscaled else 16.0 * 64), unscaled=unscaled)
        scaler.step(optimizer)
        assert float(optimizer.grad_norm) == 4.0
        scaler.update()
    p.grad = gradient(1) * scaler.get_scale()
    scaler.step(optimizer)
    torch.testing.assert_close(optimizer.grad_norm.reshape(()), gradient(1).norm())


def test_a_norm_that_cannot_be_used_is_refused():
    with pytest.raises(LeamlError, match=r"without max_grad_norm"):
        sparse(weight()).use_squared_norm(torch.tensor(1.0))
    for wrong, got in (
        (torch.ones(2), r"torch.float32 of shape \[2\]"),
        (torch.tensor(1), "torch.int64"),
        (2.0, "2.0"),
    ):
        with pytest.raises(LeamlError, match="wanted a floating-point tensor of one element, got " + got):
            sparse(weight(), max_grad_norm=1.0).use_squared_norm(wrong)


def test_lr_may_be_a_tensor():
    p, q = weight(), weight()
    lr = torch.tensor(0.01)
    ours, other = sparse(p, lr=lr), sparse(q)
    for step in range(3):
        p.grad = q.grad = gradient(step)
        ours.step()
        other.step()
    assert torch.equal(p, q)
    lr.zero_()
    before = p.detach().clone()
    p.grad = gradient(4)
    ours.step()
    assert torch.equal(p, before)


def test_closure_and_missing_gradients():
    p, q = weight(), weight()
    optimizer = SparseAdamW([p, q], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    before = q.detach().clone()
    first = optimizer.step(closure)
    assert optimizer.step(closure) < first and torch.equal(q, before) and q not in optimizer.state


def test_stochastic_rounding_is_unbiased_where_nearest_stands_still():
    """bf16 weights of 1 moved by 2^-10 a step: rounding to nearest never leaves 1."""
    p = nn.Parameter(torch.ones(4, 2048, dtype=torch.bfloat16))
    optimizer = SparseAdamW([{"params": [p], "rows": [torch.arange(4)]}], lr=2.0**-10, weight_decay=0,
                            master_weights=False, betas=(0.0, 0.0), eps=0.0)  # fmt: skip
    for _ in range(64):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert "master" not in optimizer.state[p]
    assert float(p.detach().float().mean()) == pytest.approx(1 - 64 * 2.0**-10, abs=1e-3)


def test_eight_bit_follows_fp32():
    p, q = weight(torch.float32, 12, 600), weight(torch.float32, 12, 600)
    exact, coded = sparse(p), sparse(q, eight_bit=True)
    start = p.detach().clone()
    for step in range(50):
        p.grad = q.grad = gradient(step, (12, 600)) + 0.5
        exact.step()
        coded.step()
    moved = (p - start)[ROWS].norm()
    assert float(((p - q)[ROWS].norm() / moved).detach()) < 0.05
    assert coded.state_bytes() < 0.3 * exact.state_bytes()


def test_reselect_rows_of_a_whole_parameter():
    def run(change, dtype=torch.float32):
        p = weight(dtype)
        optimizer = sparse(p)
        for step in range(6):
            if step == 3 and change is not None:
                optimizer.reselect({p: change})
            p.grad = gradient(step).to(dtype)
            optimizer.step()
        return p, optimizer

    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(run(None, dtype)[0], run(ROWS, dtype)[0])
        p, optimizer = run(torch.tensor([4, 8]), dtype)
        assert optimizer.state[p]["step"].tolist() == [6, 3]
        assert torch.equal(p[4], run(None, dtype)[0][4])
        assert not torch.equal(p[8], weight(dtype)[8])
        if dtype == torch.bfloat16:
            assert torch.equal(optimizer.state[p]["master"].bfloat16(), p[[4, 8]])
    # resuming takes the changed rows from the state
    again = weight()
    resumed = sparse(again)
    p, optimizer = run(torch.tensor([4, 8]))
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.state[again]["rows"].tolist() == [4, 8]


def test_relevance_rides_along_with_the_step():
    p, q = weight(), weight()
    riding, plain = sparse(p, relevance="taylor_abs"), sparse(q)
    want = torch.zeros(12)
    for step in range(3):
        p.grad = q.grad = gradient(step)
        want += (p.detach() * p.grad).abs().sum(1)
        riding.step()
        plain.step()
    assert torch.equal(p, q)
    torch.testing.assert_close(riding.relevance(p), want)
    riding.reselect({p: want.topk(4).indices})
    assert riding.relevance(p).count_nonzero() == 0
    with pytest.raises(LeamlError, match="relevance="):
        plain.relevance(q)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_and_relevance_are_fp32_under_any_default_dtype(default, dtype):
    torch.set_default_dtype(default)
    try:
        p = weight(dtype)
        optimizer = SparseAdamW([p], relevance="fisher", max_grad_norm=1.0)
        before = optimizer.relevance(p)
        for step in range(2):
            p.grad = gradient(step).to(dtype)
            optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    assert before.dtype == optimizer.relevance(p).dtype == optimizer.grad_norm.dtype == torch.float32
    assert before.shape == optimizer.relevance(p).shape == (12,) and optimizer.relevance(p).gt(0).all()
    assert {v.dtype for v in optimizer.state[p].values()} == {torch.float32}


def test_asking_for_relevance_makes_no_state():
    p = weight()
    optimizer = SparseAdamW([p], relevance="fisher")
    assert optimizer.relevance(p).count_nonzero() == 0
    assert p not in optimizer.state


def test_a_later_step_allocates_no_scores():
    class Zeros(TorchDispatchMode):
        made = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.made += function.overloadpacket is torch.ops.aten.zeros
            return function(*args, **(kwargs or {}))

    p = weight()
    optimizer = sparse(p, relevance="fisher")
    counts = []
    for step in range(3):
        p.grad = gradient(step)
        with Zeros() as zeros:
            optimizer.step()
        counts.append(zeros.made)
    assert counts[0] > 0 and counts[1:] == [0, 0]


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda: SparseAdamW([{"params": [weight()], "rows": [torch.tensor([0, 12])]}]), "row 12 is out of range"),
        (lambda: SparseAdamW([{"params": [weight()], "rows": [torch.tensor([-1])]}]), "row -1 is out of range"),
        (lambda: SparseAdamW([{"params": [weight()], "rows": [torch.tensor([2, 2])]}]), "twice"),
        (lambda: SparseAdamW([{"params": [weight()], "rows": [torch.tensor([0.5])]}]), "1-D integer"),
        (lambda: SparseAdamW([{"params": [weight(), weight()], "rows": [ROWS]}]), "2 parameters but 1 row lists"),
        (lambda: SparseAdamW([weight()], lr=-1.0), "lr must be at least 0"),
        (lambda: SparseAdamW([weight()], betas=(0.9, 1.0)), "betas"),
        (lambda: sparse(weight()).reselect({weight(): ROWS}), "not to this optimizer"),
    ],
)
def test_bad_input_is_one_sentence(make, sentence):
    with pytest.raises(LeamlError, match=sentence):
        make()


def test_state_of_another_selection_is_refused():
    p = weight()
    optimizer = SparseAdamW([p])
    p.grad = gradient(0)
    optimizer.step()
    q = weight(torch.float32, 5, 7)
    with pytest.raises(LeamlError, match="another selection"):
        SparseAdamW([q]).load_state_dict(optimizer.state_dict())


def stepped(dtype=torch.float32, **options) -> SparseAdamW:
    p = weight(dtype)
    optimizer = sparse(p, relevance="fisher", **options)
    p.grad = gradient(0).to(dtype)
    optimizer.step()
    return optimizer


def refusals():
    """What is changed in a good saved state, for which optimizer, and what the refusal says of it."""
    state = "wanted torch.float32 [4, 7]"

    def entry(**changes):
        return lambda saved: saved.update(changes)

    def without(name):
        return lambda saved: saved.pop(name)

    return {
        "row beyond": ({}, entry(rows=torch.tensor([1, 4, 5, 12])), "row 12 is out of range: the parameter has 12"),
        "row below": ({}, entry(rows=torch.tensor([-1, 4, 5, 9])), "row -1 is out of range"),
        "row twice": ({}, entry(rows=torch.tensor([1, 1, 5, 9])), "rows lists a row twice"),
        "rows unsorted": ({}, entry(rows=ROWS.flip(0)), "do not ascend"),
        "rows of floats": ({}, entry(rows=ROWS.float()), "rows must be a 1-D integer tensor"),
        "fewer rows": ({}, entry(rows=ROWS[:3]), "has step as torch.float32 [4]"),
        "step": ({}, entry(step=torch.ones(3)), "has step as torch.float32 [3]"),
        "one step": ({}, entry(step=torch.tensor(1.0)), "wanted torch.float32 [4]"),
        "exp_avg": ({}, entry(exp_avg=torch.zeros(4, 6)), state),
        "exp_avg_sq": ({}, entry(exp_avg_sq=torch.zeros(3, 7)), state),
        "fp16 state": ({}, entry(exp_avg_sq=torch.zeros(4, 7).half()), "exp_avg_sq as torch.float16 [4, 7]"),
        "no exp_avg_sq": ({}, without("exp_avg_sq"), "lacks exp_avg_sq"),
        "no step": ({}, without("step"), "lacks step"),
        "a number as step": ({}, entry(step=3), "lacks step"),
        "relevance": ({}, entry(relevance=torch.zeros(4)), "wanted torch.float32 [12]"),
        "scale": ({"eight_bit": True}, entry(exp_avg_sq_scale=torch.zeros(4, 2)), "wanted torch.float32 [4, 1]"),
        "no scale": ({"eight_bit": True}, without("exp_avg_scale"), "lacks exp_avg_scale"),
        "codes in fp32": ({"eight_bit": True}, entry(exp_avg=torch.zeros(4, 7)), "wanted torch.uint8 [4, 7]"),
        "master": ({"dtype": torch.bfloat16}, entry(master=torch.zeros(3, 7)), state),
        "no master": ({"dtype": torch.bfloat16}, without("master"), "are torch.bfloat16 and master_weights is on"),
        "no rows": ({}, without("rows"), "no selected rows"),
    }  # fmt: skip


@pytest.mark.parametrize("case", list(refusals()))
def test_a_saved_state_that_does_not_fit_is_refused_whole(case):
    """The parameter and the remedy are named, and the optimizer is as it was, also where an earlier parameter fits."""
    options, change, sentence = refusals()[case]
    optimizer, other = stepped(**options), stepped(**options)
    for o in (optimizer, other):
        q = weight(options.get("dtype", torch.float32))
        o.add_param_group({"params": [q], "rows": [ROWS]})
        q.grad = gradient(1).to(q.dtype)
        o.step()
    saved = copy.deepcopy(other.state_dict())
    saved["param_groups"][0]["lr"] = 7.0
    saved["state"][0]["step"] += 40
    change(saved["state"][1])
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(LeamlError) as caught:
        optimizer.load_state_dict(saved)
    assert sentence in str(caught.value) and "parameter 0 of group 1 ([12, 7])" in str(caught.value)
    assert case == "no rows" or "or start with a new state" in str(caught.value)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for key, entry in before["state"].items():
        assert entry.keys() == after["state"][key].keys()
        assert all(torch.equal(value, after["state"][key][name]) for name, value in entry.items())


def test_a_refusal_uses_the_names_of_named_parameters():
    model = nn.Linear(7, 12, bias=False)
    optimizer = SparseAdamW(model.named_parameters())
    model.weight.grad = gradient(0)
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"][0]["exp_avg"] = torch.zeros(3, 7)
    with pytest.raises(LeamlError, match=r"for parameter weight \(\[12, 7\]\)"):
        SparseAdamW(model.named_parameters()).load_state_dict(saved)


def test_rows_are_not_loaded_into_compact_parameters():
    net = nn.Sequential(nn.Linear(7, 12, bias=False))
    handle = attach(net, Selection({"0": ROWS}))
    (p,) = handle.parameters()
    optimizer = SparseAdamW([p], lr=0.1)
    p.grad = gradient(0)[ROWS]
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"][0]["rows"] = torch.arange(4)
    with pytest.raises(LeamlError, match="compact already"):
        optimizer.load_state_dict(saved)


def test_a_state_saved_before_the_first_step_loads():
    p, q = weight(torch.bfloat16), weight(torch.bfloat16)
    fresh = SparseAdamW([{"params": [q], "rows": [ROWS]}])
    fresh.load_state_dict(SparseAdamW([{"params": [p], "rows": [ROWS[:2]]}]).state_dict())
    assert torch.equal(fresh.state[q]["rows"], ROWS[:2])
