"""The stages' model and collator for the embedded worlds, batched: what makes a run of the study a matter of seconds.

Covers a subclass of the tiny Qwen2.5-VL whose ``forward`` and ``generate`` take packed batches, and the collator that
makes them. Questions about one picture share a row, and where a method leaves the vision side alone its features are
computed once per picture. The stages run on both unchanged; tests hold loss and text against ``transformers``' own.
Does not cover any other model, or pictures that are not in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, Qwen2_5_VLForConditionalGeneration
from transformers.modeling_outputs import CausalLMOutput

from leaml_plugin import models
from leaml_plugin.data.prompts import Prompts, Turn
from leaml_plugin.errors import LeamlError
from leaml_plugin.models import Loaded
from leaml_plugin.records import ImageRef
from leaml_plugin.worlds.packing import Batch, Encoder, encode, logits, pack, patches, prefix
from leaml_plugin.worlds.processor import ASSISTANT, END, IMAGE, PAD

ROW_QUESTIONS = 4  # more questions a row share more, but the longest row sets the length of all


class PackedModel(Qwen2_5_VLForConditionalGeneration):
    """The tiny Qwen2.5-VL over packed batches. ``live_vision`` says that the vision side runs in every step."""

    live_vision = False

    def forward(self, labels: Tensor, **batch: Any) -> CausalLMOutput:  # type: ignore[override]
        """The mean cross-entropy over ``labels`` (int64 ``[targets]``), and their logits ``[targets, vocabulary]``."""
        features, pixels = batch.pop("features", None), batch.pop("pixels", None)
        packed = Batch(pixels=pixels, targets=labels, block=None, blocks=0, rows_of=[], **batch)  # type: ignore[arg-type]
        scores, _ = logits(self, packed, features)
        return CausalLMOutput(loss=F.cross_entropy(scores.float(), labels), logits=scores)

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        input_ids: Tensor,
        positions: Tensor,
        attention_mask: Tensor,
        generation_config: Any,
        features: Tensor | None = None,
        pixels: Tensor | None = None,
        logits_processor: Sequence[Any] = (),
    ) -> Tensor:
        """Greedy continuation of left-padded prompts, ``[rows, length + new]``, as ``transformers``' own.

        ``positions`` is ``[3, rows, length]``; ``logits_processor`` sees ids and scores in every step.
        """
        rows, length = input_ids.shape
        if features is None:
            features = encode(self.model.visual, pixels)
        embeds = self.get_input_embeddings()(input_ids)
        image = (input_ids == IMAGE)[:, :, None]
        embeds = embeds.masked_scatter(image, features.reshape(-1, features.shape[-1]).to(embeds.dtype))
        seen = attention_mask.bool()
        causal = torch.ones(length, length, dtype=torch.bool, device=seen.device).tril()
        # padding sees itself, so that no row of the softmax is empty
        mask = (causal & seen[:, None, :]) | torch.eye(length, dtype=torch.bool, device=seen.device)
        cache = DynamicCache()
        stop = torch.as_tensor(generation_config.eos_token_id, device=seen.device)
        done = torch.zeros(rows, dtype=torch.bool, device=seen.device)
        ids, at, mask = input_ids, positions, mask[:, None]
        for _ in range(generation_config.max_new_tokens):
            hidden = self.model.language_model(
                inputs_embeds=embeds, position_ids=at, attention_mask=mask, past_key_values=cache, use_cache=True
            ).last_hidden_state[:, -1]
            scores = self.lm_head(hidden).float()
            for processor in logits_processor:
                scores = processor(ids, scores)
            chosen = torch.where(done, generation_config.pad_token_id, scores.argmax(-1))
            ids = torch.cat([ids, chosen[:, None]], 1)
            done = done | torch.isin(chosen, stop)
            if bool(done.all()):
                break
            embeds = self.get_input_embeddings()(chosen[:, None])
            at = at[:, :, -1:] + 1
            seen = torch.cat([seen, seen.new_ones(rows, 1)], 1)
            mask = seen[:, None, None]
        return ids


class PictureStore:
    """The worlds' frames in memory, by the uri that records carry; vision features once they were computed."""

    def __init__(self) -> None:
        self._frames: list[np.ndarray] = []
        self._index: dict[str, int] = {}
        self._features: Tensor | None = None

    def add(self, name: str, frames: Sequence[np.ndarray]) -> tuple[ImageRef, ...]:
        """Keep the frames of one picture or clip; returns the references for its records."""
        refs = []
        for number, frame in enumerate(frames):
            uri = f"world:{name}/{number}"
            self._index[uri] = len(self._frames)
            self._frames.append(frame)
            refs.append(ImageRef(uri))
        return tuple(refs)

    @torch.no_grad()
    def compute_features(self, visual: torch.nn.Module, batch: int = 64) -> None:
        """Encode every frame that has no features yet with the base checkpoint's vision side."""
        known = 0 if self._features is None else len(self._features)
        new = [encode(visual, patches(self._frames[i : i + batch])) for i in range(known, len(self._frames), batch)]
        if new:
            self._features = torch.cat([*([] if self._features is None else [self._features]), *new])

    def features(self, refs: Sequence[ImageRef]) -> Tensor:
        """``[frames, 9, width]`` of the base checkpoint."""
        if self._features is None:
            raise LeamlError("the picture store has no features; call compute_features first.")
        return self._features[[self._index[ref.uri] for ref in refs]]

    def pixels(self, refs: Sequence[ImageRef]) -> Tensor:
        """Patches ``[frames, 36, 768]``."""
        return patches([self._frames[self._index[ref.uri]] for ref in refs])


@dataclass(frozen=True)
class PackedPrompt:
    """One encoded prompt, as ``inference.generate`` handles it."""

    turn: Turn
    ids: tuple[int, ...]
    positions: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def sequence(self) -> dict[str, object]:
        """What a batch holds beside the pictures."""
        return {"input_ids": self.ids, "positions": self.positions, "attention_mask": None}


class PackedCollator:
    """Turns to packed batches: the part of ``data.Collator`` that the stages and ``inference`` use."""

    end_of_turn, pad_id = END, PAD

    def __init__(self, loaded: Loaded, store: PictureStore, prompts: Prompts, encoder: Encoder):
        self.tokenizer = loaded.processor.tokenizer
        self.prompts = prompts
        self._model, self._store, self._encoder = loaded.model, store, encoder

    def __call__(self, turns: Sequence[Turn]) -> dict[str, Tensor]:
        """A training batch; the loss over it is the mean over all target tokens."""
        rows: dict[tuple, list[tuple[str, str]]] = {}
        for turn in turns:
            if not turn.target:
                raise LeamlError(f"{turn.where}: has no answer to learn; fill it in or remove the sample.")
            number = 0
            while len(rows.setdefault((turn.images, number), [])) == ROW_QUESTIONS:
                number += 1
            rows[turn.images, number].append((_plain(turn.prompt), _plain(turn.target)))
        pictures = self._pictures([images for images, _ in rows])
        packed = pack(
            self._encoder, [(images, qas) for (images, _), qas in rows.items()], pixels=next(iter(pictures.values()))
        )
        parts = {"ids": packed.ids, "positions": packed.positions, "mask": packed.mask, "at": packed.at}
        return {**parts, "labels": packed.targets, **pictures}

    def prompt_features(self, turn: Turn) -> PackedPrompt:
        head, at, here = prefix(len(turn.images))
        tail = [*self._encoder(_plain(turn.prompt)), END, ASSISTANT]
        text = np.arange(here, here + len(tail))
        return PackedPrompt(turn, (*head, *tail), np.concatenate([at, np.stack([text] * 3)], 1))

    def merge(self, features: Sequence[PackedPrompt], *, side: str) -> dict[str, Tensor]:
        """A left-padded batch for :meth:`PackedModel.generate`."""
        assert side == "left", side
        length = max(map(len, features))
        ids = np.full((len(features), length), PAD, np.int64)
        positions = np.zeros((3, len(features), length), np.int64)
        for row, prompt in enumerate(features):
            ids[row, length - len(prompt) :] = prompt.ids
            positions[:, row, length - len(prompt) :] = prompt.positions
        mask = np.arange(length) >= length - np.array([[len(prompt)] for prompt in features])
        return {
            "input_ids": torch.from_numpy(ids),
            "positions": torch.from_numpy(positions),
            "attention_mask": torch.from_numpy(mask),
            **self._pictures([prompt.turn.images for prompt in features]),
        }

    def prefix_ids(self, text: str) -> list[int]:
        return list(self._encoder(_plain(text.strip()))) if text.strip() else []

    def decode(self, ids: Tensor) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def _pictures(self, images: Sequence[tuple[ImageRef, ...]]) -> dict[str, Tensor]:
        refs = [ref for some in images for ref in some]
        if self._model.live_vision:
            return {"pixels": self._store.pixels(refs)}
        return {"features": self._store.features(refs)}


def _plain(text: str) -> str:
    """No text may spell one of the tokenizer's control tokens."""
    return text.replace("<|", "< |")


def load(path: str | Path) -> Loaded:
    """The checkpoint as a :class:`PackedModel` in float32 on the CPU, in evaluation mode."""
    loaded = models.load(path, dtype="float32", device="cpu")
    if type(loaded.model) is not Qwen2_5_VLForConditionalGeneration:
        raise LeamlError(f"{path}: is a {type(loaded.model).__name__}; a study needs the embedded tiny Qwen2.5-VL.")
    # transformers converts a checkpoint's names by the class's name, so a subclass cannot load it itself
    loaded.model.__class__ = PackedModel
    return loaded
