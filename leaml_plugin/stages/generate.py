"""Stage 3, pseudo-QA generation: the QA generator writes questions and answers for the unlabelled pictures.

Several samples a picture, drawn with a seed per picture and sample, so that neither the batch nor the shard that a
picture falls into changes what is written. Shards are written whole and in order: the next run starts at the first
one that is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from leaml_plugin.artifacts import StageDirectory, write_records
from leaml_plugin.errors import LeamlError
from leaml_plugin.progress import Progress
from leaml_plugin.records import Picture, PseudoQA

if TYPE_CHECKING:
    from leaml_plugin.data import Collator, Prompts
    from leaml_plugin.models import Loaded


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
    """

    samples: int = 4
    temperature: float = 1.0
    top_p: float = 0.95
    max_new_tokens: int = 96
    batch_size: int = 32
    shard_size: int = 256
    seed: int = 0

    def __post_init__(self):
        for name in ("samples", "max_new_tokens", "batch_size", "shard_size"):
            if getattr(self, name) < 1:
                raise LeamlError(f"generate: {name} is {getattr(self, name)}; it must be at least 1.")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise LeamlError("generate: temperature must not be negative, and top_p must lie in (0, 1].")
        if self.temperature == 0 and self.samples > 1:
            raise LeamlError("generate: with temperature 0 all samples of a picture are equal; set samples=1.")


def run(
    config: GenerateConfig,
    stage: StageDirectory,
    *,
    load: Callable[[], Loaded],
    collator: Callable[[Loaded], Collator],
    prompts: Prompts,
    pictures: Sequence[Picture],
) -> list[Path]:
    """Write pseudo-QA for ``pictures`` with the generator that ``load`` gives; returns the shards in order."""
    if stage.done:
        return stage.shards()
    shards = [pictures[i : i + config.shard_size] for i in range(0, len(pictures), config.shard_size)]
    missing = [i for i in range(len(shards)) if not stage.shard(i).exists()]
    if missing:
        from leaml_plugin.inference import Sampling, generate

        loaded = load()
        collate = collator(loaded)
        sampling = None
        if config.temperature > 0:
            sampling = Sampling(temperature=config.temperature, top_p=config.top_p, seed=config.seed)
        written = sum(len(shard) for i, shard in enumerate(shards) if i not in set(missing))
        bar = Progress("pseudo-QA", len(pictures) * config.samples, unit="text", start=written * config.samples)
        for i in missing:
            by_id = {picture.id: picture for picture in shards[i]}
            out = []
            for text in generate(
                loaded,
                [prompts.generate(picture) for picture in shards[i]],
                collator=collate,
                batch_size=config.batch_size,
                max_new_tokens=config.max_new_tokens,
                sampling=sampling,
                num_samples=config.samples,
                return_logprobs=True,
                progress=False,
            ):
                question, answer = prompts.parse_generated(text.text) or ("", "")
                images = by_id[text.id].images
                out.append(PseudoQA(text.id, images, text.sample, text.text, question, answer, text.logprob))
                bar.update()
            write_records(stage.shard(i), out)
        bar.close()
    stage.finish()
    return stage.shards()
