"""The named peers of every op: what one writes in PyTorch, and the optimizers that others ship.

Covers: eager functions (which ``kernels`` also compiles), gather + fused step + scatter, dense AdamW with masked
gradients, bitsandbytes and apex where installed. Does not cover: our own ops.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from leaml_plugin.benchmark.layers import LR, Layers
from leaml_plugin.benchmark.timing import Contender

HYPER = (LR, 0.9, 0.999, 1e-8, 0.01)


def eager_relevance(weights, grads, out) -> None:
    """What one writes in PyTorch: the first-order Taylor score of every row."""
    for w, g, o in zip(weights, grads, out):
        o += (w * g).sum(1, dtype=o.dtype).abs()


def eager_relevance_of_columns(weights, grads, out) -> None:
    """The same of every input column."""
    for w, g, o in zip(weights, grads, out):
        o += (w * g).sum(0, dtype=o.dtype).abs()


def eager_relevance_all(weights, grads, out) -> None:
    """All four criteria of every row: ``out`` is ``[4, rows]`` each."""
    for w, g, o in zip(weights, grads, out):
        product, squares = w * g, (g * g).sum(1, dtype=o.dtype)
        o[0] += product.sum(1, dtype=o.dtype).abs()
        o[1] += product.abs().sum(1, dtype=o.dtype)
        o[2] += squares
        o[3] += squares.sqrt()


def eager_relevance_and_norm(weights, grads, out) -> Any:
    """The same and the gradients' norm for clipping, which our op returns anyway."""
    import torch

    eager_relevance(weights, grads, out)
    return torch.nn.utils.get_total_norm(grads)


def relevance_and_squared_norm(weights, grads, out) -> Any:
    """Both in terms that torch.compile can join into one loop over each row; to be compiled."""
    squares = []
    for w, g, o in zip(weights, grads, out):
        o += (w * g).sum(1, dtype=o.dtype).abs()
        squares.append((g.to(o.dtype) * g.to(o.dtype)).sum(1).sum())
    return sum(squares)


def eager_sparse_adamw(weights, rows, grads, exp_avg, exp_avg_sq, step, lr, beta1, beta2, eps, decay) -> None:
    """The selected rows by indexing, fp32 state."""
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    for w, r, g, m, v in zip(weights, rows, grads, exp_avg, exp_avg_sq):
        own, grad = w[r].to(m.dtype), g[r].to(m.dtype)
        m.lerp_(grad, 1 - beta1)
        v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        own = own * (1 - lr * decay) - (lr / correction1) * m / ((v / correction2).sqrt() + eps)
        w[r] = own.to(w.dtype)


def eager_fusion(weights, rows, grads, exp_avg, exp_avg_sq, out, step, *hyper) -> None:
    """The relevance of all rows, then the step of the selected; compiled, it is one graph."""
    eager_relevance(weights, grads, out)
    eager_sparse_adamw(weights, rows, grads, exp_avg, exp_avg_sq, step, *hyper)


def eager_fusion_feed_forward(weights, rows, grads, exp_avg, exp_avg_sq, out, step, *hyper) -> None:
    """The same of feed-forward neurons: gate, up and down's columns of a layer, joined."""
    for i, o in enumerate(out):
        own = range(3 * i, 3 * i + 3)
        o += sum((weights[j] * grads[j]).sum(1, dtype=o.dtype) for j in own).abs()
    eager_sparse_adamw(weights, rows, grads, exp_avg, exp_avg_sq, step, *hyper)


def eager_weight_grad(x, grad, rows) -> Any:
    """The weight gradient of the selected rows: gathered, then multiplied."""
    return grad.index_select(1, rows).t() @ x


def eager_select(scores, k) -> Any:
    """The ``k`` highest of all scores, ascending by index."""
    import torch

    return torch.topk(torch.cat(scores), k).indices.sort()


def gather_fused_scatter(layers: Layers) -> Callable[[], None]:
    import torch

    scalar_steps = [torch.ones((), device=layers.device) for _ in layers.weights]
    lr, beta1, beta2, eps, decay = HYPER

    def run() -> None:
        own = [w.index_select(0, r).float() for w, r in zip(layers.weights, layers.rows)]
        grads = [g.index_select(0, r).float() for g, r in zip(layers.grads, layers.rows)]
        torch._fused_adamw_(
            own, grads, layers.exp_avg, layers.exp_avg_sq, [], scalar_steps,
            lr=lr, beta1=beta1, beta2=beta2, weight_decay=decay, eps=eps, amsgrad=False, maximize=False,
        )  # fmt: skip
        for w, r, values in zip(layers.weights, layers.rows, own):
            w.index_copy_(0, r, values.to(w.dtype))

    return run


def masked_dense(layers: Layers, kind: str, relevance: bool = False) -> list[Contender]:
    """torch.optim.AdamW over whole weights: with their gradients masked, which every step has to do, as each backward
    pass makes new ones; and the optimizer's step alone. With ``relevance``, only the first, after eager relevance."""
    import torch

    params, masks = [], []
    for w, g, r in zip(layers.weights, layers.grads, layers.rows):
        mask = torch.zeros(len(g), 1, dtype=g.dtype, device=g.device)
        mask[r] = 1
        if layers.dim == 1:  # an optimizer has the weights as they lie in memory
            w, g, mask = w.t(), g.t(), mask.t()
        params.append(torch.nn.Parameter(w.clone()))
        params[-1].grad = g.clone()
        masks.append(mask)
    grads = [p.grad for p in params]
    optimizer = torch.optim.AdamW(params, lr=HYPER[0], weight_decay=HYPER[4], **{kind: True})

    def masked() -> None:
        torch._foreach_mul_(grads, masks)
        optimizer.step()

    if relevance:
        weights, out = [p.detach() for p in params], [torch.zeros_like(o) for o in layers.out]

        def run() -> None:
            eager_relevance(weights, grads, out)
            masked()

        return [Contender(f"relevance_dense_{kind}_masked", run)]
    return [Contender(f"dense_{kind}_masked", masked), Contender(f"dense_{kind}", optimizer.step)]


def optional_gpu_peers(layers: Layers) -> list[Contender]:
    """bitsandbytes' and apex's dense AdamW, their steps alone, where installed."""
    import importlib.util

    import torch

    peers = []

    def params() -> list[Any]:
        result = [torch.nn.Parameter(w.clone()) for w in layers.weights]
        for p, g in zip(result, layers.grads):
            p.grad = g.clone()
        return result

    if importlib.util.find_spec("bitsandbytes"):
        import bitsandbytes

        peers.append(Contender("bitsandbytes_8bit", bitsandbytes.optim.AdamW8bit(params(), lr=HYPER[0]).step))
    if importlib.util.find_spec("apex"):
        from apex.optimizers import FusedAdam

        peers.append(Contender("apex_fused", FusedAdam(params(), lr=HYPER[0]).step))
    return peers
