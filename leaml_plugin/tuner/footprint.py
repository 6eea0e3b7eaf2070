"""How many bytes each way of tuning needs: what is stored, what training keeps beside the frozen base.

Covers: counting, exact to the byte (tests hold it to real adapters and optimizers), for full fine-tuning, LoRA and
SHiRA of equal trainable size, the LEAML adapter and LEAML in place.
Does not cover: activations, which depend on the batch, and the temporaries of each method's forward pass (SHiRA
builds a dense copy of each weight in it, the others do not).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from leaml_plugin.ops import BLOCK, selected_count
from leaml_plugin.selection import linear_shape

FP32, INDEX, POSITION = 4, 8, 4  # bytes of a value, of a neuron's index (int64), of one of SHiRA's coordinates (int32)


@dataclass(frozen=True)
class Footprint:
    """Bytes of one method: the file, and what training adds to the base model's own memory."""

    method: str
    trainable: int  # parameters
    file: int  # what is saved: the adapter's tensors, or the model
    weights: int  # trained copies beside the base: masters or adapter weights, with their indices
    gradients: int
    optimizer: int

    @property
    def training(self) -> int:
        """Bytes that training adds to the frozen base."""
        return self.weights + self.gradients + self.optimizer


def footprint(
    modules: Mapping[str, nn.Module | tuple[int, int]], density: float, *, base_bytes: int = 2
) -> list[Footprint]:
    """One :class:`Footprint` a method for these Linears (or their ``(out, in)``), neurons selected per layer.

    LoRA gets the rank, and SHiRA the ``r``, that comes nearest to LEAML's number of trainable parameters. Trained
    values and moments are fp32, except that full fine-tuning of a 2-byte base has gradients of its dtype and fp32
    masters. ``base_bytes``: bytes of a base weight.
    """
    shapes = [m if isinstance(m, tuple) else linear_shape(m) for m in modules.values()]
    counts = [selected_count(density, out) for out, _ in shapes]
    full = sum(out * width for out, width in shapes)
    ours = sum(k * width for k, (_, width) in zip(counts, shapes))
    neurons = sum(counts)
    blocks = sum(k * -(-width // BLOCK) for k, (_, width) in zip(counts, shapes))
    edge = sum(out + width for out, width in shapes)
    rank = max(1, round(ours / edge))
    lora = rank * edge
    masters = FP32 if base_bytes < FP32 else 0
    steps = FP32 * neurons  # one counter a neuron; torch's optimizers keep one fp32 counter a tensor
    tensors = FP32 * len(shapes)
    indexed = FP32 * ours + INDEX * neurons
    compact = 2 * FP32 * ours + steps
    coded = 2 * ours + 2 * FP32 * blocks + steps
    return [
        Footprint("full fine-tuning", full, base_bytes * full, masters * full, base_bytes * full, 8 * full + tensors),
        Footprint(f"LoRA, rank {rank}", lora, FP32 * lora, FP32 * lora, FP32 * lora, 8 * lora + 2 * tensors),
        Footprint(
            f"SHiRA, r = {rank}",
            lora,
            (FP32 + 2 * POSITION) * lora,
            (FP32 + 2 * POSITION) * lora,
            FP32 * lora,
            8 * lora + tensors,
        ),
        Footprint("LEAML adapter", ours, indexed, indexed, FP32 * ours, compact),
        Footprint("LEAML in place", ours, indexed, indexed, FP32 * ours, compact),
        Footprint("LEAML in place, 8-bit states", ours, indexed, indexed, FP32 * ours, coded),
    ]


def table(rows: Iterable[Footprint]) -> str:
    """The footprints as a Markdown table, in units of 10^6 bytes."""
    head = "| method | trainable | file | trained weights | gradients | optimizer state | training adds |"
    lines = [head, "|---|--:|--:|--:|--:|--:|--:|"]
    for row in rows:
        sizes = (row.file, row.weights, row.gradients, row.optimizer, row.training)
        lines.append(
            f"| {row.method} | {row.trainable / 1e6:,.1f} M | " + " | ".join(f"{b / 1e6:,.0f}" for b in sizes) + " |"
        )
    return "\n".join(lines)
