"""Stage 5, OOD VQA fine-tuning: the VQA model learns from the labels and the kept pseudo-QA pairs together.

What is trained is an option: every parameter, the selected neurons, or a LoRA through peft. Without pseudo-QA pairs
this is plain fine-tuning on the labels, the baseline that LEAML has to beat.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from leaml_plugin.artifacts import StageDirectory, write_text
from leaml_plugin.config import check_pattern
from leaml_plugin.errors import LeamlError, unknown_name
from leaml_plugin.optim import SparseAdamW
from leaml_plugin.records import QA
from leaml_plugin.selection import Selection
from leaml_plugin.selective import attach
from leaml_plugin.sequences import Mapped
from leaml_plugin.training import Objective, Stream, TrainConfig, train

if TYPE_CHECKING:
    from leaml_plugin.data import Collator, Prompts
    from leaml_plugin.models import Loaded

ADAPTER, MODEL = "adapter", "model"
MODES = ("full", "selected", "lora")


@dataclass(frozen=True)
class FinetuneConfig:
    """How the VQA model is trained.

    Attributes:
        train: the loop; ``batch_size`` counts labelled and pseudo-labelled samples together.
        mode: "full", "selected" (the selected neurons only) or "lora".
        pseudo_share: the largest share of every batch that is pseudo-labelled. Where there are fewer pairs than that
            share of all questions, they take the share that they have: many labels are not to learn half the time
            from a few pairs. At least one sample of either kind.
        lora_rank, lora_alpha, lora_dropout: of the "lora" mode.
        targets: regular expression over module names for "lora"; empty: the language model's Linears.
    """

    train: TrainConfig = field(default_factory=TrainConfig)
    mode: str = "selected"
    pseudo_share: float = 0.5
    lora_rank: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    targets: str = ""

    def __post_init__(self):
        if self.mode not in MODES:
            raise unknown_name("fine-tuning mode", self.mode, MODES)
        if not 0 < self.pseudo_share < 1:
            raise LeamlError(f"finetune: pseudo_share is {self.pseudo_share}; it must lie between 0 and 1.")
        if self.lora_rank < 1:
            raise LeamlError(f"finetune: lora_rank is {self.lora_rank}; it must be at least 1.")
        if not 0 <= self.lora_dropout < 1:
            raise LeamlError(f"finetune: lora_dropout is {self.lora_dropout}; it must lie in [0, 1).")
        check_pattern("finetune.targets", self.targets)


def run(
    config: FinetuneConfig,
    stage: StageDirectory,
    *,
    load: Callable[[], Loaded],
    collator: Callable[[Loaded], Collator],
    prompts: Prompts,
    labels: Sequence[QA],
    pseudo: Sequence[QA] = (),
    selection: Selection | None = None,
) -> dict[str, Path]:
    """Train the VQA model; returns where its weights are, as keyword arguments of ``models.load``."""
    result = {"path": stage.file(MODEL)} if config.mode == "full" else {"adapter": stage.file(ADAPTER)}
    if stage.done:
        return result
    loaded = load()
    model = loaded.model
    stored = model.dtype
    after_restore: Callable[[], None] = lambda: None  # noqa: E731
    if config.mode == "selected":
        if selection is None:
            raise LeamlError('finetune: mode "selected" needs the selection of the relevance stage.')
        handle = attach(model, selection)
        parameters = dict(handle.named_parameters())
        optimizer: torch.optim.Optimizer = SparseAdamW(handle.param_groups(), **config.train.adamw)
        after_restore = handle.sync
    else:
        if config.mode == "lora":
            model = _lora(model, config)
        else:
            model.float()  # AdamW on bf16 weights loses most small updates; stored as it was loaded
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(parameters.values(), fused=True, **config.train.adamw)

    train(
        model,
        collator(loaded),
        [Objective("vqa", _streams(config, prompts, labels, pseudo))],
        parameters,
        optimizer,
        config.train,
        stage,
        label="finetune",
        after_restore=after_restore,
    )
    if config.mode == "selected":
        from leaml_plugin.tuner import save_adapter

        handle.detach()
        save_adapter(handle, stage.file(ADAPTER), base_model_name_or_path=loaded.path)
    elif config.mode == "lora":
        model.save_pretrained(stage.file(ADAPTER))
        _sort_adapter_config(stage.file(ADAPTER))
    else:
        from leaml_plugin.models import save

        save(model.to(stored), loaded.processor, stage.file(MODEL))
    stage.finish()
    return result


def _streams(config: FinetuneConfig, prompts: Prompts, labels: Sequence[QA], pseudo: Sequence[QA]) -> list[Stream]:
    batch = config.train.batch_size
    if pseudo and batch < 2:
        raise LeamlError("finetune: labels and pseudo-labels share every batch; set train.batch_size to at least 2.")
    share = min(config.pseudo_share, len(pseudo) / (len(pseudo) + len(labels))) if pseudo else 0.0
    from_pseudo = min(batch - 1, max(1, round(share * batch))) if pseudo else 0
    streams = [Stream("labels", [prompts.vqa(qa) for qa in labels], batch - from_pseudo)]
    if from_pseudo:
        streams.append(Stream("pseudo", Mapped(pseudo, prompts.vqa), from_pseudo, skips=True))
    return streams


def _lora(model: torch.nn.Module, config: FinetuneConfig) -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model

    from leaml_plugin.models import target_linears

    torch.manual_seed(config.train.seed)  # of the random A matrices
    return get_peft_model(
        model,
        LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=list(target_linears(model, config.targets or None)),
        ),
    )


def _sort_adapter_config(path: Path) -> None:
    """peft writes sets as lists in hash order, which differs from process to process; equal runs give equal bytes."""
    file = path / "adapter_config.json"
    data = json.loads(file.read_text())
    for name, value in data.items():
        if isinstance(value, list) and all(isinstance(v, str) for v in value):
            data[name] = sorted(value)
    write_text(file, json.dumps(data, indent=2, sort_keys=True) + "\n")
