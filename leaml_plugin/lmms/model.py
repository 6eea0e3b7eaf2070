"""The lmms-eval model ``leaml``: any image-text-to-text model of transformers with a chat template.

Covers: adapters (ours and any of PEFT), batches of any mixture of text, several pictures and video (as frames), data
type, device map, one process a device under ``accelerate launch`` or ``torchrun``, the response cache, sampled
repeats. Pictures of the next batch are prepared while the current one is generated; a batch that does not fit the
device's memory is halved.
Does not cover: log-likelihoods (lmms-eval's own requests for them do not work with chat models), audio, multi-round
and agentic tasks.

    lmms-eval --model leaml --model_args pretrained=Qwen/Qwen2.5-VL-3B-Instruct,adapter=runs/endo/adapter \\
        --tasks leaml_endoscopy --batch_size 16
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from PIL import Image

from leaml_plugin import models
from leaml_plugin.data.collate import Collator, Features
from leaml_plugin.data.images import open_image
from leaml_plugin.data.prompts import Prompts, Turn
from leaml_plugin.errors import LeamlError, unknown_name
from leaml_plugin.lmms import video
from leaml_plugin.progress import Progress
from leaml_plugin.records import ImageRef

#: Options of a task's ``generation_kwargs`` that are handed to ``generate``; ``until`` is applied to the text.
_PASSED = ("top_p", "top_k", "num_beams", "repetition_penalty", "no_repeat_ngram_size", "length_penalty", "min_p")
_DEFAULT_NEW_TOKENS = 64
_RENDERED = 10_000  # texts kept in the model's template


class Leaml(lmms):
    """See the module docstring; the arguments are what ``--model_args`` takes.

    Args:
        pretrained: directory or Hub id of the model; from Python, a loaded model too.
        adapter: directory or Hub id of a PEFT adapter on it.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ...; the rank's own device where there are several processes.
        dtype: ``auto`` (as stored), ``float32``, ``bfloat16`` or ``float16``.
        device_map: spread the model over devices as transformers does (``auto``, ``balanced``); one process only.
        batch_size: conversations generated at once; ``auto`` starts at ``max_batch_size`` (64).
        max_frames: frames taken of a video that a task gives as a file.
        max_length: the most prompt tokens; nothing is truncated, a longer prompt is an error that names it.
        min_pixels, max_pixels: picture size limits of processors that have them (Qwen-VL).
        prompts: directory with prompt files, for the system message (``system.txt``); ``$LEAML_PROMPTS`` by default.
        attn_implementation: as transformers takes it.
        trust_remote_code: run code that comes with the model.
        method, labeled, ...: adapt first; see :mod:`leaml_plugin.lmms.methods`.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str | os.PathLike[str] | models.Loaded,
        adapter: str | os.PathLike[str] | None = None,
        device: str | None = None,
        dtype: str = "auto",
        device_map: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | str | None = None,
        max_frames: int = 16,
        max_length: int | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        prompts: str | None = None,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        method: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        from accelerate import Accelerator

        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        directory = prompts or os.environ.get("LEAML_PROMPTS") or None
        if method is not None:
            from leaml_plugin.lmms import methods

            if directory:  # a model is adapted with the texts that it is asked with
                options.setdefault("prompts", directory)
            pretrained, adapter = methods.adapted(method, pretrained, adapter, options, self.accelerator)
        elif options:
            raise unknown_name("model argument", next(iter(options)), _arguments())
        if device_map and self._world_size > 1:
            raise LeamlError("device_map spreads one model over all devices; use it with a single process.")
        if isinstance(pretrained, models.Loaded):
            self.loaded = pretrained
        else:
            limits = {"min_pixels": min_pixels, "max_pixels": max_pixels}
            self.loaded = models.load(
                pretrained,
                dtype=dtype,
                device="cpu" if device_map else self._choose_device(device),
                adapter=adapter,
                trust_remote_code=trust_remote_code,
                attn=attn_implementation,
                processor_options={name: value for name, value in limits.items() if value is not None},
            )
            if device_map:
                self.loaded.model = _spread(self.loaded.model, device_map)
        self.batch_size_per_gpu = _batch_size(batch_size, max_batch_size)
        self.max_frames = int(max_frames)
        self.collator = MessageCollator(self.loaded.processor, Prompts.load(directory), max_length=max_length)

    def _choose_device(self, device: str | None) -> str:
        if self._world_size > 1 and torch.cuda.is_available():
            return f"cuda:{self.accelerator.local_process_index}"
        return device or "auto"

    # ------------------------------------------------------------------------------- what lmms-eval asks a model for

    @property
    def model(self) -> torch.nn.Module:
        return self.loaded.model

    @property
    def tokenizer(self) -> Any:
        return self.collator.tokenizer

    @property
    def device(self) -> torch.device:
        return self.loaded.device

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._world_size

    @property
    def batch_size(self) -> int:
        return self.batch_size_per_gpu

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise LeamlError("the model leaml scores generated answers only; choose a task whose output_type is generate.")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise LeamlError("the model leaml answers single turns only; choose a task without rounds.")

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answers in the order of ``requests``; a batch holds requests of equal options and similar length."""
        results: dict[int, GenerationResult] = {}
        bar = Progress("answering", len(requests), unit="question") if self.rank == 0 else None
        tokens, seconds = 0, 0.0
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="leaml-pictures") as ahead:
            pending = None
            for chunk in [*self._chunks(requests), None]:
                following = None if chunk is None else (chunk, ahead.submit(self._prepare, chunk))
                if pending is not None:
                    chunk_done, (conversations, batch) = pending[0], pending[1].result()
                    options = chunk_done[0][1].args[2] or {}
                    began = time.perf_counter()
                    answers = self._generate(conversations, batch, options)
                    seconds += time.perf_counter() - began
                    for (position, request), (text, count) in zip(chunk_done, answers):
                        results[position] = GenerationResult(text=text, token_counts=TokenCounts(output_tokens=count))
                        self.cache_hook.add_partial("generate_until", (request.args[0], options), text)
                        tokens += count
                    if bar:
                        bar.update(len(chunk_done))
                pending = following
        if bar:
            bar.close()
        _log_speed(tokens, seconds, len(requests))
        return [results[i] for i in range(len(requests))]

    # ------------------------------------------------------------------------------------------------------- batches

    def _chunks(self, requests: Sequence[Instance]) -> Iterator[list[tuple[int, Instance]]]:
        groups: dict[str, list[tuple[int, Instance]]] = {}
        for position, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[2], sort_keys=True, default=str), []).append((position, request))
        for group in groups.values():
            # longest first, so that a batch which does not fit is found at once; ties keep their order
            group.sort(key=lambda pair: -len(pair[1].args[0] or ""))
            for start in range(0, len(group), self.batch_size):
                yield group[start : start + self.batch_size]

    def _prepare(self, chunk: Sequence[tuple[int, Instance]]) -> tuple[list[Conversation], dict[str, Any]]:
        conversations = [self._conversation(request) for _, request in chunk]
        return conversations, self.collator.batch(conversations)

    def _conversation(self, request: Instance) -> Conversation:
        _, to_messages, _, doc_id, task, split = request.args
        messages = to_messages(self.task_dict[task][split][doc_id])
        return self.collator.conversation(messages, f"{task} document {doc_id}", self.max_frames)

    def _generate(
        self, conversations: list[Conversation], batch: dict[str, Any] | None, options: Mapping[str, Any]
    ) -> list[tuple[str, int]]:
        if len(conversations) > self.batch_size:
            size = self.batch_size
            parts = [conversations[i : i + size] for i in range(0, len(conversations), size)]
            return [answer for part in parts for answer in self._generate(part, None, options)]
        try:
            return self._generate_batch(batch or self.collator.batch(conversations), options)
        except torch.OutOfMemoryError as error:
            if len(conversations) == 1:
                raise LeamlError(
                    f"{conversations[0].where}: this one conversation does not fit the device's memory; lower "
                    "max_pixels or max_frames, or use dtype=bfloat16."
                ) from error
        # outside the handler, whose traceback would keep the failed batch alive; later batches start at this size
        torch.cuda.empty_cache()
        self.batch_size_per_gpu = (len(conversations) + 1) // 2
        return self._generate(conversations, None, options)

    @torch.inference_mode()
    def _generate_batch(self, encoded: Mapping[str, Any], options: Mapping[str, Any]) -> list[tuple[str, int]]:
        batch = self.loaded.to_device(encoded)
        out = self.model.generate(**batch, generation_config=self._config(options))
        ends = set(self._ends)
        answers = []
        for row in out[:, batch["input_ids"].shape[1] :].tolist():
            written = row[: next((n + 1 for n, token in enumerate(row) if token in ends), None)]
            text = self.collator.decode(torch.tensor(written, dtype=torch.int64))
            for stop in _stops(options):
                text = text.split(stop, 1)[0]
            answers.append((text.strip(), len(written)))
        return answers

    @property
    def _ends(self) -> list[int]:
        """Ids that end an answer: the template's, the tokenizer's and the checkpoint's."""
        own = getattr(self.model.generation_config, "eos_token_id", None)
        ids = [self.collator.end_of_turn, self.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
        return sorted({token for token in ids if token is not None})

    def _config(self, options: Mapping[str, Any]) -> Any:
        from transformers import GenerationConfig

        given = options.get("temperature")
        # a task that asks for sampling and no more gets transformers' temperature; temperature 0 is greedy
        temperature = float(given) if given is not None else float(bool(options.get("do_sample")))
        sampled = temperature > 0 and bool(options.get("do_sample", True))
        # what is not set comes from the checkpoint, and neither its sampling nor its penalties may decide a benchmark
        values = {"num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_length": 0}
        values |= {name: options[name] for name in _PASSED if options.get(name) is not None}
        if not sampled:
            for name in ("top_p", "top_k", "min_p"):
                values.pop(name, None)
        return GenerationConfig(
            max_new_tokens=int(options.get("max_new_tokens") or _DEFAULT_NEW_TOKENS),
            do_sample=sampled,
            pad_token_id=self.collator.pad_id,
            eos_token_id=self._ends,
            **({"temperature": temperature} if sampled else {}),
            **values,
        )


@dataclass(frozen=True)
class Conversation:
    """A conversation as the processor takes it: its text in the model's template, and its pictures in order."""

    text: str
    pictures: tuple[Image.Image, ...]
    where: str


class MessageCollator(Collator):
    """Encodes whole conversations of lmms-eval's form, with pictures in memory where the text has them."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._rendered: dict[str, str] = {}

    def conversation(self, messages: Sequence[Mapping[str, Any]], where: str, max_frames: int) -> Conversation:
        """``messages`` in the model's chat template, ending where the model's answer begins.

        Messages have a ``role`` and ``content``: text, or a list of ``{"type": "text", "text": ...}`` and
        ``{"type": "image" | "video", "url": ...}``, where a url is a picture, a path, or a list of frames.
        """
        pictures: list[Image.Image] = []
        turns = []
        if self.prompts.system and not any(message["role"] == "system" for message in messages):
            turns.append({"role": "system", "content": [{"type": "text", "text": self.prompts.system}]})
        for message in messages:
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            turns.append({"role": message["role"], "content": self._content(parts, pictures, where, max_frames)})
        # a task's questions repeat, and rendering one takes as long as a small model's token
        key = json.dumps(turns)
        if key not in self._rendered:
            if len(self._rendered) >= _RENDERED:
                self._rendered.clear()
            self._rendered[key] = self.processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return Conversation(self._rendered[key], tuple(pictures), where)

    def batch(self, conversations: Sequence[Conversation]) -> dict[str, Any]:
        """A left-padded batch for ``generate``.

        Conversations of equally many pictures go to the processor together, which saves most of its overhead; others,
        and those it refuses, one by one, so that the error names the right one.
        """
        if len({len(c.pictures) for c in conversations}) == 1 and len(conversations) > 1:
            try:
                return self._together(conversations)
            except ValueError:
                pass  # told below, with the name of the conversation
        return self.merge([self._alone(conversation) for conversation in conversations], side="left")

    def _together(self, conversations: Sequence[Conversation]) -> dict[str, Any]:
        pictures = [list(c.pictures) for c in conversations if c.pictures]
        bos = self.tokenizer.bos_token
        begun = bos is not None and conversations[0].text.startswith(bos)
        batch = self.processor(
            text=[c.text for c in conversations],
            return_tensors="pt",
            truncation=False,
            padding=True,
            padding_side="left",
            **({"images": pictures} if pictures else {}),
            **({"add_special_tokens": False} if begun else {}),
        )
        if self.max_length is not None and batch["input_ids"].shape[1] > self.max_length:
            raise ValueError("too long")
        return dict(batch)

    def _alone(self, conversation: Conversation) -> Features:
        sequence, media = self._split(self._process(conversation.text, list(conversation.pictures), conversation.where))
        turn = Turn(conversation.where, (), "", None, conversation.where)
        features = Features(turn, sequence, media, len(sequence["input_ids"]))
        self._check_length(features)
        return features

    def _content(
        self, parts: Sequence[Mapping[str, Any]], pictures: list[Image.Image], where: str, max_frames: int
    ) -> list[dict[str, Any]]:
        out: list[dict[str, Any]] = []
        for part in parts:
            kind = part["type"]
            if kind == "text":
                out.append({"type": "text", "text": self._plain(part["text"])})
                continue
            source = part.get("url", part.get(kind))
            if kind == "image":
                found = [_picture(source, where)]
            elif kind == "video":
                frames = source if isinstance(source, (list, tuple)) else video.frames(_path(source, where), max_frames)
                found = [_picture(frame, where) for frame in frames]
            else:
                raise LeamlError(f"{where}: holds {kind}, which the model leaml cannot read; choose another task.")
            pictures += found
            out += [{"type": "image"} for _ in found]
        return out


def _path(source: Any, where: str) -> Path:
    if isinstance(source, Mapping):
        source = source.get("url") or source.get("path")
    if not isinstance(source, (str, os.PathLike)):
        raise LeamlError(f"{where}: a video is given as {type(source).__name__}; wanted a path or a list of frames.")
    return Path(source)


def _picture(source: Any, where: str) -> Image.Image:
    if isinstance(source, Image.Image):
        return source.convert("RGB")
    if isinstance(source, (str, os.PathLike)):
        return open_image(ImageRef(str(source)))
    raise LeamlError(f"{where}: a picture is given as {type(source).__name__}; wanted a PIL image or a path.")


def _stops(options: Mapping[str, Any]) -> list[str]:
    until = options.get("until") or []
    return [stop for stop in ([until] if isinstance(until, str) else until) if stop]


def _batch_size(batch_size: int | str, max_batch_size: int | str | None) -> int:
    text = str(batch_size)
    if text.startswith("auto"):
        text = str(max_batch_size or 64)
    if not text.isdecimal() or int(text) < 1:
        raise LeamlError(f"batch_size must be a number of at least 1, or auto, got {batch_size!r}.")
    return int(text)


def _spread(model: torch.nn.Module, device_map: str) -> torch.nn.Module:
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    whole = getattr(model, "_no_split_modules", None) or []
    memory = get_balanced_memory(model, no_split_module_classes=whole) if device_map == "balanced" else None
    return dispatch_model(model, infer_auto_device_map(model, max_memory=memory, no_split_module_classes=whole))


def _arguments() -> list[str]:
    import inspect

    return [name for name in inspect.signature(Leaml.__init__).parameters if name not in ("self", "options")]


def _log_speed(tokens: int, seconds: float, requests: int) -> None:
    from lmms_eval.models.model_utils.gen_metrics import log_metrics

    log_metrics(
        total_gen_tokens=tokens,
        total_elapsed_time=seconds,
        avg_speed=tokens / seconds if seconds else 0.0,
        additional_metrics={"num_requests": requests},
    )
