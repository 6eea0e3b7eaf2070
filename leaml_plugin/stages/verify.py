"""Stage 3b, verification: the QA generator answers its own questions again, with and without the picture.

Asked as a plain question it may answer otherwise than it did when it wrote the pair; and a question that it answers
the same without the picture teaches nothing but the prior. This stage writes down both answers; what is dropped for
them is the filter's decision. Off by default, since it costs another pass over all pairs.

The generator learns plain questions only with ``generator.qa_task = "both"``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from leaml_plugin.artifacts import StageDirectory, read_records, write_records
from leaml_plugin.errors import LeamlError
from leaml_plugin.metrics import normalise_question
from leaml_plugin.progress import Progress
from leaml_plugin.records import QA, PseudoQA

if TYPE_CHECKING:
    from leaml_plugin.data import Collator, Prompts
    from leaml_plugin.models import Loaded

ROUND_TRIP, BLIND = "round_trip", "blind"


@dataclass(frozen=True)
class VerifyConfig:
    """Which second answers are asked for.

    Attributes:
        round_trip: the answer to the same question about the same picture, greedily.
        blind: the answer to the same question without the picture.
        batch_size: questions answered at once.
        max_new_tokens: of an answer.
    """

    round_trip: bool = False
    blind: bool = False
    batch_size: int = 32
    max_new_tokens: int = 32

    def __post_init__(self):
        for name in ("batch_size", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise LeamlError(f"verify: {name} is {getattr(self, name)}; it must be at least 1.")


def run(
    config: VerifyConfig,
    stage: StageDirectory,
    *,
    load: Callable[[], Loaded],
    collator: Callable[[Loaded], Collator],
    prompts: Prompts,
    shards: Sequence[Path],
) -> list[Path]:
    """Write each shard again with the second answers in ``checks``; returns the new shards in order."""
    if not (config.round_trip or config.blind):
        return list(shards)
    if stage.done:
        return stage.shards()
    missing = [i for i in range(len(shards)) if not stage.shard(i).exists()]
    if missing:
        loaded = load()
        collate = collator(loaded)
        bar = Progress("verification", len(shards), unit="shard", start=len(shards) - len(missing))
        for i in missing:
            pairs = list(read_records(shards[i], PseudoQA))
            write_records(stage.shard(i), check(config, loaded, collate, prompts, pairs))
            bar.update()
        bar.close()
    stage.finish()
    return stage.shards()


def check(
    config: VerifyConfig, loaded: Loaded, collator: Collator, prompts: Prompts, pairs: Sequence[PseudoQA]
) -> list[PseudoQA]:
    """The pairs with the second answers; a question that several samples of a picture share is asked once."""
    asked: dict[str, QA] = {}
    for pair in pairs:
        if pair.question:
            asked.setdefault(_key(pair), pair.as_qa())
    answers: dict[str, dict[str, str]] = {key: {} for key in asked}
    if config.round_trip:
        _ask(config, loaded, collator, prompts, asked, answers, ROUND_TRIP)
    if config.blind:
        without = {key: dataclasses.replace(qa, images=()) for key, qa in asked.items()}
        _ask(config, loaded, collator, prompts, without, answers, BLIND)
    return [dataclasses.replace(pair, checks=answers.get(_key(pair), {})) for pair in pairs]


def _key(pair: PseudoQA) -> str:
    return f"{pair.picture_id}\t{normalise_question(pair.question)}"


def _ask(
    config: VerifyConfig,
    loaded: Loaded,
    collator: Collator,
    prompts: Prompts,
    questions: dict[str, QA],
    answers: dict[str, dict[str, str]],
    name: str,
) -> None:
    from leaml_plugin.inference import generate

    turns = [dataclasses.replace(prompts.vqa(qa), id=key, target=None) for key, qa in questions.items()]
    for out in generate(
        loaded,
        turns,
        collator=collator,
        batch_size=config.batch_size,
        max_new_tokens=config.max_new_tokens,
        progress=False,
    ):
        answers[out.id][name] = out.text
