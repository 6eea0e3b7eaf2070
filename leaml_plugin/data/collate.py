"""Turns become batches: prompt tokens as generation will see them, then the target, with the rest masked.

Covers: any ``AutoProcessor`` that has a chat template, several pictures a turn, text-only turns beside turns with
pictures, and pictures of different sizes in one batch, whether the processor returns flattened patches, stacks or
padded tiles. Each turn is encoded as if alone and the results are merged, so a turn's tensors never depend on its
neighbours.
Does not cover: several exchanges in one sample, audio. Models that look at pictures by cross-attention (Mllama) change
their logits in a batch of unequal numbers of pictures, with transformers' own collation as with this one.

Training and generation agree exactly. In both the prompt ids come from the processor with
``add_generation_prompt=True``; in training the target's ids follow, up to and including the template's end-of-turn
token (``eos`` where the template has none).
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jinja2 import TemplateError
from PIL import Image
from torch import Tensor

from leaml_plugin.data.images import open_image
from leaml_plugin.data.prompts import Prompts, Turn
from leaml_plugin.data.repeats import Repeats, Sizes, sizes_of
from leaml_plugin.errors import LeamlError
from leaml_plugin.records import ImageRef

IGNORE = -100
"""The label of a token that no loss is taken on (``torch.nn.functional.cross_entropy``'s default)."""

# Fast tokenizers may not encode in one thread while another decodes ("Already borrowed"), and pictures are prepared in
# a thread beside generation. One lock for all keeps collators picklable.
_TOKENIZING = threading.RLock()

_MEDIA_PREFIXES = ("pixel_", "image_", "video_", "aspect_", "spatial_")
_TOGETHER, _PIXELS = 16, 4_000_000  # turns whose pictures are processed in one call, and pixels of them, at most
_PROBE_PROMPT, _PROBE_TARGET = "leamlprobeprompt", "leamlprobetarget"


@dataclass(frozen=True)
class Features:
    """One encoded turn.

    ``sequence``: tensors with one entry a token, ``[length, ...]`` (``input_ids`` int64, ``attention_mask`` int64, what
    else the processor gives). ``media``: what the pictures became, in the processor's own shapes. The first
    ``prompt_length`` tokens are the prompt; the rest, if any, is the target.
    """

    turn: Turn
    sequence: dict[str, Tensor]
    media: dict[str, Tensor]
    prompt_length: int

    def __len__(self) -> int:
        return len(self.sequence["input_ids"])


class Collator:
    """Encodes and batches :class:`~leaml_plugin.data.prompts.Turn` for one processor.

    Args:
        processor: an ``AutoProcessor`` with tokenizer and chat template.
        prompts: where the system message comes from; the default prompts if ``None``.
        max_length: the most tokens a turn may have, pictures and target included. Nothing is ever truncated: a longer
            turn is an error that names it.
        cache_bytes: keep up to so many bytes of processed pictures in memory, the least recently used leave first.
            0 turns it off. A known picture is neither decoded nor resized again; a known prompt about it is not even
            tokenized again.

    Raises:
        LeamlError: the processor has no chat template, or its template drops pictures.
    """

    def __init__(
        self,
        processor: Any,
        prompts: Prompts | None = None,
        *,
        max_length: int | None = None,
        cache_bytes: int = 0,
    ):
        self.prompts = prompts if prompts is not None else Prompts.load()
        self.max_length = max_length
        self.tokenizer = getattr(processor, "tokenizer", None)
        if self.tokenizer is None or not hasattr(processor, "image_processor"):
            kind = type(processor).__name__
            raise LeamlError(f"{kind} has no tokenizer and image processor; use an image-text model.")
        if getattr(processor, "chat_template", None) is None:
            if getattr(self.tokenizer, "chat_template", None) is None:
                name = getattr(self.tokenizer, "name_or_path", "") or type(processor).__name__
                raise LeamlError(f"{name}: the processor has no chat template; use the instruction-tuned checkpoint.")
            processor = copy.copy(processor)
            processor.chat_template = self.tokenizer.chat_template
        self._repeats = Repeats(processor.image_processor)
        self._pictures = _PictureCache(processor.image_processor, cache_bytes) if cache_bytes > 0 else None
        if self._pictures is not None:
            processor = copy.copy(processor)
            processor.image_processor = self._pictures
        self.processor = processor
        pad = self.tokenizer.pad_token_id
        self.pad_id: int = pad if pad is not None else self.tokenizer.eos_token_id
        self._row_keys: frozenset[str] | None = None
        self._prefixes: dict[str, list[int]] = {}
        self._read_template()

    # -- public ----------------------------------------------------------------------------------------------------

    def __call__(self, turns: Sequence[Turn]) -> dict[str, Tensor]:
        """A training batch, padded on the right.

        Returns:
            ``input_ids``, ``attention_mask``, ``labels`` (int64 ``[batch, length]``; labels are :data:`IGNORE` outside
            the target) and the processor's picture tensors.

        Raises:
            LeamlError: a turn without target, or longer than ``max_length``; a picture that cannot be opened.
        """
        return self.merge([self.features(turn) for turn in turns], side="right", labels=True)

    def encode(self, turn: Turn) -> dict[str, Tensor]:
        """The training batch of this turn alone."""
        return self([turn])

    def prompt_batch(self, turns: Sequence[Turn]) -> dict[str, Tensor]:
        """A batch for ``generate``: prompts only, padded on the left, no labels. Targets are ignored."""
        return self.merge([self.prompt_features(turn) for turn in turns], side="left")

    def features(self, turn: Turn) -> Features:
        """Prompt and target of ``turn`` as tensors."""
        target = (turn.target or "").strip()
        if not target:
            raise LeamlError(f"{turn.where}: has no answer to learn; fill it in or remove the sample.")
        prompt = self._prompt(turn)
        ids = torch.tensor(self._target_ids(self._plain(target)) + self._suffix_ids, dtype=torch.int64)
        sequence = {key: torch.cat([value, _extension(key, value, ids)]) for key, value in prompt.sequence.items()}
        out = Features(turn, sequence, prompt.media, prompt.prompt_length)
        self._check_length(out)
        return out

    def prompt_features(self, turn: Turn) -> Features:
        """The prompt of ``turn`` alone, ending where the model's answer begins."""
        out = self._prompt(turn)
        self._check_length(out)
        return out

    def prompt_features_each(self, turns: Sequence[Turn]) -> list[Features | LeamlError]:
        """:meth:`prompt_features` of each turn, or its error, with less of the processor's overhead.

        Pictures of equal sizes go to the image processor together, where that makes no difference
        (:mod:`leaml_plugin.data.repeats`).
        """
        out: dict[int, Features | LeamlError] = {}
        waiting: list[_Waiting] = []
        pixels = 0
        for n, turn in enumerate(turns):
            try:
                same = next((one for one in waiting if one.turn.images == turn.images), None)
                found = self._prompt_or_pictures(turn, same)
                if found is None:
                    out.update(self._encode_together(waiting))
                    waiting, pixels = [], 0
                    found = self._prompt_or_pictures(turn)
            except LeamlError as error:
                out[n] = error
                continue
            if isinstance(found, Features):
                out[n] = found
                continue
            found.number = n
            waiting.append(found)
            pixels += sum(width * height for width, height in found.sizes) if same is None else 0
            if len(waiting) == _TOGETHER or pixels >= _PIXELS:
                out.update(self._encode_together(waiting))
                waiting, pixels = [], 0
        out.update(self._encode_together(waiting))
        return [self._fitting(out[n]) for n in range(len(turns))]

    def merge(self, features: Sequence[Features], *, side: str, labels: bool = False) -> dict[str, Tensor]:
        """Pad and join encoded turns; ``side`` is where the padding goes."""
        length = max(len(f) for f in features)
        batch: dict[str, Tensor] = {}
        for key in dict.fromkeys(key for f in features for key in f.sequence):
            fill = self.pad_id if key == "input_ids" else 0
            like = next(f.sequence[key] for f in features if key in f.sequence)
            rows = [f.sequence.get(key, like.new_zeros((len(f), *like.shape[1:]))) for f in features]
            trailing = [max(sizes) for sizes in zip(*(row.shape[1:] for row in rows))]
            batch[key] = torch.stack([_pad(row, [length, *trailing], fill, side) for row in rows])
        if labels:
            rows = []
            for f in features:
                row = f.sequence["input_ids"].clone()
                row[: f.prompt_length] = IGNORE
                rows.append(_pad(row, [length], IGNORE, side))
            batch["labels"] = torch.stack(rows)
        batch.update(self._merge_media(features))
        return batch

    def prefix_ids(self, text: str) -> list[int]:
        """The tokens of an answer's beginning, as they stand in an answer that goes on with another word."""
        text = text.strip()
        if not text:
            return []
        if text not in self._prefixes:
            self._prefixes[text] = self._target_ids(self._plain(text))
        return self._prefixes[text]

    def prompt_text(self, turn: Turn, prefix: str = "") -> str:
        """The prompt as the chat template writes it, with one placeholder a picture; what other engines are given.

        ``prefix`` is a beginning of the answer, appended as it would stand there.
        """
        text = self._render(self._plain(turn.prompt), len(turn.images), ask=True)
        prefix = self._plain(prefix.strip())
        return text + self._lead + prefix if prefix else text

    def decode(self, ids: Tensor | Sequence[int]) -> str:
        """Generated ids as text, without special tokens, reasoning (``<think>…</think>``) and outer white space."""
        with _TOKENIZING:
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text.rpartition("</think>")[2].strip()

    # -- the template ----------------------------------------------------------------------------------------------

    def _messages(self, prompt: str, images: int, target: str | None = None) -> list[dict[str, Any]]:
        messages = []
        if self.prompts.system:
            messages.append({"role": "system", "content": [{"type": "text", "text": self.prompts.system}]})
        content = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": prompt}]
        messages.append({"role": "user", "content": content})
        if target is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": target}]})
        return messages

    def _render(self, prompt: str, images: int, target: str | None = None, *, ask: bool) -> str:
        messages = self._messages(prompt, images, target)
        try:
            return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
        except TemplateError as error:
            raise LeamlError(
                f"the chat template refuses the messages ({error}); an empty system.txt may help."
            ) from error

    def _read_template(self) -> None:
        """Find out what stands between the generation prompt and an answer, and what ends an answer."""
        asked = self._render(_PROBE_PROMPT, 1, ask=True)
        plain = self._render(_PROBE_PROMPT, 1, ask=False)
        full = self._render(_PROBE_PROMPT, 1, _PROBE_TARGET, ask=False)
        if _PROBE_PROMPT not in asked or _PROBE_TARGET not in full:
            raise LeamlError("the chat template drops the text of a message; check the processor's chat_template.")
        mark = getattr(self.processor, "image_token", None)
        if mark is not None and mark not in asked:
            raise LeamlError("the chat template drops pictures; check the processor's chat_template.")
        before, _, after = full.rpartition(_PROBE_TARGET)
        # LLaVA-1.5 asks with "ASSISTANT:" and answers "ASSISTANT: polyp": the space belongs to the answer
        self._lead = before[len(asked) :] if before.startswith(asked) else ""
        self._anchor = asked[len(plain) :] if asked.startswith(plain) else ""

        special = set(self.tokenizer.all_special_ids)
        special.update(i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special)
        suffix = self._tokenize(after)
        stop = next((n for n, i in enumerate(suffix) if i in special), None)
        if stop is not None:
            self._suffix_ids = suffix[: stop + 1]
        elif self.tokenizer.eos_token_id is not None:
            # a template without end-of-turn token: training must still teach the model to stop
            self._suffix_ids = [self.tokenizer.eos_token_id]
        else:
            raise LeamlError("neither the chat template nor the tokenizer has an end-of-turn token; set eos_token.")

        one = self._process(asked, [Image.new("RGB", (64, 64))], "the probe picture")
        sequence, media = self._split(one)
        if not media:
            raise LeamlError("the chat template drops pictures; check the processor's chat_template.")
        # Control tokens that data may not forge: those of the template and of the expanded pictures
        ids = set(sequence["input_ids"].tolist()) | set(self._suffix_ids)
        known = {self.tokenizer.convert_ids_to_tokens(i) for i in ids & special}
        known.update(self.tokenizer.convert_ids_to_tokens(i) for i in self.tokenizer.all_special_ids if i in special)
        known.update(getattr(self.processor, f"{kind}_token", None) for kind in ("image", "video", "audio"))
        self._control = sorted((t for t in known if isinstance(t, str) and len(t) > 1), key=lambda t: (-len(t), t))

    @property
    def end_of_turn(self) -> int:
        """Id of the token that ends an answer."""
        return self._suffix_ids[-1]

    def _plain(self, text: str) -> str:
        """``text`` with control tokens made harmless by a space.

        A question that contains ``<image>`` or ``<|im_end|>`` must not call for a picture or end the turn; this holds
        for data files as for what a generator wrote.
        """
        for token in self._control:
            if token in text:
                text = text.replace(token, f"{token[0]} {token[1:]}")
        return text

    # -- tokens ----------------------------------------------------------------------------------------------------

    def _tokenize(self, text: str) -> list[int]:
        if not text:
            return []
        with _TOKENIZING:
            return list(self.tokenizer(text, add_special_tokens=False, truncation=False)["input_ids"])

    def _target_ids(self, target: str) -> list[int]:
        # SentencePiece tokenizers put a space before the first word of what they are given. With the end of the prompt
        # in front they don't, and the ids are those which the model would write itself.
        anchor, whole = self._tokenize(self._anchor), self._tokenize(self._anchor + self._lead + target)
        if anchor and whole[: len(anchor)] == anchor and len(whole) > len(anchor):
            return whole[len(anchor) :]
        return self._tokenize(self._lead + target)

    def _prompt(self, turn: Turn) -> Features:
        known = self._recall(turn)
        if known is not None:
            return known
        text = self._text(turn)
        with self._cache_locked():
            return self._encode(turn, text, self._open(turn))

    def _text(self, turn: Turn) -> str:
        return self._render(self._plain(turn.prompt), len(turn.images), ask=True)

    def _cache_locked(self) -> contextlib.AbstractContextManager[Any]:
        return _TOKENIZING if self._pictures is not None else contextlib.nullcontext()  # the cache is no two threads'

    def _recall(self, turn: Turn) -> Features | None:
        if self._pictures is None:
            return None
        with _TOKENIZING:
            return self._pictures.recall(turn)

    def _encode(self, turn: Turn, text: str, pictures: list[Image.Image]) -> Features:
        return self._remembered(turn, *self._split(self._process(text, pictures, turn.where)))

    def _remembered(self, turn: Turn, sequence: dict[str, Tensor], media: dict[str, Tensor]) -> Features:
        features = Features(turn, sequence, media, len(sequence["input_ids"]))
        if self._pictures is not None:
            self._pictures.remember(features)
        return features

    def _prompt_or_pictures(self, turn: Turn, same: _Waiting | None = None) -> Features | _Waiting | None:
        """The prompt of ``turn``, or its pictures where they are all that is missing.

        ``None`` where its pictures wait already (``same``) and the processor is to see them with another text.
        """
        known = self._recall(turn)
        if known is not None:
            return known
        text = self._text(turn)
        if same is not None:
            sequence = self._repeats.sequence(text, same.sizes)
            return None if sequence is None else replace(same, turn=turn, text=text, sequence=sequence)
        with self._cache_locked():
            cached = self._pictures.of(turn.images) if self._pictures is not None else None
            pictures = self._read(turn) if cached is None else []
            sizes = sizes_of(pictures) if cached is None else tuple(cached.sizes)
            sequence = self._repeats.sequence(text, sizes)
            if sequence is None and cached is not None:
                return self._encode(turn, text, self._open(turn))
            if sequence is None:
                if self._pictures is not None:
                    self._pictures.expect(turn.images)
                features = self._encode(turn, text, pictures)
                self._repeats.learn(text, pictures, features.sequence, features.media)
                return features
            if cached is None and pictures:
                return _Waiting(turn, text, pictures, sizes, sequence)
            media = self._repeats.media(sizes, cached.result) if cached is not None else {}
            return self._remembered(turn, sequence, media)

    def _encode_together(self, waiting: Sequence[_Waiting]) -> dict[int, Features | LeamlError]:
        groups: dict[Sizes, dict[tuple[ImageRef, ...], list[_Waiting]]] = {}
        for one in waiting:
            groups.setdefault(one.sizes, {}).setdefault(one.turn.images, []).append(one)
        out: dict[int, Features | LeamlError] = {}
        for group in groups.values():
            outputs = self._repeats.together([some[0].pictures for some in group.values()])
            for some, output in zip(group.values(), outputs or [None] * len(group)):
                for one in some:
                    try:
                        out[one.number] = self._with_pictures(one, output)
                    except LeamlError as error:
                        out[one.number] = error
        return out

    def _with_pictures(self, one: _Waiting, output: Any) -> Features:
        with self._cache_locked():
            if output is None:
                if self._pictures is not None:
                    self._pictures.expect(one.turn.images)
                return self._encode(one.turn, one.text, one.pictures)
            if self._pictures is not None:
                output = self._pictures.put(one.turn.images, one.sizes, output)
            return self._remembered(one.turn, one.sequence, self._repeats.media(one.sizes, output))

    def _open(self, turn: Turn) -> list[Image.Image]:
        """The pictures for the next call of the processor: the real ones, or blanks where the result is known."""
        blanks = None
        if self._pictures is not None:
            self._pictures.expect(turn.images)
            blanks = self._pictures.blanks(turn.images)
        return self._read(turn) if blanks is None else blanks

    def _read(self, turn: Turn) -> list[Image.Image]:
        try:
            return [open_image(ref) for ref in turn.images]
        except LeamlError as error:
            raise LeamlError(f"{turn.where}: {error}" if turn.source else str(error)) from error

    def _process(self, text: str, pictures: list[Image.Image], where: str) -> dict[str, Tensor]:
        # as apply_chat_template(tokenize=True) does: no second beginning-of-sequence token
        bos = self.tokenizer.bos_token
        kwargs: dict[str, Any] = {"add_special_tokens": False} if bos is not None and text.startswith(bos) else {}
        if pictures:
            kwargs["images"] = [pictures]
        try:
            with _TOKENIZING:
                return dict(self.processor(text=[text], return_tensors="pt", truncation=False, **kwargs))
        except ValueError as error:
            why = str(error).splitlines()[0]
            raise LeamlError(f"{where}: the model's processor refuses it ({why}); change or remove it.") from error

    @staticmethod
    def _split(data: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What has one entry a token, without the batch dimension, and what belongs to the pictures."""
        length = data["input_ids"].shape[1]
        sequence, media = {}, {}
        for key, value in data.items():
            if not isinstance(value, Tensor):
                continue
            if tuple(value.shape[:2]) == (1, length) and not key.startswith(_MEDIA_PREFIXES):
                sequence[key] = value[0]
            else:
                media[key] = value
        return sequence, media

    def _fitting(self, features: Features | LeamlError) -> Features | LeamlError:
        try:
            if isinstance(features, Features):
                self._check_length(features)
        except LeamlError as error:
            return error
        return features

    def _check_length(self, features: Features) -> None:
        if self.max_length is None or len(features) <= self.max_length:
            return
        image_id = getattr(self.processor, "image_token_id", None)
        pictures = int((features.sequence["input_ids"] == image_id).sum()) if image_id is not None else 0
        of_pictures = f" ({pictures} of them for {len(features.turn.images)} picture(s))" if pictures else ""
        raise LeamlError(
            f"{features.turn.where}: {len(features)} tokens{of_pictures} do not fit the limit of {self.max_length}; "
            "raise max_length, lower the picture size of the processor (max_pixels), or shorten the text."
        )

    # -- pictures --------------------------------------------------------------------------------------------------

    def _merge_media(self, features: Sequence[Features]) -> dict[str, Tensor]:
        batch = {}
        for key in dict.fromkeys(key for f in features for key in f.media):
            values = [f.media.get(key) for f in features]
            if any(v is None for v in values) and key in self._keys_by_row():
                like = next(v for v in values if v is not None)
                values = [v if v is not None else torch.zeros_like(like[:1]) for v in values]
            present = [v for v in values if v is not None]
            # zero padding is what the processors do themselves when they batch tiles or sizes
            trailing = [max(sizes) for sizes in zip(*(v.shape[1:] for v in present))]
            batch[key] = torch.cat([_pad(v, [v.shape[0], *trailing], 0, "right") for v in present])
        return batch

    def _keys_by_row(self) -> frozenset[str]:
        """Picture tensors with one row a sample (Idefics3, Mllama), not one a picture or patch.

        Their text-only samples need an empty row. Found out by trying: two pictures in a turn still make one row.
        """
        if self._row_keys is None:
            blank = Image.new("RGB", (64, 64))
            text = {n: self._render(_PROBE_PROMPT, n, ask=True) for n in (1, 2)}
            one, two = (self._split(self._process(text[n], [blank] * n, "the probe picture"))[1] for n in (1, 2))
            self._row_keys = frozenset(k for k in one if one[k].shape[0] == two[k].shape[0] == 1)
        return self._row_keys


@dataclass
class _Waiting:
    """A turn whose tokens are known and whose pictures are opened."""

    turn: Turn
    text: str
    pictures: list[Image.Image]
    sizes: Sizes
    sequence: dict[str, Tensor]
    number: int = -1


@dataclass
class _Cached:
    """What is known of one tuple of pictures: their sizes, what the image processor made, the prompts about them."""

    sizes: list[tuple[int, int]]
    result: Any
    nbytes: int
    prompts: dict[str, Features] = field(default_factory=dict)


class _PictureCache:
    """Stands in for the processor's image processor and remembers what it made of each tuple of pictures.

    A prompt that was seen with its pictures needs no processor at all. For a new prompt about known pictures the
    processor gets blank pictures of the original sizes, which it only counts and measures, and then the remembered
    tensors. Everything but the call is the wrapped image processor's.
    """

    def __init__(self, inner: Any, limit: int):
        self._inner, self._limit, self.nbytes = inner, limit, 0
        self._key: tuple[ImageRef, ...] | None = None
        self._entries: OrderedDict[tuple[ImageRef, ...], _Cached] = OrderedDict()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def expect(self, images: tuple[ImageRef, ...]) -> None:
        """The next call is for these pictures."""
        self._key = images or None

    def blanks(self, images: tuple[ImageRef, ...]) -> list[Image.Image] | None:
        """Pictures of the same sizes, where the result is known."""
        known = self._entries.get(images)
        return None if known is None else [Image.new("RGB", size) for size in known.sizes]

    def of(self, images: tuple[ImageRef, ...]) -> _Cached | None:
        """What is known of these pictures."""
        if images in self._entries:
            self._entries.move_to_end(images)
        return self._entries.get(images)

    def put(self, images: tuple[ImageRef, ...], sizes: Sizes, output: Any) -> Any:
        """Keep what the image processor made of these pictures among others; returns it."""
        known = self.of(images)
        if known is not None:
            return known.result
        # a part of a batch's tensor would keep all of it alive
        output = type(output)(data={k: v.clone() if isinstance(v, Tensor) else v for k, v in output.items()})
        self._store(images, list(sizes), output)
        return output

    def __call__(self, images: Any, *args: Any, **kwargs: Any) -> Any:
        key, self._key = self._key, None
        if key in self._entries:
            self._entries.move_to_end(key)
            return _shallow(self._entries[key].result)
        result = self._inner(images, *args, **kwargs)
        if key is not None:
            self._store(key, [p.size for p in _flat(images)], result)
        return result

    def _store(self, images: tuple[ImageRef, ...], sizes: list[tuple[int, int]], result: Any) -> None:
        nbytes = sum(v.nbytes for v in result.values() if isinstance(v, Tensor))
        if nbytes <= self._limit and images not in self._entries:
            self._entries[images] = _Cached(sizes, _shallow(result), nbytes)
            self._grow(nbytes)

    def recall(self, turn: Turn) -> Features | None:
        entry = self._entries.get(turn.images)
        known = entry.prompts.get(turn.prompt) if entry is not None else None
        if known is None:
            return None
        self._entries.move_to_end(turn.images)
        return replace(known, turn=turn)

    def remember(self, features: Features) -> None:
        entry = self._entries.get(features.turn.images)
        if entry is not None:
            # the picture tensors are those of the entry; only the tokens are new
            nbytes = sum(v.nbytes for v in features.sequence.values())
            entry.prompts[features.turn.prompt] = features
            entry.nbytes += nbytes
            self._grow(nbytes)

    def _grow(self, nbytes: int) -> None:
        self.nbytes += nbytes
        while self.nbytes > self._limit:
            self.nbytes -= self._entries.popitem(last=False)[1].nbytes


def _shallow(feature: Any) -> Any:
    """A copy that the processor may remove keys from."""
    return type(feature)(data=dict(feature))


def _flat(images: Any) -> list[Image.Image]:
    return [p for item in images for p in _flat(item)] if isinstance(images, list | tuple) else [images]


def _extension(key: str, prompt: Tensor, target: Tensor) -> Tensor:
    """The entries of ``key`` for the target's tokens, ``[len(target), ...]``."""
    if key == "input_ids":
        return target
    if key == "attention_mask":
        return prompt.new_ones((len(target), *prompt.shape[1:]))
    if key == "cross_attention_mask":
        # later tokens see the pictures that the prompt's last token sees
        return prompt[-1:].expand(len(target), *prompt.shape[1:])
    return prompt.new_zeros((len(target), *prompt.shape[1:]))  # token types: text


def _pad(value: Tensor, shape: Sequence[int], fill: int, side: str) -> Tensor:
    """``value`` grown to ``shape``; the first dimension is padded on ``side``, the others always on the right."""
    if list(value.shape) == list(shape):
        return value
    out = value.new_full(tuple(shape), fill)
    start = shape[0] - value.shape[0] if side == "left" else 0
    out[(slice(start, start + value.shape[0]), *(slice(0, n) for n in value.shape[1:]))] = value
    return out
