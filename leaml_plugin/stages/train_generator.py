"""Stage 2, the QA generator: QA loss on the labels, caption distillation on the unlabelled pictures.

The generator is the MLLM itself, trained to write a question and its answer for a picture. The teacher's captions of
the unlabelled pictures regularise it: they carry the look of the new domain. Captions may move only the selected
neurons (LEAML, selective neuron distillation), so that the generator gains the domain and keeps its language.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from leaml_plugin.artifacts import StageDirectory
from leaml_plugin.errors import LeamlError, unknown_name
from leaml_plugin.optim import SparseAdamW
from leaml_plugin.records import QA, Picture
from leaml_plugin.selection import Selection
from leaml_plugin.selective import attach
from leaml_plugin.sequences import Chosen, Mapped
from leaml_plugin.training import Objective, Stream, TrainConfig, train

if TYPE_CHECKING:
    from leaml_plugin.data import Collator, Prompts
    from leaml_plugin.models import Loaded

ADAPTER, MODEL = "adapter", "model"
UPDATES = ("selected", "all")
TASKS = ("generate", "both")


@dataclass(frozen=True)
class GeneratorConfig:
    """How the QA generator is trained.

    Attributes:
        train: the loop; ``batch_size`` counts the labelled samples of a step.
        caption_batch: captioned pictures of a step; 0 takes as many as labelled samples.
        qa_weight, caption_weight: weights of the two losses; a caption weight of 0 turns distillation off.
        qa_task: what the QA loss asks for: "both", writing question and answer, and answering plain questions, in equal
            parts, as the verify stage needs; or "generate", the first alone.
        qa_updates: what the QA loss may move: the "selected" neurons, or "all" parameters. Captions move the
            selected neurons in either case.
    """

    train: TrainConfig = field(default_factory=TrainConfig)
    caption_batch: int = 0
    qa_weight: float = 1.0
    caption_weight: float = 1.0
    qa_task: str = "both"
    qa_updates: str = "selected"

    def __post_init__(self):
        if self.qa_updates not in UPDATES:
            raise unknown_name("choice of what the QA loss updates", self.qa_updates, UPDATES)
        if self.qa_task not in TASKS:
            raise unknown_name("QA task", self.qa_task, TASKS)
        if self.qa_task == "both" and self.train.batch_size < 2:
            raise LeamlError(
                'generator: qa_task "both" takes a sample of either task for a step: set --batch-size to at least 2 '
                "(--micro-batch 1 saves memory)."
            )
        if self.caption_batch < 0:
            raise LeamlError(f"generator: caption_batch is {self.caption_batch}; it must not be negative.")
        if self.qa_weight <= 0 or self.caption_weight < 0:
            raise LeamlError("generator: qa_weight must be positive and caption_weight must not be negative.")


def run(
    config: GeneratorConfig,
    stage: StageDirectory,
    *,
    load: Callable[[], Loaded],
    collator: Callable[[Loaded], Collator],
    prompts: Prompts,
    labels: Sequence[QA],
    pictures: Sequence[Picture],
    selection: Selection,
) -> dict[str, Path]:
    """Train the generator; returns where its weights are, as keyword arguments of ``models.load``."""
    result = {"adapter": stage.file(ADAPTER)} if config.qa_updates == "selected" else {"path": stage.file(MODEL)}
    if stage.done:
        return result
    loaded = load()
    model = loaded.model
    stored = model.dtype
    qa_turns = [prompts.generate_target(qa) for qa in labels]
    captioned = Chosen(pictures, (n for n, picture in enumerate(pictures) if picture.caption))
    caption_turns = Mapped(captioned, prompts.caption)
    asked = config.train.batch_size // 2 if config.qa_task == "both" else 0
    streams = [Stream("labels", qa_turns, config.train.batch_size - asked)]
    if asked:
        streams.append(Stream("questions", [prompts.vqa(qa) for qa in labels], asked))
    qa = Objective("qa", streams, config.qa_weight)
    objectives = [qa]
    distils = config.caption_weight > 0
    if distils and not caption_turns:
        raise LeamlError("generator: no picture has a caption; give --captions, or set generator.caption_weight=0.")
    captions = Stream("captions", caption_turns, config.caption_batch or config.train.batch_size, skips=True)

    for p in model.parameters():
        p.requires_grad_(config.qa_updates == "all")
    if config.qa_updates == "selected":
        handle = attach(model, selection)
        parameters = dict(handle.named_parameters())
        optimizer: torch.optim.Optimizer = SparseAdamW(handle.param_groups(), **config.train.adamw)
        if distils:
            objectives = [Objective("caption", [captions], config.caption_weight), qa]
    else:
        model.float()  # AdamW on bf16 weights loses most small updates; stored as it was loaded
        parameters = dict(model.named_parameters())
        optimizer = torch.optim.AdamW(parameters.values(), fused=True, **config.train.adamw)
        if distils:
            # Captions come first: their gradients are cut down to the selected neurons before QA adds its own.
            keep = masks(selection, parameters)
            objectives = [
                Objective("caption", [captions], config.caption_weight, lambda: restrict(parameters, keep)),
                qa,
            ]
    train(
        model,
        collator(loaded),
        objectives,
        parameters,
        optimizer,
        config.train,
        stage,
        label="generator",
        after_restore=handle.sync if config.qa_updates == "selected" else lambda: None,
    )
    if config.qa_updates == "selected":
        from leaml_plugin.tuner import save_adapter

        handle.detach()
        save_adapter(handle, stage.file(ADAPTER), base_model_name_or_path=loaded.path)
    else:
        from leaml_plugin.models import save

        save(model.to(stored), loaded.processor, stage.file(MODEL))
    stage.finish()
    return result


def masks(selection: Selection, parameters: dict[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    """Parameter name -> mask that broadcasts over the weight and is 1 for the selected neurons, else 0."""
    keep = {}
    for name, axis, index in selection:
        weight = parameters[f"{name}.weight"]
        shape = [1, 1]
        shape[axis] = weight.shape[axis]
        mask = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        mask.view(-1)[index.to(weight.device)] = 1
        keep[f"{name}.weight"] = mask
    return keep


def restrict(parameters: dict[str, torch.nn.Parameter], keep: dict[str, torch.Tensor]) -> None:
    """Drop every gradient but those of the neurons in ``keep`` (from :func:`masks`)."""
    for name, p in parameters.items():
        if p.grad is None:
            continue
        if name in keep:
            p.grad.mul_(keep[name])
        else:
            p.grad = None
