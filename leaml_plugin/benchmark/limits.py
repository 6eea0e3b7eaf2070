"""The physical limits that the kernels are held against: how fast this machine moves the bytes that an op must move.

Covers: streams through memory, reading or rewriting; the very same rows and states as a sparse step moves, without the
arithmetic; the bytes that columns take, which are those of whole cache lines; the product that bounds the weight
gradient.
Does not cover: how many bytes the other ops need (``kernels``, ``layers``).

On a CPU with one thread there are several ways to do either, and which is the fastest depends on the machine: with and
without software prefetching, at several distances, as two streams or four, and torch's own op. All are timed before an
op is measured, and the fastest is its limit: one chosen, so that each repetition pairs one measurement of it with one
of ours. The loops of ``_native`` have one thread; with more, the limit is torch's op alone, and so it is on a GPU.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from leaml_plugin.benchmark.layers import Layers
from leaml_plugin.benchmark.timing import Contender, Timer, compare

DISTANCES = (0, 1024, 2048, 4096)  # bytes of state that the prefetching of scattered rows looks ahead


def fastest(name: str, candidates: Sequence[Contender], timer: Timer) -> tuple[Contender, str]:
    """The candidate with the lowest median of three runs, as a contender ``name``; and what the candidate is called."""
    best = candidates[0]
    if len(candidates) > 1:
        times = compare(candidates, timer, 3)
        best = min(candidates, key=lambda c: statistics.median(t[c.name] for t in times))
    return Contender(name, best.run), best.name


class Limit:
    """A buffer that is streamed through memory: the read-modify-write (or the read) that bounds an op.

    On a CPU the read is one of two halves side by side, as relevance reads weight and gradient.
    """

    def __init__(self, count: int, device: Any, read_only: bool, threads: int = 1):
        import torch

        # larger than the caches, whatever the op moves; the time is scaled to the op's bytes
        least = (2**30 if device.type == "cuda" else 48 * 2**20) // 4
        self.elements = max(count // (4 if read_only else 8), least) // 2 * 2
        self.buffer = torch.ones(self.elements, device=device)
        self.bytes = self.elements * (4 if read_only else 8)
        self.candidates = [Contender("torch", self.buffer.sum if read_only else lambda: self.buffer.add_(1.0))]
        if device.type == "cpu" and read_only:
            first, second = self.buffer.chunk(2)
            self.candidates.append(Contender("torch_dot", lambda: torch.dot(first, second)))
        if device.type == "cpu" and threads == 1:
            for streams in (2, 4) if read_only else (1,):
                self.candidates += [self.loop(streams, prefetch) for prefetch in (False, True)]

    def loop(self, streams: int, prefetch: bool) -> Contender:
        """The compiled loop over the buffer: rewriting it as one stream, or reading it as several."""
        from leaml_plugin import _native

        start, size = self.buffer.data_ptr(), self.elements * 4

        def read() -> None:
            _native.stream_read(start, start + size // 2, size // 2, prefetch, streams)

        def rewrite() -> None:
            _native.stream_rewrite(start, size, prefetch)

        name = "prefetch" if prefetch else "plain"
        return Contender(f"{name}_{streams}" if streams > 2 else name, rewrite if streams == 1 else read)


def same_bytes(layers: Layers) -> list[Contender]:
    """The traffic of a sparse step over the selected rows and nothing else, by prefetching distance: the limit that
    scattered rows set to one thread."""
    from leaml_plugin import _native

    traffic = _native.RowTraffic()
    for weight, rows, grad, exp_avg, exp_avg_sq, _ in zip(*layers.step_lists):
        size = weight.shape[1] * weight.element_size()
        state = exp_avg.shape[1] * exp_avg.element_size()
        for number, row in enumerate(rows.tolist()):
            traffic.add(
                weight.data_ptr() + row * size, grad.data_ptr() + row * size, exp_avg.data_ptr() + number * state,
                exp_avg_sq.data_ptr() + number * state, size, state,
            )  # fmt: skip
    return [Contender(f"prefetch_{d}", lambda d=d: traffic.move(d)) for d in DISTANCES]


def touched_lines(matrix: Any, columns: Any, line: int) -> int:
    """How many pieces of ``line`` bytes hold the given columns, counted in each row of a ``[rows, columns]`` matrix."""
    import torch

    size = matrix.element_size()
    starts = matrix.data_ptr() % line + torch.arange(matrix.shape[0]) * matrix.stride(0) * size
    # rows that begin at the same place within a line touch as many
    places, rows = (starts % line).unique(return_counts=True)
    offsets = columns.cpu() * size
    return sum(
        ((place + offsets) // line).unique().numel() * count for place, count in zip(places.tolist(), rows.tolist())
    )


def line_of(layers: Layers) -> int:
    """Bytes that move together: a cache line, or a sector of a GPU's."""
    return 32 if layers.device.type == "cuda" else 64


def column_bytes(layers: Layers) -> int:
    """What a step over columns must move: of each row of memory every line that holds a selected weight, both ways, and
    as much of the gradient, which is only read; the fp32 moments, which are compact, both ways."""
    line, total = line_of(layers), 16 * layers.selected
    for weight, grad, columns in zip(layers.weights, layers.grads, layers.rows):
        total += line * (2 * touched_lines(weight.t(), columns, line) + touched_lines(grad.t(), columns, line))
    return total


def feed_forward_bytes(layers: Layers) -> int:
    """What the fusion over feed-forward neurons must move: weights and gradients read once; the selected weights
    written, in down as whole lines; the fp32 moments both ways."""
    line, size = line_of(layers), layers.weights[0].element_size()
    total = 2 * layers.parameters * size + 16 * layers.selected
    for weight, neurons in zip(layers.weights, layers.rows):
        if weight.stride(0) == 1:
            total += line * touched_lines(weight.t(), neurons, line)
        else:
            total += neurons.numel() * weight.shape[1] * size
    return total


def same_product(x: Any, grad: Any, rows: Any) -> list[Contender]:
    """The product of a selective weight gradient with its operands laid out beforehand, in either order."""
    gathered = grad.index_select(1, rows).contiguous()
    turned = gathered.t().contiguous()
    return [Contender("contiguous", lambda: turned @ x), Contender("transposed", lambda: gathered.t() @ x)]
