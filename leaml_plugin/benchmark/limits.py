"""The physical limits that the kernels are held against: how fast this machine moves the bytes that an op must move.

Covers: a stream through memory; the very same rows and states as a sparse step, without arithmetic.
Does not cover: how many bytes an op needs (``kernels``, ``layers``).
"""

from __future__ import annotations

from typing import Any

from leaml_plugin.benchmark.layers import Layers
from leaml_plugin.benchmark.timing import Contender


class Limit:
    """A buffer that is streamed through memory: the read-modify-write (or the read) that bounds an op."""

    def __init__(self, count: int, device: Any, read_only: bool):
        import torch

        # larger than the caches, whatever the op moves; the time is scaled to the op's bytes
        least = (2**30 if device.type == "cuda" else 48 * 2**20) // 4
        self.elements = max(count // (4 if read_only else 8), least)
        self.buffer = torch.ones(self.elements, device=device)
        self.bytes = self.elements * (4 if read_only else 8)
        self.contender = Contender("limit", self.buffer.sum if read_only else lambda: self.buffer.add_(1.0))


def same_bytes(layers: Layers) -> Contender:
    """The traffic of a sparse step over the selected rows and nothing else: the limit that scattered rows set."""
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
    return Contender("same_bytes", traffic.move)
