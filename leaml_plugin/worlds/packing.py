"""Many questions about one picture in one row: the picture is encoded once, each question sees it and itself only.

Covers building rows by hand (token ids, patches, 3-D rotary positions, block mask) and the batched forward of the tiny
Qwen2.5-VL over them. Every block gets the very positions and context that a single-turn chat through the processor
would have, so logits equal those of ``model(**processor(...))``; a test holds the two together.
Does not cover pictures of other sizes than the worlds' 96x96.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from leaml_plugin.worlds.processor import ASSISTANT, END, IMAGE, MERGE, PAD, PATCH, USER, VISION_END, VISION_START
from leaml_plugin.worlds.raster import SIZE

GRID = SIZE // PATCH  # patches a side
SIDE = GRID // MERGE  # image tokens a side
CELLS = SIDE * SIDE


def patches(frames: np.ndarray | list[np.ndarray]) -> torch.Tensor:
    """uint8 frames ``[n, 96, 96, 3]`` to ``float32 [n, 36, 768]``, as the image processor lays them out."""
    x = torch.from_numpy(np.stack(list(frames))).float().div_(127.5).sub_(1)
    x = x.permute(0, 3, 1, 2).reshape(-1, 3, SIDE, MERGE, PATCH, SIDE, MERGE, PATCH)
    return x.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(-1, GRID * GRID, 3 * PATCH * PATCH)


def encode(visual: Any, pixels: torch.Tensor) -> torch.Tensor:
    """The vision tower over ``[n, 36, 768]`` at once: ``[n, 9, width]``. Equals ``visual(...)`` picture by picture.

    transformers runs attention picture by picture in a Python loop; with equal sizes one batched call does.
    """
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

    n, length, _ = pixels.shape
    h = visual.patch_embed(pixels.reshape(n * length, -1)).view(n, length, -1)
    cos, sin = visual.rotary_pos_emb(h, _vision_positions(str(h.device)))
    for block in visual.blocks:
        attention = block.attn
        q, k, v = attention.qkv(block.norm1(h)).view(n, length, 3, attention.num_heads, -1).unbind(2)
        q, k = apply_rotary_pos_emb_vision(q, k, cos, sin)
        mixed = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        h = h + attention.proj(mixed.transpose(1, 2).reshape(n, length, -1))
        h = h + block.mlp(block.norm2(h))
    return visual.merger(h.reshape(n * length, -1)).view(n, CELLS, -1)


@lru_cache(maxsize=4)
def _vision_positions(device: str) -> torch.Tensor:
    from transformers.vision_utils import get_vision_position_ids

    return get_vision_position_ids(torch.tensor([[1, GRID, GRID]]), MERGE).to(device)


@lru_cache(maxsize=8)
def prefix(frames: int) -> tuple[list[int], np.ndarray, int]:
    """Token ids and rotary positions ``[3, n]`` of the turn's start with its pictures, and the next position."""
    ids, at, here = [USER], [np.zeros((3, 1), np.int64)], 1
    r, c = np.divmod(np.arange(CELLS), SIDE)
    for _ in range(frames):
        ids += [VISION_START, *[IMAGE] * CELLS, VISION_END]
        at.append(np.full((3, 1), here))
        at.append(np.stack([np.zeros(CELLS, np.int64), r, c]) + here + 1)
        at.append(np.full((3, 1), here + 1 + SIDE))
        here += SIDE + 2
    return ids, np.concatenate(at, 1), here


class Encoder:
    """Text to token ids, remembered: the worlds ask the same questions over and over."""

    def __init__(self, tokenizer: Any):
        self._backend = tokenizer.backend_tokenizer
        self._known: dict[str, tuple[int, ...]] = {}

    def __call__(self, text: str) -> tuple[int, ...]:
        ids = self._known.get(text)
        if ids is None:
            ids = tuple(self._backend.encode(text, add_special_tokens=False).ids)
            if len(self._known) < 200_000:
                self._known[text] = ids
        return ids


@dataclass
class Batch:
    """Rows of pictures with their questions.

    ``pixels [frames, 36, 768]``, ``ids [rows, length]``, ``positions [3, rows, length]``, ``mask [rows, 1, length,
    length]`` (true: may be seen); ``at``: flat indices into rows x length whose hidden state predicts ``targets``;
    ``block``: which question each target belongs to, counted over the batch; ``blocks``: their number;
    ``rows_of``: the row of each question.
    """

    pixels: torch.Tensor
    ids: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    at: torch.Tensor
    targets: torch.Tensor
    block: torch.Tensor
    blocks: int
    rows_of: list[int]

    def to(self, device: Any) -> Batch:
        values = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in self.__dict__.items()}
        return Batch(**values)


def pack(
    encoder: Encoder, rows: list[tuple[Any, list[tuple[str, str]]]], *, pixels: torch.Tensor | None = None
) -> Batch:
    """Rows of ``(frames, [(prompt, target), ...])``. ``pixels`` overrides the patches of all frames."""
    layouts, at, targets, block, rows_of = [], [], [], [], []
    for row, (frames, turns) in enumerate(rows):
        start_ids, start_positions, here = prefix(len(frames))
        ids, owner, text_positions = list(start_ids), [0] * len(start_ids), []
        for number, (prompt, target) in enumerate(turns, 1):
            head = [*encoder(prompt), END, ASSISTANT]
            tail = [*encoder(target), END]
            at += [(row, len(ids) + len(head) - 1 + i) for i in range(len(tail))]
            targets += tail
            block += [len(rows_of)] * len(tail)
            rows_of.append(row)
            text_positions += range(here, here + len(head) + len(tail))
            ids += head + tail
            owner += [number] * (len(head) + len(tail))
        layouts.append((ids, owner, start_positions, text_positions))
    length = max(len(ids) for ids, *_ in layouts)
    all_ids = np.full((len(rows), length), PAD, np.int64)
    owners = np.full((len(rows), length), -1, np.int64)
    positions = np.zeros((3, len(rows), length), np.int64)
    for row, (ids, owner, start_positions, text_positions) in enumerate(layouts):
        n = start_positions.shape[1]
        all_ids[row, : len(ids)] = ids
        owners[row, : len(ids)] = owner
        positions[:, row, :n] = start_positions
        positions[:, row, n : len(ids)] = np.array(text_positions, np.int64)
    owners_t = torch.from_numpy(owners)
    same = owners_t[:, :, None] == owners_t[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    mask = (same | (owners_t == 0)[:, None, :]) & causal
    if pixels is None:
        pixels = patches([frame for frames, _ in rows for frame in frames])
    return Batch(
        pixels, torch.from_numpy(all_ids), torch.from_numpy(positions), mask[:, None],
        torch.tensor([r * length + c for r, c in at]), torch.tensor(targets), torch.tensor(block), len(rows_of),
        rows_of,
    )  # fmt: skip


def logits(model: Any, batch: Batch, features: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """``[targets, vocabulary]`` logits, and the visual features ``[frames, 9, width]`` they were made from."""
    if features is None:
        features = encode(model.model.visual, batch.pixels)
    embeds = model.get_input_embeddings()(batch.ids)
    is_image = batch.ids == IMAGE
    embeds = embeds.masked_scatter(is_image[:, :, None], features.reshape(-1, features.shape[-1]).to(embeds.dtype))
    hidden = model.model.language_model(
        inputs_embeds=embeds, position_ids=batch.positions, attention_mask=batch.mask, use_cache=False
    ).last_hidden_state
    return model.lm_head(hidden.flatten(0, 1)[batch.at]), features


def token_losses(scores: torch.Tensor, batch: Batch) -> torch.Tensor:
    return F.cross_entropy(scores.float(), batch.targets, reduction="none")


def question_loss(scores: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Cross-entropy in which a target of n tokens weighs sqrt(n): long captions do not drown short answers."""
    losses = token_losses(scores, batch)
    length = torch.zeros(batch.blocks, device=losses.device).index_add_(0, batch.block, torch.ones_like(losses))
    weight = length[batch.block].rsqrt()
    return (losses * weight).sum() / weight.sum()


def right(scores: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Whether greedy decoding would write each target exactly, ``bool [blocks]``.

    Greedy decoding reproduces a text if and only if, fed with that text, every next token is the most likely one.
    """
    wrong = (scores.argmax(-1) != batch.targets).to(torch.int32)
    return torch.zeros(batch.blocks, dtype=torch.int32, device=scores.device).index_add_(0, batch.block, wrong) == 0
