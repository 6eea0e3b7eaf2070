"""Stage 3, pseudo-QA generation: the QA generator writes questions and answers for the unlabelled pictures.

Several samples a picture, drawn with a seed per picture and sample, so that neither the batch nor the shard that a
picture falls into changes what is written. Shards are written whole and the ranks of a run share them; the next run
writes those that are missing. Pictures are read as a stream: a shard of them is in memory. With a target mix the
samples of a picture are dealt to families of questions, by the same seed: each begins as its family does and the
generator goes on from there.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leaml_plugin.artifacts import StageDirectory, write_json, write_records
from leaml_plugin.backends import NAMES, EngineConfig, opened
from leaml_plugin.errors import LeamlError, unknown_name
from leaml_plugin.families import Families, Mix, deal
from leaml_plugin.progress import Progress
from leaml_plugin.records import QA, UNREADABLE, Picture, PseudoQA

if TYPE_CHECKING:
    from leaml_plugin.data import Collator, Prompts, Turn
    from leaml_plugin.inference import Generated
    from leaml_plugin.models import Loaded

FAMILIES = "families.json"


@dataclass(frozen=True)
class GenerateConfig:
    """How pseudo-QA pairs are drawn.

    Attributes:
        samples: draws a picture.
        temperature: of the sampling; 0 is greedy and then allows one sample.
        top_p: smallest set of tokens with this probability is sampled from.
        max_new_tokens: longest text; a longer one is cut and will usually be filtered as malformed.
        batch_size: texts generated at once.
        shard_size: pictures a shard; a killed run repeats at most one shard.
        seed: of all draws.
        mix: which share of the samples each family of questions gets: "labels" (as in the labels), "uniform", or
            weights of beginnings, such as "how many=2, is there=1"; empty: the generator asks what it will.
        families: the most families that are learnt from the labels.
        backend: where the generator runs: "transformers" (in this process), "vllm" (in this process) or "server".
        engine: what the back ends beside "transformers" are told.
    """

    samples: int = 4
    temperature: float = 1.0
    top_p: float = 0.95
    max_new_tokens: int = 96
    batch_size: int = 32
    shard_size: int = 256
    seed: int = 0
    mix: str = ""
    families: int = 12
    backend: str = "transformers"
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self):
        for name in ("samples", "max_new_tokens", "batch_size", "shard_size", "families"):
            if getattr(self, name) < 1:
                raise LeamlError(f"generate: {name} is {getattr(self, name)}; it must be at least 1.")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise LeamlError("generate: temperature must not be negative, and top_p must lie in (0, 1].")
        if self.temperature == 0 and self.samples > 1:
            raise LeamlError("generate: with temperature 0 all samples of a picture are equal; set samples=1.")
        if self.backend not in NAMES:
            raise unknown_name("generate.backend", self.backend, NAMES)


def run(
    config: GenerateConfig,
    stage: StageDirectory,
    *,
    load: Callable[[], Loaded],
    collator: Callable[[Loaded], Collator],
    prompts: Prompts,
    pictures: Sequence[Picture],
    labels: Sequence[QA] = (),
    weights: Mapping[str, Any] | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> list[Path]:
    """Write pseudo-QA for ``pictures`` with the generator that ``load`` gives; returns the shards in order.

    Args:
        labels: what the families of a target mix are learnt from.
        weights, dtype, trust_remote_code: where the generator's weights lie (``{"path": model, "adapter": adapter}``)
            and how to load them, for the other back ends.
    """
    if stage.done:
        return stage.shards()
    steer = steering(config, labels)
    if steer is not None and stage.rank.leads:
        write_json(stage.file(FAMILIES), steer.to_json())
    size = config.shard_size
    write: Callable[..., Iterator[Generated]] | None = None
    bar = Progress("pseudo-QA", len(pictures), unit="picture", start=min(len(pictures), size * len(stage.shards())))
    with contextlib.ExitStack() as stack:
        for i in stage.open_shards(-(-len(pictures) // size)):
            if write is None:  # the model is loaded where there is work left
                vllm = config.backend == "vllm"
                engine = opened(
                    config.backend,
                    config.engine,
                    load=load,
                    collator=collator,
                    prompts=prompts,
                    weights=weights,
                    work=stage.work / f"rank-{stage.rank.number}",
                    images=max(len(picture.images) for picture in pictures) if vllm else 1,
                    dtype=dtype,
                    trust_remote_code=trust_remote_code,
                )
                write = stack.enter_context(engine)
            shard = pictures[i * size : (i + 1) * size]
            write_records(stage.shard(i), write_pairs(config, write, prompts, steer, shard, bar))
    bar.close()
    stage.finish_shards()
    return stage.shards()


def write_pairs(
    config: GenerateConfig,
    generate: Callable[..., Iterator[Generated]],
    prompts: Prompts,
    steer: Mix | None,
    pictures: Sequence[Picture],
    bar: Progress | None = None,
) -> list[PseudoQA]:
    """The pairs of one shard, the samples of a picture one after the other.

    ``generate`` is :func:`leaml_plugin.inference.generate` of one model, or another back end's.
    A picture that cannot be read makes one pair without question, whose reason says so.
    """
    from leaml_plugin.inference import Sampling

    sampling = None
    if config.temperature > 0:
        sampling = Sampling(temperature=config.temperature, top_p=config.top_p, seed=config.seed)
    failed: dict[str, str] = {}
    written: dict[str, list[PseudoQA]] = {picture.id: [] for picture in pictures}
    images = {picture.id: picture.images for picture in pictures}
    for text in generate(
        [_turn(config, prompts, steer, picture) for picture in pictures],
        batch_size=config.batch_size,
        max_new_tokens=config.max_new_tokens,
        sampling=sampling,
        num_samples=config.samples,
        return_logprobs=True,
        progress=False,
        on_error=lambda turn, error: failed.update({turn.id: str(error)}),
    ):
        question, answer = prompts.parse_generated(text.text) or ("", "")
        pair = PseudoQA(text.id, images[text.id], text.sample, text.text, question, answer, text.logprob)
        written[text.id].append(pair)
        if bar is not None and text.sample + 1 == config.samples:
            bar.update()
    for name, why in failed.items():
        written[name] = [PseudoQA(name, images[name], 0, "", checks={UNREADABLE: why}, reason=UNREADABLE)]
    return [pair for pairs in written.values() for pair in pairs]


def steering(config: GenerateConfig, labels: Sequence[QA]) -> Mix | None:
    """The target mix over families of questions, or ``None`` where the generator asks what it will.

    Raises:
        LeamlError: the configuration's mix is no mix.
    """
    if not config.mix:
        return None
    families = Families.learn((qa.question for qa in labels), config.families)
    return Mix(families, families.mix(config.mix))


def _turn(config: GenerateConfig, prompts: Prompts, steer: Mix | None, picture: Picture) -> Turn:
    turn = prompts.generate(picture)
    if steer is None:
        return turn
    dealt = deal(steer.target, picture.id, config.samples, config.seed)
    return dataclasses.replace(turn, prefixes=tuple(map(prompts.begin_generated, dealt)))
