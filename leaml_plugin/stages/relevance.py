"""Stage 1, neuron relevance: which neurons matter for question answering (LEAML, selective neuron distillation).

Runs the QA loss of the labelled set through the base model once, accumulates a gradient-based score for each neuron
(output row of a target Linear, or a whole FFN neuron), and selects the top share. Only those neurons learn from the
teacher's captions later.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from leaml_plugin.artifacts import StageDirectory, write_json
from leaml_plugin.config import check_pattern
from leaml_plugin.errors import LeamlError, unknown_name
from leaml_plugin.ops import CRITERIA
from leaml_plugin.progress import track
from leaml_plugin.records import QA
from leaml_plugin.selection import (
    GRANULARITIES,
    SCOPES,
    NeuronScores,
    RelevanceScorer,
    Selection,
    all_neurons,
    random_selection,
    select,
)
from leaml_plugin.training import autocast, seed_everything

if TYPE_CHECKING:
    from leaml_plugin.data import Collator, Prompts
    from leaml_plugin.models import Loaded

SCORES, SELECTION = "scores.safetensors", "selection.safetensors"
HEATMAP, OVERLAP = "heatmap.json", "overlap.json"  # for the report, which reads no tensors
LOSSES = ("generate", "vqa", "both")
CHOICES = ("relevance", "random", "all")


@dataclass(frozen=True)
class RelevanceConfig:
    """What is scored and how many neurons are selected.

    Attributes:
        criterion: "taylor" |sum w*g|, "taylor_abs" sum |w*g|, "fisher" sum g^2 or "grad_norm" sqrt(sum g^2).
        granularity: "row" (an output row of a Linear) or "ffn" (gate row, up row and down column together).
        loss: the loss that is scored: writing question and answer ("generate"), answering ("vqa"), or "both".
        density: share of the neurons that is selected, in (0, 1].
        scope: the share holds per "layer" (each Linear), per "group" or over the whole "model".
        choice: "relevance"; "random" (same number, for ablation); "all" (plain distillation, for ablation).
        targets: regular expression over module names; empty: the language model's Linears (``models``).
        batch_size: samples a backward pass; the score of |sum w*g| depends on it.
        seed: of the random choice.
    """

    criterion: str = "taylor"
    granularity: str = "row"
    loss: str = "generate"
    density: float = 0.1
    scope: str = "layer"
    choice: str = "relevance"
    targets: str = ""
    batch_size: int = 4
    seed: int = 0

    def __post_init__(self):
        for kind, name, choices in (
            ("criterion", self.criterion, CRITERIA),
            ("granularity", self.granularity, GRANULARITIES),
            ("selection scope", self.scope, SCOPES),
            ("relevance loss", self.loss, LOSSES),
            ("choice of neurons", self.choice, CHOICES),
        ):
            if name not in choices:
                raise unknown_name(kind, name, choices)
        if not 0 < self.density <= 1:
            raise LeamlError(f"relevance: density is {self.density}; it must be above 0 and at most 1.")
        check_pattern("relevance.targets", self.targets)
        if self.targets and self.granularity == "ffn":
            raise LeamlError('relevance: targets choose rows of Linears; granularity "ffn" takes every FFN block.')
        if self.batch_size < 1:
            raise LeamlError(f"relevance: batch_size is {self.batch_size}; it must be at least 1.")


def run(
    config: RelevanceConfig,
    stage: StageDirectory,
    *,
    load: Callable[[], Loaded],
    collator: Callable[[Loaded], Collator],
    prompts: Prompts,
    labels: Sequence[QA],
) -> Selection:
    """Score every neuron on ``labels`` and select; returns the selection, also saved beside the scores."""
    if stage.done:
        return Selection.load(stage.file(SELECTION))
    from leaml_plugin.models import target_linears

    loaded = load()
    linears = target_linears(loaded.model, config.targets or None)
    by_criterion = score(config, loaded, collator(loaded), prompts, labels, linears)
    scores = by_criterion[config.criterion]
    if config.choice == "relevance":
        selection = select(scores, config.density, scope=config.scope)
    elif config.choice == "random":
        selection = random_selection(scores, config.density, seed=config.seed)
    else:
        selection = all_neurons(linears)
    scores.save(stage.file(SCORES))
    selection.save(stage.file(SELECTION))
    write_json(stage.file(HEATMAP), {**selection.heatmap(), **scores.heatmap(selection)})
    write_json(stage.file(OVERLAP), overlap(config, by_criterion))
    stage.finish()
    return selection


def score(
    config: RelevanceConfig,
    loaded: Loaded,
    collator: Collator,
    prompts: Prompts,
    labels: Sequence[QA],
    linears: dict[str, torch.nn.Module],
) -> dict[str, NeuronScores]:
    """The relevance of every neuron of ``linears`` for the QA loss over ``labels``, by criterion.

    All criteria come from one pass, the configured one first; the model is left as it was.
    """
    turns = []
    for qa in labels:
        if config.loss in ("generate", "both"):
            turns.append(prompts.generate_target(qa))
        if config.loss in ("vqa", "both"):
            turns.append(prompts.vqa(qa))
    model = loaded.model
    groups = None
    if config.granularity == "ffn":
        from leaml_plugin.models import ffn_groups

        groups = [[part for part in group if part] for group in ffn_groups(model)]
    model.eval()  # the score is of the model as it answers, without dropout
    criteria = (config.criterion, *(name for name in CRITERIA if name != config.criterion))
    batches = [turns[i : i + config.batch_size] for i in range(0, len(turns), config.batch_size)]
    with RelevanceScorer(
        linears, criteria, config.granularity, groups=groups, gradients="stream", freeze=model
    ) as scorer:
        for number, batch in enumerate(track(batches, "relevance", unit="batch")):
            seed_everything(config.seed, "relevance", number)
            with autocast("auto", loaded.device, loaded.dtype):
                loss = model(**loaded.to_device(collator(batch))).loss
            loss.backward()
            scorer.accumulate()
        return {name: scorer.scores(name) for name in criteria}


def overlap(config: RelevanceConfig, by_criterion: dict[str, NeuronScores]) -> dict[str, Any]:
    """How much the criteria agree: Jaccard index of their selections at the configured density, and by chance."""
    selections = {name: select(scores, config.density, scope=config.scope) for name, scores in by_criterion.items()}
    selections["random"] = random_selection(next(iter(by_criterion.values())), config.density, seed=config.seed)
    return {
        "names": list(selections),
        "jaccard": [[a.jaccard(b) for b in selections.values()] for a in selections.values()],
        "chance": config.density / (2 - config.density),
    }
