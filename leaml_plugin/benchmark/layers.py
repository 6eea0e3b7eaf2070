"""What the kernels are measured on: weights, gradients, selected rows and optimizer states at Qwen2.5-VL's shapes.

Covers: the shapes of a model's Linears, random tensors of them, the bytes that a step must move.
Does not cover: what is done with them (``kernels``, ``peers``).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

LR = 1e-4
STATES = ("fp32", "8bit", "master")  # of the optimizer: fp32; 8-bit in blocks; fp32 with fp32 masters of half weights
# (hidden, feed-forward, key-value width, layers of the language model)
MODELS = {
    "qwen2.5-vl-3b": (2048, 11008, 256, 36),
    "qwen2.5-vl-7b": (3584, 18944, 512, 28),
    "tiny": (256, 688, 64, 2),
}


def layer_shapes(model: str) -> list[tuple[int, int]]:
    """``[out, in]`` of one decoder layer's Linears: q, k, v, o, gate, up, down."""
    hidden, inner, kv, _ = MODELS[model]
    return [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden), *[(inner, hidden)] * 2, (hidden, inner)]


def random_rows(neurons: int, density: float, generator: Any, device: Any) -> Any:
    """A random selection: int64, ascending."""
    import torch

    from leaml_plugin import ops

    chosen = torch.randperm(neurons, generator=generator)[: ops.selected_count(density, neurons)]
    return chosen.sort().values.to(device)


class Layers:
    """Weights, gradients, rows and state of some layers in one dtype; ``dim`` is 1 where columns are trained."""

    dim = 0

    def __init__(self, model: str, dtype: Any, device: Any, layers: int):
        import torch

        self.device, self.dtype, self.layers = device, dtype, layers
        shapes = layer_shapes(model) * layers
        generator = torch.Generator(device).manual_seed(0)

        def normal(scale: float) -> list[Any]:
            return [(torch.randn(s, device=device, generator=generator) * scale).to(dtype) for s in shapes]

        self.weights, self.grads = normal(0.02), normal(1e-3)
        self.out = self.zeros(lambda w: (w.shape[0],))
        self.slots = list(range(len(shapes)))  # which `out` a weight feeds
        self.parameters = sum(w.numel() for w in self.weights)

    def zeros(self, shape: Callable[[Any], tuple[int, ...]]) -> list[Any]:
        """An fp32 tensor a weight."""
        import torch

        return [torch.zeros(shape(w), device=self.device) for w in self.weights]

    def select(self, density: float) -> None:
        """Rows of a random selection."""
        import torch

        generator = torch.Generator().manual_seed(1)
        self.train([random_rows(w.shape[0], density, generator, self.device) for w in self.weights])

    def train(self, rows: list[Any]) -> None:
        """Fresh state for these rows of each weight."""
        self.rows = rows
        self.keep("fp32")
        self.selected = sum(m.numel() for m in self.exp_avg)

    def turned(self, density: float) -> Layers:
        """The same weights and gradients by their columns, a random selection of which is trained."""
        result = copy.copy(self)
        result.dim = 1
        result.weights, result.grads = [w.t() for w in self.weights], [g.t() for g in self.grads]
        result.select(density)
        return result

    def feed_forward(self, density: float) -> Layers:
        """The feed-forward weights alone, by their neurons: gate, up and down's columns of each layer, one random
        selection and one ``out`` for the three."""
        import torch

        result, count = copy.copy(self), len(self.weights) // self.layers
        of_layer = [slice(i * count + count - 3, (i + 1) * count) for i in range(self.layers)]
        for name in ("weights", "grads"):
            parts = [getattr(self, name)[some] for some in of_layer]
            setattr(result, name, [part for gate, up, down in parts for part in (gate, up, down.t())])
        result.parameters = sum(w.numel() for w in result.weights)
        result.slots = [i for i in range(self.layers) for _ in range(3)]
        result.out = result.zeros(lambda w: (w.shape[0],))[::3]
        generator = torch.Generator().manual_seed(1)
        neurons = [random_rows(o.shape[0], density, generator, self.device) for o in result.out]
        result.train([neurons[slot] for slot in result.slots])
        return result

    def keep(self, kind: str) -> None:
        """Fresh optimizer state of a kind of ``STATES``."""
        from leaml_plugin import ops

        wanted = {"eight_bit": kind == "8bit", "master": kind == "master"}
        states = [ops.new_state(w, r, **wanted) for w, r in zip(self.weights, self.rows)]
        self.exp_avg, self.exp_avg_sq, self.steps = ([s[k] for s in states] for k in ("exp_avg", "exp_avg_sq", "step"))
        self.options: dict[str, Any] = {"lr": LR}
        if kind == "8bit":
            self.options["scales"] = tuple([s[k] for s in states] for k in ("exp_avg_scale", "exp_avg_sq_scale"))
        if kind == "master":
            self.options["masters"] = [s["master"] for s in states]

    def step_bytes(self, kind: str) -> int:
        """What a step must move for the selected weights: the gradient read; weight, moments and masters both ways (a
        weight that has a master is only written)."""
        size, scales = self.weights[0].element_size(), 4 / 256
        state = {"fp32": 16, "8bit": 2 * 2 * (1 + scales), "master": 24}[kind]
        return round(self.selected * (size + (1 if kind == "master" else 2) * size + state))

    @property
    def step_lists(self) -> tuple[list[Any], ...]:
        return self.weights, self.rows, self.grads, self.exp_avg, self.exp_avg_sq, self.steps
