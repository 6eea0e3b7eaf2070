"""Prompts that a processor has met before, about pictures of sizes that it has met before, without its overhead.

A processor's call takes about a millisecond beside its work. But the tokens of a prompt depend on its text and on the
sizes of its pictures alone, and pictures of equal sizes can go to the image processor together. Whether a processor
keeps to that is not assumed: at the second occurrence of a tuple of sizes its pictures are processed alone and in
pairs, beside the processor's own output, and only where every tensor is equal to the last bit is any of it used.

Covers: remembering tokens by text and sizes, and processing pictures of equal sizes in one call.
Does not cover: opening pictures, and what a batch of prompts looks like (``leaml_plugin.data.collate``).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

Sizes = tuple[tuple[int, int], ...]
"""Width and height of each picture of a prompt."""

_TEXTS, _SIZES = 512, 4096  # prompts and tuples of sizes that are remembered
_ONCE = "met once"


def sizes_of(pictures: Sequence[Image.Image]) -> Sizes:
    return tuple(picture.size for picture in pictures)


class Repeats:
    """What one processor makes of what it has met before.

    Args:
        image_processor: the processor's own.
    """

    def __init__(self, image_processor: Any):
        self._process = image_processor
        self._sequences: OrderedDict[tuple[str, Sizes], dict[str, Tensor]] = OrderedDict()
        # the media keys of prompts whose pictures have these sizes; None: the processor is to do it
        self._keys: OrderedDict[Sizes, tuple[str, ...] | str | None] = OrderedDict()

    def sequence(self, text: str, sizes: Sizes) -> dict[str, Tensor] | None:
        """The tokens of a prompt as the processor made them, or ``None`` where it is to be asked."""
        if not isinstance(self._keys.get(sizes), tuple):
            return None
        return self._sequences.get((text, sizes))

    def learn(
        self, text: str, pictures: Sequence[Image.Image], sequence: dict[str, Tensor], media: Mapping[str, Tensor]
    ) -> None:
        """Take note of what the processor made of ``text`` and ``pictures``."""
        sizes = sizes_of(pictures)
        _keep(self._sequences, (text, sizes), sequence, _TEXTS)
        if not pictures:
            self._keys[sizes] = None if media else ()
        elif sizes not in self._keys:
            _keep(self._keys, sizes, _ONCE, _SIZES)
        elif self._keys[sizes] == _ONCE:
            self._keys[sizes] = tuple(media) if self._divides(pictures, media) else None

    def _divides(self, pictures: Sequence[Image.Image], media: Mapping[str, Tensor]) -> bool:
        """Whether the image processor alone makes ``media``, and of two equal prompts twice the same."""
        [alone], pair = self.together([pictures]), self.together([pictures, pictures])
        if alone is None or pair is None or not all(_equal(alone.get(key), media[key]) for key in media):
            return False
        return all(part.keys() == alone.keys() and all(_equal(part[k], alone[k]) for k in alone) for part in pair)

    def together(self, pictures: Sequence[Sequence[Image.Image]]) -> list[Any] | None:
        """The image processor's output for the pictures of each prompt, which have equal sizes, from one call.

        ``None`` where it cannot be divided into equal parts.
        """
        try:
            result = self._process([list(some) for some in pictures], return_tensors="pt")
        except (ValueError, TypeError, RuntimeError):  # it takes no lists, or refuses a picture, which is told later
            return None
        parts: list[dict[str, Any]] = [{} for _ in pictures]
        for key, value in result.items():
            rows, rest = divmod(len(value), len(pictures)) if isinstance(value, Tensor | list) else (0, 1)
            if rest:
                return None
            for n, part in enumerate(parts):
                part[key] = value[n * rows : (n + 1) * rows]
        return [type(result)(data=part) for part in parts]

    def media(self, sizes: Sizes, output: Mapping[str, Any]) -> dict[str, Tensor]:
        """Of the image processor's output what the model gets, for pictures of these sizes."""
        keys = self._keys[sizes]
        assert isinstance(keys, tuple)
        return {key: output[key] for key in keys}


def _keep(known: OrderedDict, key: Any, value: Any, most: int) -> None:
    known[key] = value
    if len(known) > most:
        known.popitem(last=False)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and a == b
