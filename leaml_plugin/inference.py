"""The one batched ``generate`` and the scoring of given answers, shared by stages, lmms-eval and users.

Covers: left-padded batches in windows sorted by length, results in the order of the input and as they are ready,
several samples a turn that share one reading of picture and prompt, greedy or seeded sampling, answers whose beginning
is given, the mean log-probability of what was written.
Does not cover: beam search, generation on a server.

Sampling does not use torch's random state. A token is drawn by the Gumbel-max rule, with noise that is a hash of
(seed, turn id, sample, step, token): the same turn gets the same text whatever its neighbours, the batch size or the
shard it lies in, and on any device, as far as the logits agree. They agree up to rounding: different batch shapes may
sum in another order, which can turn a tie between tokens, at about one token in a million.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from leaml_plugin.data.collate import IGNORE, Collator, Features
from leaml_plugin.data.prompts import Turn
from leaml_plugin.errors import LeamlError
from leaml_plugin.progress import Progress

if TYPE_CHECKING:
    from leaml_plugin.models import Loaded

# Batches that are sorted by length together. More save little padding and hold more pictures in memory.
_WINDOW = 4
_LIKELY = 256  # tokens among which a nucleus is looked for first


@dataclass(frozen=True)
class Sampling:
    """How to draw: ``temperature`` > 0, nucleus ``top_p`` in (0, 1], and the seed of all noise."""

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise LeamlError(f"sampling: temperature is {self.temperature}; it must be positive (or don't sample).")
        if not 0 < self.top_p <= 1:
            raise LeamlError(f"sampling: top_p is {self.top_p}; it must lie in (0, 1].")


@dataclass(frozen=True)
class Generated:
    """What the model wrote for one turn.

    ``sample`` counts the draws of a turn from 0. ``tokens`` counts the written ids, the end of turn included;
    ``finished`` tells whether the end was reached. ``logprob`` is the mean log-probability (nats per token) of these
    ids under the model itself, before temperature and nucleus; 0.0 unless asked for. A forced beginning
    (``Turn.prefixes``) is part of ``text`` and ``tokens``, but not of ``logprob``.
    """

    id: str
    sample: int
    text: str
    logprob: float = 0.0
    tokens: int = 0
    finished: bool = True


def generate(
    loaded: Loaded,
    turns: Iterable[Turn],
    *,
    collator: Collator | None = None,
    batch_size: int = 8,
    max_new_tokens: int = 64,
    sampling: Sampling | None = None,
    num_samples: int = 1,
    return_logprobs: bool = False,
    progress: bool = True,
    label: str = "generating",
    on_error: Callable[[Turn, LeamlError], None] | None = None,
) -> Iterator[Generated]:
    """Answer ``turns``; yields in their order, the samples of a turn one after the other.

    Args:
        turns: any iterable; only two windows of a few batches are held at a time, one of them in preparation.
        collator: of this model's processor; one with the default prompts if ``None``.
        batch_size: the most rows of a forward pass, halved where the accelerator's memory runs out; a turn with
            ``num_samples`` takes that many rows. Picture and prompt are processed and read by the model once for all
            samples of a turn (in one batch).
        max_new_tokens: the most tokens to write, a forced beginning included.
        sampling: ``None`` is greedy.
        num_samples: texts a turn; more than one needs ``sampling``.
        on_error: called with a turn that cannot be encoded (its picture is damaged, the processor refuses it, it is too
            long) and why, in their order; such a turn is left out of the results. ``None`` raises.

    Raises:
        LeamlError: impossible settings; a turn that does not fit the collator's ``max_length``; a bad picture.
    """
    for name, value in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens), ("num_samples", num_samples)):
        if value < 1:
            raise LeamlError(f"generation: {name} is {value}; it must be at least 1.")
    if num_samples > 1 and sampling is None:
        raise LeamlError("generation: several samples of greedy decoding are all the same; set a temperature above 0.")
    return _generate(
        loaded,
        turns,
        collator if collator is not None else Collator(loaded.processor),
        batch_size,
        max_new_tokens,
        sampling,
        num_samples,
        return_logprobs,
        Progress(label, len(turns) * num_samples if hasattr(turns, "__len__") else None, unit="text")
        if progress
        else None,
        on_error,
    )


def _generate(
    loaded: Loaded,
    turns: Iterable[Turn],
    collator: Collator,
    batch_size: int,
    max_new_tokens: int,
    sampling: Sampling | None,
    num_samples: int,
    return_logprobs: bool,
    bar: Progress | None,
    on_error: Callable[[Turn, LeamlError], None] | None,
) -> Iterator[Generated]:
    stop = _stop_ids(loaded, collator)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,  # the sampler below leaves one token to choose from
        num_beams=1,
        eos_token_id=stop,
        pad_token_id=collator.pad_id,
        use_cache=True,
        # what is not set comes from the checkpoint, and some ship penalties; the last three only avert a warning
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        encoder_no_repeat_ngram_size=0,
        min_new_tokens=0,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
    )
    per_window = max(1, _WINDOW * batch_size // num_samples)
    # whole turns in a batch where they fit: what two batches share is read twice
    size = batch_size - batch_size % num_samples if num_samples <= batch_size else batch_size
    for window in _ahead(turns, _prompts_of(collator), per_window, on_error):
        # rows of (position in the window, sample, features); the samples of a turn share its tensors
        rows = [(position, sample, f) for position, f in enumerate(window) for sample in range(num_samples)]
        rows.sort(key=lambda row: -len(row[2]))  # stable, and the longest first: memory runs out early or never
        done: dict[tuple[int, int], Generated] = {}
        start = 0
        while start < len(rows):
            batch = rows[start : start + size]
            try:
                with _inferring(loaded.model):
                    some = [(features, sample) for _, sample, features in batch]
                    texts = _run(loaded, collator, config, some, sampling, return_logprobs, stop)
            except torch.OutOfMemoryError as error:
                if len(batch) == 1:
                    raise LeamlError(
                        f"{batch[0][2].turn.where}: a turn of {len(batch[0][2])} tokens does not fit the memory; "
                        "lower the processor's picture size (max_pixels) or load the model as bfloat16."
                    ) from error
                texts = None
            if texts is None:  # outside the handler, whose traceback would keep the failed batch alive
                torch.accelerator.empty_cache()
                size = (len(batch) + 1) // 2
                continue
            done.update(((row[0], row[1]), text) for row, text in zip(batch, texts))
            start += len(batch)
            if bar:
                bar.update(len(batch))
        yield from (done[key] for key in sorted(done))
    if bar:
        bar.close()


@contextlib.contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode inside, and the former mode of the model afterwards."""
    was_training = model.training
    if was_training:
        model.eval()
    try:
        yield
    finally:
        if was_training:
            model.train()


@contextlib.contextmanager
def _inferring(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation and inference mode inside; what the model keeps of it can be trained with afterwards."""
    with _evaluating(model):
        try:
            with torch.inference_mode():
                yield
        finally:
            for module in model.modules():
                for kept in (vars(module), module._buffers):
                    for name in [name for name, value in kept.items() if isinstance(value, Tensor | list | tuple)]:
                        kept[name] = _ordinary(kept[name])


def _ordinary(value: Any) -> Any:
    """``value`` without tensors of inference mode, which autograd refuses; itself where it has none."""
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    if type(value) in (list, tuple):
        items = [_ordinary(item) for item in value]
        return value if all(a is b for a, b in zip(items, value)) else type(value)(items)
    return value


def _prompts_of(collator: Collator) -> Callable[[Sequence[Turn]], Iterable[Features | LeamlError]]:
    # a collator of somebody's own may know single turns only
    return getattr(collator, "prompt_features_each", None) or _each(collator.prompt_features)


def _each(encode: Callable[[Turn], Features]) -> Callable[[Sequence[Turn]], Iterable[Features | LeamlError]]:
    def encoded(turns: Sequence[Turn]) -> Iterator[Features | LeamlError]:
        for turn in turns:
            try:
                yield encode(turn)
            except LeamlError as error:
                yield error

    return encoded


def _ahead(
    turns: Iterable[Turn],
    encode: Callable[[Sequence[Turn]], Iterable[Features | LeamlError]],
    size: int,
    on_error: Callable[[Turn, LeamlError], None] | None = None,
) -> Iterator[list[Features]]:
    """Windows of encoded turns; the next one is made by a thread while the model works on this one."""
    stream = iter(turns)

    def window() -> tuple[int, list[Features], list[tuple[Turn, LeamlError]]]:
        some, encoded, failed = list(itertools.islice(stream, size)), [], []
        for turn, features in zip(some, encode(some)):
            if not isinstance(features, LeamlError):
                encoded.append(features)
            elif on_error is None:
                raise features
            else:
                failed.append((turn, features))
        return len(some), encoded, failed

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="leaml-pictures") as executor:
        following = executor.submit(window)
        while (result := following.result())[0]:
            following = executor.submit(window)
            _, features, failed = result
            for turn, error in failed:
                assert on_error is not None
                on_error(turn, error)
            if features:
                yield features


def _run(
    loaded: Loaded,
    collator: Collator,
    config: GenerationConfig,
    rows: Sequence[tuple[Features, int]],
    sampling: Sampling | None,
    return_logprobs: bool,
    stop: list[int],
) -> list[Generated]:
    length = max(len(features) for features, _ in rows)
    chooser = None
    forced = [collator.prefix_ids(f.turn.prefix(sample)) if f.turn.prefixes else [] for f, sample in rows]
    if sampling is not None or return_logprobs or any(forced):
        keys = [_key(sampling.seed, features.turn.id, sample) for features, sample in rows] if sampling else None
        chooser = _Chooser(length, sampling, keys, stop, return_logprobs, forced)
    # the samples of a turn share one Features object and stand side by side
    new = [n == 0 or rows[n][0] is not rows[n - 1][0] for n in range(len(rows))]
    out = None
    if chooser is not None and not all(new):
        unique = [features for (features, _), first in zip(rows, new) if first]
        out = _read_once(loaded, collator, config, unique, [n - 1 for n in itertools.accumulate(new)], chooser)
    if out is None:
        batch = loaded.to_device(collator.merge([features for features, _ in rows], side="left"))
        out = loaded.model.generate(  # type: ignore[operator]
            **batch,
            generation_config=config,
            **({"logits_processor": LogitsProcessorList([chooser])} if chooser else {}),
        )
    results = []
    logprobs = chooser.means() if chooser is not None and return_logprobs else [0.0] * len(rows)
    for (features, sample), ids, logprob in zip(rows, out[:, length:].tolist(), logprobs):
        end = next((n + 1 for n, i in enumerate(ids) if i in stop), None)
        written = ids[:end]
        text = collator.decode(written)
        results.append(Generated(features.turn.id, sample, text, logprob, len(written), end is not None))
    return results


@torch.no_grad()  # not inference_mode: what a model caches must stay usable in training
def score(
    loaded: Loaded,
    turns: Iterable[Turn],
    *,
    collator: Collator | None = None,
    batch_size: int = 8,
    progress: bool = True,
    label: str = "scoring",
) -> Iterator[float]:
    """Mean log-probability (nats per token, end of turn included) of each turn's target, in order.

    Raises:
        LeamlError: a turn without target; as :func:`generate`.
    """
    collator = collator if collator is not None else Collator(loaded.processor)
    bar = Progress(label, len(turns) if hasattr(turns, "__len__") else None, unit="text") if progress else None
    for features in _ahead(turns, _each(collator.features), _WINDOW * batch_size):
        order = sorted(range(len(features)), key=lambda i: -len(features[i]))
        scores = [0.0] * len(features)
        for start in range(0, len(order), batch_size):
            some = order[start : start + batch_size]
            batch = loaded.to_device(collator.merge([features[i] for i in some], side="right", labels=True))
            labels = batch.pop("labels")
            with _evaluating(loaded.model):
                logits = loaded.model(**batch).logits
            for row, i in enumerate(some):
                where = (labels[row, 1:] != IGNORE).nonzero()[:, 0]
                logprobs = logits[row, where].float().log_softmax(-1)
                scores[i] = float(logprobs.gather(1, labels[row, where + 1][:, None]).mean())
            if bar:
                bar.update(len(some))
        yield from scores
    if bar:
        bar.close()


def _stop_ids(loaded: Loaded, collator: Collator) -> list[int]:
    """Ids that end an answer: the checkpoint's, the tokenizer's, and the one that training teaches."""
    ids = [collator.end_of_turn]
    found = [getattr(getattr(loaded.model, "generation_config", None), "eos_token_id", None)]
    found.append(collator.tokenizer.eos_token_id)
    for value in found:
        ids.extend(value if isinstance(value, list | tuple) else [value])
    return list(dict.fromkeys(i for i in ids if i is not None))


# What a second call of generate can extend by one token. Models with more (cross-attention masks) are not shared.
_EXTENDABLE = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}


def _read_once(
    loaded: Loaded,
    collator: Collator,
    config: GenerationConfig,
    unique: Sequence[Features],
    group: Sequence[int],
    chooser: _Chooser,
) -> Tensor | None:
    """Generate for rows that share prompts: the model reads each of ``unique`` once, then its cache is repeated.

    Args:
        group: which of ``unique`` each row continues.

    Returns:
        Ids ``[rows, length + written]``, or ``None`` where this model's cache cannot be repeated.
    """
    model: Any = loaded.model
    batch = loaded.to_device(collator.merge(unique, side="left"))
    sequence = {key: batch[key] for key in batch if key in unique[0].sequence}
    if not set(sequence) <= _EXTENDABLE:
        return None
    first = copy.deepcopy(config)
    first.max_new_tokens, first.return_dict_in_generate, first.output_logits = 1, True, True
    read = model.generate(**batch, generation_config=first)
    cache, length = read.past_key_values, batch["input_ids"].shape[1]
    if not hasattr(cache, "batch_select_indices") or cache.get_seq_length() != length:
        return None

    rows = torch.tensor(group, device=loaded.device)
    cache.batch_select_indices(rows)
    for module in model.modules():
        # Qwen-VL and its kin keep the offset of the text positions between calls
        deltas = getattr(module, "rope_deltas", None)
        if isinstance(deltas, Tensor) and deltas.shape[0] == len(unique):
            module.rope_deltas = deltas.index_select(0, rows)
    sequence = {key: value.index_select(0, rows) for key, value in sequence.items()}
    ids = sequence.pop("input_ids")
    token = chooser(ids, read.logits[0].float().index_select(0, rows)).argmax(-1, keepdim=True)
    ids = torch.cat([ids, token], 1)
    if config.max_new_tokens == 1 or bool(torch.isin(token, torch.tensor(config.eos_token_id).to(token)).all()):
        return ids
    rest = copy.deepcopy(config)
    rest.max_new_tokens -= 1
    grown = {
        key: torch.cat([value, torch.full_like(value[:, :1], int(key == "attention_mask"))], 1)
        for key, value in sequence.items()
    }
    return model.generate(
        input_ids=ids,
        past_key_values=cache,
        generation_config=rest,
        logits_processor=LogitsProcessorList([chooser]),
        **grown,
    )


# -- choosing tokens -------------------------------------------------------------------------------------------------

_MASK32 = 0xFFFFFFFF


class _Chooser(LogitsProcessor):
    """Draws the next token of every row, leaves only that one possible, and adds up its log-probability.

    ``forced`` holds the token ids that each row must begin with; they have no log-probability. Scores are
    ``[rows, vocabulary]`` float32, as transformers hands them on.
    """

    def __init__(
        self,
        prompt_length: int,
        sampling: Sampling | None,
        keys: list[tuple[int, int]] | None,
        stop: list[int],
        logprobs: bool,
        forced: Sequence[Sequence[int]] = (),
    ):
        self._start, self._sampling, self._logprobs = prompt_length, sampling, logprobs
        longest = max(map(len, forced), default=0)
        self._forced = torch.tensor([[*ids, *[-1] * (longest - len(ids))] for ids in forced], dtype=torch.int64)
        self._longest = longest
        self._keys = torch.tensor(keys or [], dtype=torch.int64)
        self._stop = torch.tensor(stop, dtype=torch.int64)
        self._steps: list[tuple[Tensor, Tensor]] = []  # what was chosen and its log-probability, of each step

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self._start
        if self._sampling is None and step >= self._longest:
            if self._logprobs:
                highest, choice = scores.max(-1)
                self._steps.append((choice, highest - scores.logsumexp(-1)))
            return scores
        if self._sampling is None:
            choice = scores.argmax(-1)
        else:
            self._keys = self._keys.to(scores.device)
            logits = scores / self._sampling.temperature
            if self._sampling.top_p < 1:
                logits = _nucleus(logits, self._sampling.top_p)
            choice = (logits + gumbel(self._keys, step, scores.shape[1])).argmax(-1)
        if step < self._longest:
            forced = self._forced[:, step].to(choice.device)
            choice = torch.where(forced < 0, choice, forced)
        if self._logprobs:
            self._steps.append((choice, scores.gather(1, choice[:, None])[:, 0] - scores.logsumexp(-1)))
        return torch.full_like(scores, -torch.inf).scatter_(1, choice[:, None], 0.0)

    def means(self) -> list[float]:
        """The mean log-probability of each row, over what was drawn up to the end of its answer."""
        choices, logprobs = (torch.stack(column).cpu().numpy() for column in zip(*self._steps))
        ends = np.isin(choices, self._stop.numpy())
        counted = ends.cumsum(0) - ends == 0
        counted[: self._longest] &= self._forced.numpy().T[: len(choices)] < 0
        # a cumulative sum adds one after the other: a row's is the same whatever stands beside it
        total = np.where(counted, logprobs, np.float32(0)).cumsum(0)[-1]
        return (total / np.maximum(counted.sum(0), 1).astype(np.float32)).tolist()


def _nucleus(logits: Tensor, top_p: float) -> Tensor:
    """``logits`` with all but the likeliest tokens that together reach ``top_p`` at minus infinity."""
    total = logits.logsumexp(-1, keepdim=True)
    # a few tokens nearly always reach it; sorting the whole vocabulary takes longer than a small model's step
    values, order = logits.topk(min(_LIKELY, logits.shape[-1]))
    shares = (values - total).exp()
    if shares.shape[-1] < logits.shape[-1] and bool((shares.sum(-1) < top_p).any()):
        values, order = logits.sort(-1, descending=True)
        shares = (values - total).exp()
    values = values.masked_fill(shares.cumsum(-1) - shares >= top_p, -torch.inf)
    return torch.full_like(logits, -torch.inf).scatter_(1, order, values)


def _key(seed: int, turn_id: str, sample: int) -> tuple[int, int]:
    """Two 32-bit words that name one draw of one turn."""
    digest = hashlib.blake2b(f"{seed}\0{sample}\0{turn_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def gumbel(keys: Tensor, step: int, size: int) -> Tensor:
    """Gumbel noise float32 ``[rows, size]``, a function of key, step and position alone.

    Args:
        keys: int64 ``[rows, 2]``, two 32-bit words a row; the noise is made on their device.

    A counter hash (two rounds of the 32-bit finaliser of Prospecting for Hash Functions, "lowbias32") in integer
    arithmetic, so the uniforms are the same on every device; 23 bits of them are used, which keeps them exact in
    float32 and strictly between 0 and 1.
    """
    position = torch.arange(size, dtype=torch.int64, device=keys.device)
    row = _mix(keys[:, 0] ^ ((step * 0x9E3779B9 + 0x85EBCA6B) & _MASK32))
    h = _mix((_mix(row[:, None] ^ position[None, :]) + keys[:, 1:]) & _MASK32)
    uniform = ((h >> 9).to(torch.float32) + 0.5) * 2.0**-23
    return uniform.log_().neg_().log_().neg_()


def _mix(x: Tensor) -> Tensor:
    # products of two 32-bit numbers wrap in int64; only their low 32 bits are kept, which wrapping leaves right
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK32
    return x ^ (x >> 16)
