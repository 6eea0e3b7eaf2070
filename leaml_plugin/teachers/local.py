"""A local transformers model as teacher, batched through :func:`leaml_plugin.inference.generate`.

Covers: the teacher's prompt in the model's own chat template, token counts, a picture that cannot be opened or that
the model's processor refuses (it fails alone).
Does not cover: loading the model (``leaml_plugin.models``).
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from leaml_plugin.data import Collator, Prompts
from leaml_plugin.data.prompts import Turn
from leaml_plugin.errors import LeamlError
from leaml_plugin.inference import Sampling, generate
from leaml_plugin.models import max_positions
from leaml_plugin.records import Picture
from leaml_plugin.teachers import Answer, Failure
from leaml_plugin.teachers.prompt import TeacherPrompt

if TYPE_CHECKING:
    from leaml_plugin.models import Loaded

# Each turn is encoded once to see whether it can be, and taken from here when its batch is made.
_CACHE = 256 << 20


def each(
    loaded: Loaded,
    items: Iterable[tuple[int, Picture]],
    prompt: TeacherPrompt,
    *,
    batch_size: int = 8,
    max_tokens: int = 256,
    sampling: Sampling | None = None,
) -> Iterator[tuple[tuple[int, Picture], Answer | Failure]]:
    """Caption the pictures of numbered ``items``; yields in their order but for those that cannot be read."""
    prompts = dataclasses.replace(Prompts.load(), system=prompt.system)
    collator = Collator(loaded.processor, prompts, max_length=max_positions(loaded.model), cache_bytes=_CACHE)
    asked: deque[tuple[tuple[int, Picture], int]] = deque()
    failed: deque[tuple[tuple[int, Picture], Failure]] = deque()

    def turns() -> Iterator[Turn]:
        for item in items:
            turn = Turn(item[1].id, item[1].images, prompt.caption, None, f"picture {item[1].id}")
            try:
                length = len(collator.prompt_features(turn))
            except LeamlError as error:
                failed.append((item, Failure("unreadable", str(error))))
                continue
            asked.append((item, length))
            yield turn

    for text in generate(
        loaded,
        turns(),
        collator=collator,
        batch_size=batch_size,
        max_new_tokens=max_tokens,
        sampling=sampling,
        progress=False,
    ):
        item, length = asked.popleft()
        yield item, Answer(text.text, "stop" if text.finished else "length", "", length, text.tokens)
        while failed:
            yield failed.popleft()
    yield from failed
