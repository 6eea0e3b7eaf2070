"""The one training loop: seeded, resumable bit for bit, shared by the stages that train.

Covers: which samples a step sees, the learning-rate schedule, several weighted objectives with accumulation,
clipping, checkpoints that a killed process resumes from, a log with one line a step.
Does not cover: what is trained and why (the stages decide and pass parameters, an optimizer and objectives).

Everything a step does is a function of (seed, step): the sample order comes from permutations drawn per epoch and
the global random state is seeded anew before each step. So a checkpoint needs the trained tensors, the optimizer
state and the step number, and no random state.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from leaml_plugin.artifacts import StageDirectory, StepLog, atomic_path
from leaml_plugin.errors import LeamlError, unknown_name
from leaml_plugin.models import to_device
from leaml_plugin.progress import Progress

if TYPE_CHECKING:
    from leaml_plugin.data import Collator, Turn

CHECKPOINT, LOG = "checkpoint.safetensors", "log.jsonl"
SCHEDULES = ("cosine", "linear", "constant")


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Attributes:
        steps: optimizer steps.
        batch_size: samples a step, over all streams of one objective.
        micro_batch: samples a forward pass; 0 takes the whole batch at once. The result differs only by rounding.
        lr, weight_decay, betas, eps: AdamW; decoupled decay.
        warmup: share of the steps over which the rate rises linearly.
        schedule: how the rate falls afterwards: "cosine" or "linear" to zero, or "constant".
        clip: largest global gradient norm; 0 turns clipping off.
        seed: of sample order and dropout.
        checkpoint_every: steps between checkpoints.
        gradient_checkpointing: trade time for memory.
        autocast: "auto" (bf16 on an accelerator for fp32 weights), "off" or "bf16".
    """

    steps: int = 300
    batch_size: int = 16
    micro_batch: int = 0
    lr: float = 1e-4
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    warmup: float = 0.05
    schedule: str = "cosine"
    clip: float = 1.0
    seed: int = 0
    checkpoint_every: int = 100
    gradient_checkpointing: bool = False
    autocast: str = "auto"

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise unknown_name("schedule", self.schedule, SCHEDULES)
        if self.autocast not in ("auto", "off", "bf16"):
            raise unknown_name("autocast mode", self.autocast, ("auto", "off", "bf16"))
        for name, least in (("steps", 1), ("batch_size", 1), ("micro_batch", 0), ("checkpoint_every", 1)):
            if getattr(self, name) < least:
                raise LeamlError(f"training: {name} is {getattr(self, name)}; it must be at least {least}.")
        for name in ("lr", "eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise LeamlError(f"training: {name} is {getattr(self, name)}; it must be positive.")
        for name in ("weight_decay", "clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise LeamlError(f"training: {name} is {getattr(self, name)}; it must not be negative.")
        if not 0 <= self.warmup <= 1:
            raise LeamlError(f"training: warmup is {self.warmup}; it is a share of the steps, from 0 to 1.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise LeamlError(f"training: betas are {list(self.betas)}; each must lie in [0, 1).")

    @property
    def adamw(self) -> dict[str, Any]:
        """The optimizer's keyword arguments, for ``torch.optim.AdamW`` and ``SparseAdamW`` alike."""
        return {"lr": self.lr, "betas": self.betas, "eps": self.eps, "weight_decay": self.weight_decay}

    def lr_factor(self, step: int) -> float:
        """The share of ``lr`` that step ``step`` (from 0) uses."""
        warm = max(1, round(self.warmup * self.steps)) if self.warmup > 0 else 0
        if step < warm:
            return (step + 1) / warm
        if self.schedule == "constant":
            return 1.0
        left = 1.0 - (step - warm) / max(1, self.steps - warm)
        return left if self.schedule == "linear" else 0.5 * (1.0 - math.cos(math.pi * left))


@dataclass(frozen=True)
class Stream:
    """Samples of one origin and how many of them a step takes; each epoch visits every sample once.

    ``skips``: a sample that cannot be read (a damaged picture among unlabelled ones) gives way to the next one of its
    epoch, instead of ending the training. Which one that is depends on the step and the seed alone.
    """

    name: str
    turns: Sequence[Turn]
    count: int
    skips: bool = False

    def take(self, step: int, seed: int) -> list[Turn]:
        return [self._turn(position, seed) for position in range(step * self.count, (step + 1) * self.count)]

    def take_readable(self, step: int, seed: int, read: Callable[[Turn], Any], label: str) -> list[Turn]:
        """As :meth:`take`, with what ``read`` raises a :class:`LeamlError` for replaced or, without ``skips``, raised.

        Raises:
            LeamlError: too many samples in a row cannot be read.
        """
        if not self.skips:
            return self.take(step, seed)
        out = []
        for position in range(step * self.count, (step + 1) * self.count):
            for further in range(min(len(self.turns), _IN_A_ROW)):
                turn = self._turn(position, seed, further)
                try:
                    read(turn)
                except LeamlError as error:
                    last = error
                    if turn.id not in _TOLD:
                        _TOLD.add(turn.id)
                        print(f"leaml: warning: {label}: left out: {error}", file=sys.stderr)
                    continue
                out.append(turn)
                break
            else:
                raise LeamlError(
                    f"{label}: of the stream {self.name!r} {further + 1} samples in a row cannot be read: {last}"
                )
        return out

    def _turn(self, position: int, seed: int, further: int = 0) -> Turn:
        n = len(self.turns)
        epoch, offset = divmod(position, n)
        return self.turns[int(_permutation(n, seed, self.name, epoch)[(offset + further) % n])]


_IN_A_ROW = 100
_TOLD: set[str] = set()  # samples whose absence was told already
_PERMUTATIONS: dict[tuple, torch.Tensor] = {}


def _permutation(n: int, seed: int, name: str, epoch: int) -> torch.Tensor:
    key = (n, seed, name, epoch)
    if key not in _PERMUTATIONS:
        if len(_PERMUTATIONS) > 16:
            _PERMUTATIONS.clear()
        digest = hashlib.sha256(f"{seed}/{name}/{epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        _PERMUTATIONS[key] = torch.randperm(n, generator=generator)
    return _PERMUTATIONS[key]


@dataclass(frozen=True)
class Objective:
    """A weighted language-modelling loss over the target tokens of some streams.

    ``after_backward`` runs once the gradients of this objective are there and before those of the next one are
    added: the place to restrict what this objective may move. Objectives run in the order given.
    """

    name: str
    streams: Sequence[Stream]
    weight: float = 1.0
    after_backward: Callable[[], None] | None = None


def seed_everything(*parts: Any) -> None:
    """Seed torch's global random state with a hash of the parts."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:7], "big"))


def train(
    model: nn.Module,
    collator: Collator,
    objectives: Sequence[Objective],
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    stage: StageDirectory,
    *,
    label: str,
    after_restore: Callable[[], None] = lambda: None,
) -> None:
    """Train ``parameters`` for ``config.steps`` steps, or the steps that a killed run left.

    Args:
        model: called as ``model(**batch)`` with labels; must return ``.loss``, the mean over the labelled tokens.
        parameters: name -> trained tensor; all that a checkpoint holds beside the optimizer state.
        optimizer: over the same parameters; the learning rate of its groups is set before each step.
        stage: checkpoints go to its work folder, the log to ``log.jsonl``.
        after_restore: called after a checkpoint was copied into ``parameters``.

    Raises:
        LeamlError: an objective without samples, or a loss that is not finite.
    """
    for objective in objectives:
        for stream in objective.streams:
            if not stream.turns:
                raise LeamlError(f"{label}: the stream {stream.name!r} of the {objective.name} loss has no samples.")
    device = next(iter(parameters.values())).device
    checkpoint = stage.work / CHECKPOINT
    first = _restore(checkpoint, parameters, optimizer) if checkpoint.exists() else 0
    if first:
        after_restore()
    log = StepLog(stage.file(LOG), first)
    base_lr = [group.get("initial_lr", config.lr) for group in optimizer.param_groups]

    was_training = model.training
    model.train()
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    bar = Progress(label, config.steps, unit="step", start=first)
    for step in range(first, config.steps):
        seed_everything(config.seed, label, step)
        optimizer.zero_grad(set_to_none=True)
        losses = {}
        for objective in objectives:
            turns, batches = _batches(collator, objective, config, step, label)
            losses[objective.name] = _backward(model, batches, objective, config, device)
            if not math.isfinite(losses[objective.name]):
                raise LeamlError(
                    f"{label}: the {objective.name} loss is {losses[objective.name]} at step {step} "
                    f"(samples {', '.join(turn.id for turn in turns[:3])} ...): lower lr or check these samples."
                )
            if objective.after_backward is not None:
                objective.after_backward()
        norm = None
        if config.clip > 0:
            norm = float(nn.utils.clip_grad_norm_(list(parameters.values()), config.clip))
        factor = config.lr_factor(step)
        for group, lr in zip(optimizer.param_groups, base_lr):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(lr * factor)
            else:
                group["lr"] = lr * factor
        optimizer.step()
        log.append({"step": step, "lr": config.lr * factor, "grad_norm": norm, **losses})
        bar.update(note=" ".join(f"{name} {value:.3f}" for name, value in losses.items()))
        if (step + 1) % config.checkpoint_every == 0 and step + 1 < config.steps:
            _save(checkpoint, parameters, optimizer, step + 1)
    bar.close()
    log.close()
    optimizer.zero_grad(set_to_none=True)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_disable()
    model.train(was_training)


def _batches(
    collator: Collator, objective: Objective, config: TrainConfig, step: int, label: str
) -> tuple[list[Turn], list[Mapping[str, torch.Tensor]]]:
    """The samples of a step and their forward passes."""

    def collate(turns: Sequence[Turn]) -> list[Mapping[str, torch.Tensor]]:
        size = config.micro_batch or len(turns)
        return [collator(turns[i : i + size]) for i in range(0, len(turns), size)]

    turns = [turn for stream in objective.streams for turn in stream.take(step, config.seed)]
    try:
        return turns, collate(turns)
    except LeamlError:
        if not any(stream.skips for stream in objective.streams):
            raise

    def read(turn: Turn) -> None:
        collator([turn])

    readable = [s.take_readable(step, config.seed, read, label) for s in objective.streams]
    turns = [turn for some in readable for turn in some]
    return turns, collate(turns)


def _backward(
    model: nn.Module,
    batches: Sequence[Mapping[str, torch.Tensor]],
    objective: Objective,
    config: TrainConfig,
    device: torch.device,
) -> float:
    """Add the gradients of one objective; return its unweighted loss, the mean over all target tokens of the step."""
    tokens = [int((batch["labels"] != -100).sum()) for batch in batches]
    total = 0.0
    for batch, n in zip(batches, tokens):
        share = n / sum(tokens)
        dtype = next(model.parameters()).dtype
        with autocast(config.autocast, device, dtype):
            loss = model(**to_device(batch, device, dtype)).loss
        if loss.requires_grad:  # false where nothing selected lies on the loss's path
            (loss * (objective.weight * share)).backward()
        total += float(loss.detach()) * share
    return total


def autocast(mode: str, device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """bf16 autocast where ``mode`` asks for it; "auto" means fp32 weights on an accelerator."""
    enabled = mode == "bf16" or (mode == "auto" and device.type != "cpu" and dtype == torch.float32)
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def _save(path: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, step: int) -> None:
    """One file, replaced atomically: tensors, and everything else as JSON in the safetensors metadata."""
    state = optimizer.state_dict()
    tensors = {f"parameter/{name}": p.detach() for name, p in parameters.items()}
    scalars: dict[str, dict[str, Any]] = {}
    for index, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                tensors[f"state/{index}/{name}"] = value
            else:
                scalars.setdefault(str(index), {})[name] = value
    groups = [{k: v.item() if isinstance(v, torch.Tensor) else v for k, v in g.items()} for g in state["param_groups"]]
    meta = {"step": step, "groups": groups, "scalars": scalars}
    with atomic_path(path) as temporary:
        save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, temporary, {"leaml": json.dumps(meta)})


def _restore(path: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
    """Copy a checkpoint into the parameters and the optimizer; return the number of finished steps."""
    state: dict[int, dict[str, Any]] = {}
    with safe_open(path, "pt") as f:
        meta = json.loads(f.metadata()["leaml"])
        found = {key.removeprefix("parameter/") for key in f.keys() if key.startswith("parameter/")}
        if found != set(parameters):
            raise LeamlError(f"{path} holds other parameters than this run trains: delete its folder and run again.")
        for key in f.keys():
            kind, rest = key.split("/", 1)
            if kind == "parameter":
                with torch.no_grad():
                    parameters[rest].copy_(f.get_tensor(key))
            else:
                index, name = rest.split("/", 1)
                state.setdefault(int(index), {})[name] = f.get_tensor(key)
    for index, values in meta["scalars"].items():
        state.setdefault(int(index), {}).update(values)
    groups = optimizer.state_dict()["param_groups"]
    for group, saved in zip(groups, meta["groups"]):
        for name, value in saved.items():
            if not isinstance(group.get(name), torch.Tensor):
                group[name] = tuple(value) if isinstance(group.get(name), tuple) else value
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    return meta["step"]


def config_dict(config: Any) -> dict[str, Any]:
    """A config dataclass, nested ones included, as JSON-serialisable data."""
    return json.loads(json.dumps(dataclasses.asdict(config)))
