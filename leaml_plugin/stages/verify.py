"""Stage 3b, verification: the QA generator answers its questions again: with the picture, without, from the caption.

Asked as a plain question it may answer otherwise than it did when it wrote the pair; a question that it answers the
same without the picture teaches nothing but the prior; and told the teacher's caption in place of the picture it says
what the teacher saw. This stage writes the answers down; what is dropped for them is the filter's decision. Each costs
another pass over all pairs, over text alone but for the first.

The generator learns plain questions only with ``generator.qa_task = "both"``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from leaml_plugin.artifacts import StageDirectory, read_records, write_records
from leaml_plugin.errors import LeamlError
from leaml_plugin.metrics import normalise_question
from leaml_plugin.progress import Progress
from leaml_plugin.records import QA, UNREADABLE, PseudoQA

if TYPE_CHECKING:
    from leaml_plugin.data import Collator, Prompts, Turn
    from leaml_plugin.models import Loaded

ROUND_TRIP, BLIND, CAPTION = "round_trip", "blind", "caption"


@dataclass(frozen=True)
class VerifyConfig:
    """Which second answers are asked for.

    Attributes:
        round_trip: the answer to the same question about the same picture, greedily.
        blind: the answer to the same question without the picture.
        caption: the answer to the same question without the picture, from the teacher's caption as text, where there
            is one; and that without either (as ``blind``), which tells what the caption itself has changed.
        caption_confidence: an answer from the caption is written down only if the model gives its tokens at least this
            probability (geometric mean): where the caption does not say, the model guesses.
        batch_size: questions answered at once.
        max_new_tokens: of an answer.
    """

    round_trip: bool = True
    blind: bool = False
    caption: bool = False
    caption_confidence: float = 0.5
    batch_size: int = 32
    max_new_tokens: int = 32

    def __post_init__(self):
        for name in ("batch_size", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise LeamlError(f"verify: {name} is {getattr(self, name)}; it must be at least 1.")
        if not 0 <= self.caption_confidence < 1:
            raise LeamlError(
                f"verify: caption_confidence is {self.caption_confidence}; it is a probability, from 0 to below 1."
            )

    @property
    def asks(self) -> bool:
        """Whether there is anything to do."""
        return self.round_trip or self.blind or self.caption


def run(
    config: VerifyConfig,
    stage: StageDirectory,
    *,
    load: Callable[[], Loaded],
    collator: Callable[[Loaded], Collator],
    prompts: Prompts,
    shards: Sequence[Path],
    captions: Callable[[int], Mapping[str, str]] = lambda shard: {},
) -> list[Path]:
    """Write each shard again with the second answers in ``checks``; returns the new shards in order.

    Args:
        captions: number of a shard -> the teacher's captions of its pictures, by id.
    """
    if not config.asks:
        return list(shards)
    if stage.done:
        return stage.shards()
    ready: tuple[Loaded, Collator] | None = None
    bar = Progress("verification", len(shards), unit="shard", start=len(stage.shards()))
    for i in stage.open_shards(len(shards)):
        if ready is None:  # the model is loaded where there is work left
            loaded = load()
            ready = loaded, collator(loaded)
        pairs = list(read_records(shards[i], PseudoQA))
        told = captions(i) if config.caption else {}
        write_records(stage.shard(i), check(config, *ready, prompts, pairs, told))
        bar.update()
    bar.close()
    stage.finish_shards()
    return stage.shards()


def check(
    config: VerifyConfig,
    loaded: Loaded,
    collator: Collator,
    prompts: Prompts,
    pairs: Sequence[PseudoQA],
    captions: Mapping[str, str] | None = None,
) -> list[PseudoQA]:
    """The pairs with the second answers; a question that several samples of a picture share is asked once.

    A pair whose picture cannot be read any more gets that as its reason.
    """
    asked: dict[str, QA] = {}
    told: dict[str, Turn] = {}
    captions = captions or {}
    for pair in pairs:
        if not pair.question:
            continue
        key, qa = _key(pair), pair.as_qa()
        asked.setdefault(key, qa)
        if config.caption and captions.get(pair.picture_id):
            told.setdefault(key, prompts.vqa_of_caption(qa, captions[pair.picture_id]))
    answers: dict[str, dict[str, str]] = {key: {} for key in asked}
    if config.round_trip:
        turns = {key: prompts.vqa(qa) for key, qa in asked.items()}
        _ask(config, loaded, collator, turns, answers, ROUND_TRIP)
    if config.blind or config.caption:
        turns = {key: prompts.vqa(dataclasses.replace(qa, images=())) for key, qa in asked.items()}
        _ask(config, loaded, collator, turns, answers, BLIND)
    if config.caption:
        _ask(config, loaded, collator, told, answers, CAPTION, sure=config.caption_confidence)
    return [_checked(pair, answers.get(_key(pair), {})) for pair in pairs]


def _checked(pair: PseudoQA, answers: Mapping[str, str]) -> PseudoQA:
    reason = UNREADABLE if UNREADABLE in answers else pair.reason
    return dataclasses.replace(pair, checks={**pair.checks, **answers}, reason=reason)


def _key(pair: PseudoQA) -> str:
    return f"{pair.picture_id}\t{normalise_question(pair.question)}"


def _ask(
    config: VerifyConfig,
    loaded: Loaded,
    collator: Collator,
    questions: dict[str, Turn],
    answers: dict[str, dict[str, str]],
    name: str,
    sure: float = 0.0,
) -> None:
    from leaml_plugin.inference import generate

    least = math.log(sure) if sure > 0 else -math.inf
    turns = [dataclasses.replace(turn, id=key, target=None) for key, turn in questions.items()]
    for out in generate(
        loaded,
        turns,
        collator=collator,
        batch_size=config.batch_size,
        max_new_tokens=config.max_new_tokens,
        return_logprobs=sure > 0,
        progress=False,
        on_error=lambda turn, error: answers[turn.id].update({UNREADABLE: str(error)}),
    ):
        if out.logprob >= least:
            answers[out.id][name] = out.text
