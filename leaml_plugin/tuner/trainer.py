"""Selective training inside transformers' Trainer, and any subclass of it (TRL's SFTTrainer among them).

Covers: :class:`SelectiveTrainerMixin`, which scores, selects, attaches and steps in place, and
:class:`SelectiveTrainer`, the mixin on the plain Trainer. Checkpointing, exact resume, gradient accumulation, mixed
precision, activation checkpointing, ``torch.compile``, DDP and experiment trackers are the Trainer's own and stay so.
Does not cover: the adapter path, which needs no trainer of ours: give ``LeamlConfig`` to ``get_peft_model`` or to
``SFTTrainer(peft_config=...)``. FSDP and DeepSpeed shard the base; use the adapter path with them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from leaml_plugin.errors import LeamlError
from leaml_plugin.optim import SparseAdamW
from leaml_plugin.progress import track
from leaml_plugin.selection import RelevanceScorer, Selection, linears, select
from leaml_plugin.selective import INDEX, WEIGHT, Handle, attach
from leaml_plugin.tuner.convert import save_adapter

SELECTION = "selection.safetensors"


class SelectiveTrainerMixin:
    """Put in front of a Trainer class: ``class Mine(SelectiveTrainerMixin, SFTTrainer): ...``.

    Further arguments of the constructor:

    - ``selection``: which neurons learn. Default: scored before the first step, as the other arguments say;
    - ``targets``: Linear layers by name, or what :func:`leaml_plugin.selection.linears` takes (a regular expression or
      a list of name endings). Default: every Linear of the model that is not tied;
    - ``density``, ``criterion``, ``granularity``, ``scope``, ``groups``: as :class:`RelevanceScorer` and ``select``;
    - ``relevance_dataset``: what is scored, in batches of ``per_device_eval_batch_size``. Default: the training set.
      For selective distillation, score the labelled questions and train on the captions;
    - ``adamw``: further options of :class:`SparseAdamW`, e.g. ``{"eight_bit": True}``.

    Every checkpoint holds ``selection.safetensors`` and the fp32 master rows, so that a run resumes exactly, on any
    number of ranks. :meth:`save_model` writes an ordinary model; :meth:`save_adapter` the adapter.
    """

    def __init__(
        self,
        *args: Any,
        selection: Selection | None = None,
        targets: Mapping[str, nn.Module] | str | Iterable[str] | None = None,
        density: float = 0.05,
        criterion: str = "taylor",
        granularity: str = "row",
        scope: str = "layer",
        groups: Iterable[Any] | None = None,
        relevance_dataset: Any = None,
        adamw: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        if self.optimizer is not None or self.model_init is not None:
            raise LeamlError(
                "SelectiveTrainer makes its own optimizer for a given model; drop optimizers= and model_init=."
            )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise LeamlError("FSDP and DeepSpeed shard the base weights: train LeamlConfig as an adapter with them.")
        if not isinstance(targets, Mapping):
            targets = linears(self.model, targets)
        self._targets = dict(targets)
        self.selection, self.handle = selection, None
        self._select_options = {"density": density, "scope": scope}
        self._score_options = {"criterion": criterion, "granularity": granularity, "groups": groups}
        self._relevance_dataset, self._adamw = relevance_dataset, dict(adamw or {})

    def score(self) -> Selection:
        """Score the neurons on the relevance data with this trainer's loss and collator, and select."""
        dataset = self._relevance_dataset if self._relevance_dataset is not None else self.train_dataset
        model = self.accelerator.unwrap_model(self.model)
        was_training = model.training
        model.eval()  # no dropout: relevance is the model's own
        loader = self.get_eval_dataloader(dataset)
        with RelevanceScorer(self._targets, gradients="stream", freeze=model, **self._score_options) as scorer:
            for batch in track(loader, "scoring neurons", unit="batch"):
                inputs = self._prepare_inputs(batch)
                with self.compute_loss_context_manager():
                    loss = self.compute_loss(model, inputs)
                loss.backward()
                scorer.accumulate()
        model.train(was_training)
        return select(scorer.scores(), **self._select_options)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As the Trainer's, after selecting and attaching (a resumed run takes the selection of its checkpoint)."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise LeamlError(f"{self.args.output_dir}: has no checkpoint to resume from.")
        if self.handle is None:
            if resume_from_checkpoint:
                self.selection = Selection.load(os.path.join(resume_from_checkpoint, SELECTION))
            elif self.selection is None:
                self.selection = self.score()
            self.handle: Handle | None = attach(self.accelerator.unwrap_model(self.model), self.selection)
        return super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            args = self.args
            options = {
                "lr": args.learning_rate,
                "betas": (args.adam_beta1, args.adam_beta2),
                "eps": args.adam_epsilon,
                "weight_decay": args.weight_decay,
            }
            self.optimizer = SparseAdamW(self.handle.param_groups(), **{**options, **self._adamw})
        return self.optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.selection is not None and self.args.should_save:
            self.selection.save(Path(output_dir or self.args.output_dir) / SELECTION)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the tuned model as an ordinary one (inside checkpoints: with the master rows that resuming needs)."""
        if _internal_call or self.handle is None:
            super().save_model(output_dir, _internal_call=_internal_call)
            return
        state = self.accelerator.unwrap_model(self.model).state_dict()
        plain = {k: v for k, v in state.items() if not k.endswith((f".{WEIGHT}", f".{INDEX}"))}
        self._save(output_dir, state_dict=plain)

    def save_adapter(self, output_dir: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write the trained neurons as an adapter; arguments as :func:`leaml_plugin.tuner.save_adapter`."""
        if self.handle is None:
            raise LeamlError("nothing has been trained yet: call train() before save_adapter().")
        if self.is_world_process_zero():
            save_adapter(self.handle, output_dir, **kwargs)


class SelectiveTrainer(SelectiveTrainerMixin, Trainer):
    """transformers' Trainer that scores, selects and trains neurons in place. See :class:`SelectiveTrainerMixin`."""
