"""Which neurons matter: relevance scores, and a selection of neurons as a value.

Covers: accumulating per-neuron relevance while gradients of any loss on any ``nn.Module`` arrive
(:class:`RelevanceScorer`), the scores as a file (:class:`NeuronScores`), choosing neurons from them
(:func:`select`, and the controls :func:`random_selection` and :func:`all_neurons`), and the choice as a file that
can be compared and reused (:class:`Selection`).
Does not cover: the arithmetic on weights and gradients (``leaml_plugin.ops``) or training the chosen neurons
(``selective`` in place, ``tuner`` as an adapter).

A *neuron* is one output of a Linear: a row of ``nn.Linear.weight``, a column of a GPT-2 ``Conv1D`` weight. At FFN
granularity it is one hidden unit of a feed-forward block: its gate row, its up row and its down column together.

Source: LEAML (arXiv 2510.03232), stage 1: "gradient-based importance picks the QA-relevant neurons". The paper's exact
formula is not public, hence ``criterion``; the default is the first-order Taylor estimate of how much the loss changes
if the neuron is removed (Molchanov et al. 2019, arXiv 1906.10771, with |.| in place of the square).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from leaml_plugin import artifacts, ops
from leaml_plugin.errors import LeamlError, unknown_name

Granularity = Literal["row", "ffn"]
Scope = Literal["layer", "group", "model"]

GRANULARITIES = ("row", "ffn")
SCOPES = ("layer", "group", "model")

# ---------------------------------------------------------------------------------------------------------------
# Linear layers of any model


def is_linear(module: nn.Module) -> bool:
    """True for ``nn.Linear`` (and subclasses, quantised ones too) and for transformers' ``Conv1D`` (GPT-2)."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """True for transformers' ``Conv1D``, told by its shape so that transformers need not be imported."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "weight")


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """``(neurons, inputs)`` of a Linear or Conv1D, also where its weight is stored quantised."""
    if is_conv1d(module):
        return module.weight.shape[1], module.weight.shape[0]
    return module.out_features, module.in_features


def linears(model: nn.Module, pattern: str | Iterable[str] | None = None) -> dict[str, nn.Module]:
    """The Linear layers of ``model`` by name, in module order.

    ``pattern``: a regular expression that must match the whole name, or a collection of name endings
    (``["q_proj", "mlp.up_proj"]``) as PEFT's ``target_modules``; None takes every Linear whose weight is its own.
    A weight shared with another module (tied embeddings) is left out where ``pattern`` is None.

    Raises :class:`LeamlError` where the pattern matches no Linear, or names one whose weight is shared.
    """
    found = {name: m for name, m in model.named_modules() if name and is_linear(m)}
    if pattern is None:
        found = {name: m for name, m in found.items() if not shared_with(model, name)}
        if not found:
            raise LeamlError(f"{type(model).__name__} has no Linear layer of its own to score or tune.")
        return found
    if isinstance(pattern, str):
        try:
            chosen = {name: m for name, m in found.items() if re.fullmatch(pattern, name)}
        except re.error as error:
            raise LeamlError(f"target pattern {pattern!r} is no regular expression: {error}.") from error
    else:
        endings = tuple(pattern)
        chosen = {n: m for n, m in found.items() if any(n == e or n.endswith("." + e) for e in endings)}
    if not chosen:
        kinds = sorted({name.rpartition(".")[2] for name in found})
        raise LeamlError(
            f"target pattern {pattern!r} matches no Linear layer of {type(model).__name__}; "
            f"its Linear layers end in {', '.join(kinds) or '(there are none)'}."
        )
    for name in chosen:
        refuse_shared(model, name)
    return chosen


def shared_with(model: nn.Module, name: str) -> str | None:
    """The name of another parameter of ``model`` that is the same storage as ``name``'s weight, or None."""
    weight = getattr(model.get_submodule(name), "weight", None)
    if weight is None or weight.device.type == "meta":
        return None
    for other, p in model.named_parameters(remove_duplicate=False):
        same = p is weight or (p.numel() and p.device == weight.device and p.data_ptr() == weight.data_ptr())
        if same and other != f"{name}.weight":
            return other
    return None


def refuse_shared(model: nn.Module, name: str) -> None:
    """Raise :class:`LeamlError` where the weight of module ``name`` is tied to another parameter."""
    if other := shared_with(model, name):
        raise LeamlError(
            f"{name}.weight is tied to {other}: tuning its neurons would change both; "
            "leave this module out of the targets, or untie the weights first."
        )


def fingerprint(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """A digest of each module's weight: what tells one base model from another.

    The digest covers the shape and up to 1,024 evenly spaced weights rounded to bfloat16, so that the same checkpoint
    loaded in float32 and in bfloat16 gives the same digests, and a 7B model takes well under a second. Rounding by way
    of float16 gives other numbers, so those digests are marked ``h:`` and are compared among themselves only. Modules
    whose weight is quantised or not materialised (meta device) have no digest.
    """
    out = {}
    for name, module in modules.items():
        weight = getattr(module, "weight", None)
        if weight is None or not weight.is_floating_point() or weight.device.type == "meta":
            continue
        if tuple(weight.shape) not in (linear_shape(module), linear_shape(module)[::-1]):
            continue  # packed 8-bit float storage
        flat = weight.detach().reshape(-1)
        count = min(1024, flat.numel())
        index = torch.arange(count) * (flat.numel() - 1) // max(count - 1, 1)  # in integers: the same on any machine
        sample = flat[index.to(flat.device)].to(torch.bfloat16).cpu().view(torch.int16)
        digest = hashlib.sha256(repr(linear_shape(module)).encode())
        digest.update(sample.numpy().tobytes())
        out[name] = ("h:" if weight.dtype == torch.float16 else "") + digest.hexdigest()[:16]
    return out


def check_base(expected: Mapping[str, str], modules: Mapping[str, nn.Module], what: str) -> None:
    """Raise :class:`LeamlError` where a weight of ``modules`` is not the one that ``expected`` was computed on.

    Modules whose digests cannot be compared (quantised, meta device, float16 on one side) are passed over.
    """
    found = fingerprint({name: modules[name] for name in expected if name in modules})
    found = {name: d for name, d in found.items() if d.startswith("h:") == expected[name].startswith("h:")}
    wrong = [name for name, digest in found.items() if digest != expected[name]]
    if wrong:
        raise LeamlError(
            f"{what} was made for another base model: {len(wrong)} of {len(found)} target weights differ "
            f"(first: {wrong[0]}); load the base that it was trained on."
        )


# ---------------------------------------------------------------------------------------------------------------
# Scores


@dataclass(frozen=True)
class NeuronScores:
    """Relevance of every neuron: ``scores[name]`` is fp32 ``[neurons]`` on the CPU.

    ``name`` is a module name at row granularity, and the common parent of the block's modules at FFN granularity,
    where ``groups[name]`` is ``(gate, up, down)`` (or ``(up, down)`` for a block without a gate).
    ``micro_batches`` counts the backward passes summed, over all ranks. ``base`` is :func:`fingerprint` of the model.
    """

    scores: dict[str, Tensor]
    criterion: ops.Criterion = "taylor"
    granularity: Granularity = "row"
    micro_batches: int = 0
    base: dict[str, str] = field(default_factory=dict)
    groups: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file with the metadata as JSON; atomic, and byte-identical for equal scores."""
        meta = {
            "kind": "leaml.scores",
            "criterion": self.criterion,
            "granularity": self.granularity,
            "micro_batches": self.micro_batches,
            "base": self.base,
            "groups": {name: list(parts) for name, parts in self.groups.items()},
            "shapes": {name: list(s.shape) for name, s in self.scores.items()},
            "order": list(self.scores),
        }
        _write(path, dict(self.scores), meta)

    @classmethod
    def load(cls, path: str | os.PathLike[str], modules: Mapping[str, nn.Module] | None = None) -> NeuronScores:
        """Read :meth:`save`'s file; with ``modules``, also check that they are the base it was computed on."""
        tensors, meta = _read(path, "leaml.scores", "neuron scores")
        out = cls(
            scores={name: tensors[name] for name in meta["order"]},
            criterion=meta["criterion"],
            granularity=meta["granularity"],
            micro_batches=meta["micro_batches"],
            base=meta["base"],
            groups={name: tuple(parts) for name, parts in meta["groups"].items()},
        )
        if modules is not None:
            check_base(out.base, modules, f"{os.fspath(path)} ({out.criterion} scores)")
        return out

    def heatmap(self, selection: Selection | None = None) -> dict[str, list]:
        """Where the relevance lies, by layer and kind of module, as plain lists; axes as :meth:`Selection.heatmap`.

        ``relevance``: share of the model's total score in each cell (at FFN granularity each module of a block
        carries the block's score, so that the cells sum to more than 1). ``captured``, with a selection: share of the
        cell's own score that the selected neurons hold. None where there is no module.
        """
        total = sum(float(s.double().sum()) for s in self.scores.values())
        chosen = selection.rows | selection.columns if selection is not None else {}
        relevance: dict[str, float] = {}
        captured: dict[str, float] = {}
        for name, values in self.scores.items():
            mass = float(values.double().sum())
            for part in self.groups.get(name, (name,)):
                relevance[part] = mass
                if part in chosen:
                    captured[part] = float(values[chosen[part]].double().sum())
        layers, kinds, cells = _grid(relevance)

        def matrix(value: Callable[[list[str]], float | None]) -> list[list[float | None]]:
            return [[value(cells[y, x]) if (y, x) in cells else None for x in kinds] for y in layers]

        out = {"layers": layers, "kinds": kinds}
        out["relevance"] = matrix(lambda names: sum(relevance[n] for n in names) / total if total else 0.0)
        if selection is not None:
            out["captured"] = matrix(
                lambda names: sum(captured.get(n, 0.0) for n in names) / (sum(relevance[n] for n in names) or 1.0)
            )
        return out

    def __add__(self, other: NeuronScores) -> NeuronScores:
        """Scores over the micro-batches of both: ``grad_norm`` adds as norms per micro-batch like the others."""
        if (self.criterion, self.granularity, self.groups) != (other.criterion, other.granularity, other.groups):
            raise LeamlError(
                f"cannot add {other.criterion}/{other.granularity} scores to {self.criterion}/{self.granularity} "
                "scores: they measure different things."
            )
        if {n: s.shape for n, s in self.scores.items()} != {n: s.shape for n, s in other.scores.items()}:
            raise LeamlError("cannot add scores of different modules: names or neuron counts differ.")
        return replace(
            self,
            scores={name: s + other.scores[name] for name, s in self.scores.items()},
            micro_batches=self.micro_batches + other.micro_batches,
        )


class RelevanceScorer:
    """Accumulates the relevance of every neuron of ``linears`` over backward passes of any loss.

    Per micro-batch, with ``g`` the gradient of the loss by the neuron's weights ``w``::

        taylor      |sum w*g|      first-order change of the loss if the neuron is removed
        taylor_abs  sum |w*g|      the same, each weight on its own
        fisher      sum g^2        diagonal of the empirical Fisher information
        grad_norm   sqrt(sum g^2)  how far the neuron wants to move

    Several criteria cost no second pass: ``criterion=("taylor", "fisher")``, then ``scores("fisher")``.

    What is accumulated is the sum over micro-batches of the statistic *of each micro-batch*, not the statistic of the
    summed gradient. At a minimum of the loss the gradients of the batches cancel although each of them would move the
    neuron, so the statistic of the sum says least where the model is trained best. The sum of statistics is also
    additive: several ranks, a resumed run and one long run give the same scores for the same micro-batches. It
    therefore depends on the micro-batch size; use the same for scores that are to be compared.

    ``gradients`` says what becomes of the weights' gradients:

    - ``"free"``: :meth:`accumulate` reads them after the backward pass and then drops them;
    - ``"keep"``: :meth:`accumulate` reads and leaves them, for a step that follows. Clear them before the next
      micro-batch (``optimizer.zero_grad()``), or it is scored with the sum of both;
    - ``"stream"``: hooks score and drop each gradient as it arrives *during* the backward pass, so that only about one
      layer's weight gradient exists at a time. :meth:`accumulate` then ends the micro-batch.

    While the scorer is open the weights in ``linears`` require gradients; with ``freeze=model`` every other parameter
    of that model does not, which saves the memory of their gradients. :meth:`close` (or ``with``) restores both.

    At FFN granularity ``groups`` lists (gate, up, down) module names (gate None in a block without one) and the sums
    run over the unit's gate row, up row and down column together. (Up row and down column have the same sum of
    ``w*g``, both being the unit's activation times its gradient.)

    Score the model itself, not one wrapped in DDP: DDP averages the gradients of all ranks before they can be read,
    and :meth:`scores` sums over ranks anyway.

    NaN or infinite gradients make the neuron's score NaN or infinite; :func:`select` refuses such scores.

    The pass over the gradients also gives their norm, so that clipping need not read them again: ``squared_norm`` is
    the squared L2 norm (fp32 device scalar) of the gradients that the last :meth:`accumulate` scored, those of the
    weights in ``linears`` and of that micro-batch only; None before the first. Where the optimizer's parameters are
    these weights: ``optimizer.use_squared_norm(scorer.squared_norm)`` (:class:`leaml_plugin.SparseAdamW`).

    Raises :class:`LeamlError` for weights that are not floating point (quantised bases give no weight gradient),
    unknown names and options.
    """

    def __init__(
        self,
        linears: Mapping[str, nn.Module],
        criterion: ops.Criterion | Sequence[ops.Criterion] = "taylor",
        granularity: Granularity = "row",
        *,
        groups: Iterable[Sequence[str | None]] | None = None,
        gradients: Literal["free", "keep", "stream"] = "free",
        freeze: nn.Module | None = None,
    ):
        self.criteria = (criterion,) if isinstance(criterion, str) else tuple(criterion)
        for name in self.criteria:
            if name not in ops.CRITERIA:
                raise unknown_name("relevance criterion", name, ops.CRITERIA)
        if granularity not in GRANULARITIES:
            raise unknown_name("granularity", granularity, GRANULARITIES)
        if gradients not in ("free", "keep", "stream"):
            raise unknown_name("gradients option", gradients, ("free", "keep", "stream"))
        if not linears:
            raise LeamlError("no Linear layer to score: the target pattern matched nothing.")
        self.granularity, self.gradients = granularity, gradients
        self.micro_batches = 0
        self.squared_norm: Tensor | None = None
        self._norms: list[Tensor] = []  # of the parts of this micro-batch, scored since the last accumulate()
        self._groups = _name_groups(groups, linears) if granularity == "ffn" else {}
        used = {part for parts in self._groups.values() for part in parts} if self._groups else set(linears)
        self._modules = {name: m for name, m in linears.items() if name in used}
        for name, module in self._modules.items():
            if not is_linear(module):
                raise LeamlError(f"{name} is a {type(module).__name__}; only Linear and Conv1D layers have neurons.")
            if not module.weight.is_floating_point() or module.weight.dim() != 2:
                raise LeamlError(
                    f"{name}.weight is stored as {module.weight.dtype}: relevance needs weight gradients; "
                    "score the model in float32, bfloat16 or float16 and tune the quantised one."
                )
        self.base = fingerprint(self._modules)
        self._parts = self._groups or {name: (name,) for name in self._modules}
        self._key_of = {part: key for key, parts in self._parts.items() for part in parts}
        self._scores = {
            key: torch.zeros(
                len(self.criteria), linear_shape(first)[0], dtype=torch.float32, device=first.weight.device
            )
            for key, first in ((key, linears[parts[0]]) for key, parts in self._parts.items())
        }
        self._seen: set[str] = set()
        self._required: list[tuple[nn.Parameter, bool]] = []
        self._hooks: list[Any] = []
        self._open(freeze)

    # -- life cycle

    def _open(self, freeze: nn.Module | None) -> None:
        if freeze is not None:
            for p in freeze.parameters():
                self._required.append((p, p.requires_grad))
                p.requires_grad_(False)
        for name, module in self._modules.items():
            self._required.append((module.weight, module.weight.requires_grad))
            module.weight.requires_grad_(True)
            if self.gradients == "stream":
                self._hooks.append(module.weight.register_post_accumulate_grad_hook(self._stream_hook(name)))

    def close(self) -> None:
        """Remove the hooks, drop the gradients (unless kept) and restore ``requires_grad``. Scores stay readable."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for p, required in reversed(self._required):
            p.requires_grad_(required)
        self._required.clear()
        if self.gradients != "keep":
            self._drop(self._parts)

    def __enter__(self) -> RelevanceScorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- accumulation

    def _stream_hook(self, name: str) -> Callable[[Tensor], None]:
        key = self._key_of[name]

        def hook(_: Tensor) -> None:
            if all(self._grad(part) is not None for part in self._parts[key]):
                self._add([key])
                self._drop([key])

        return hook

    @torch.no_grad()
    def _add(self, keys: Iterable[str]) -> None:
        """Add the statistics of the gradients present under ``keys``, one op call per device."""
        by_device: dict[torch.device, list[str]] = {}
        for key in keys:
            by_device.setdefault(self._scores[key].device, []).append(key)
        for same in by_device.values():
            weights, dims, slots = [], [], []
            for slot, key in enumerate(same):
                for part in self._parts[key]:
                    if self._grad(part) is not None:
                        weights.append(self._modules[part].weight)
                        dims.append(self._axis(part))
                        slots.append(slot)
            norm = ops.neuron_relevance_(
                [w.detach() for w in weights],
                [w.grad for w in weights],
                [self._scores[key] for key in same],
                criteria=self.criteria,
                dims=dims,
                slots=slots,
            )
            self._seen.update(same)
            self._norms.append(norm)

    def _grad(self, name: str) -> Tensor | None:
        return self._modules[name].weight.grad

    def _drop(self, keys: Iterable[str]) -> None:
        for key in keys:
            for part in self._parts[key]:
                self._modules[part].weight.grad = None

    def accumulate(self) -> None:
        """End one micro-batch: to be called once after each ``backward()``.

        Raises :class:`LeamlError` where no gradient has arrived at any of the weights since the last call.
        """
        # in stream mode only FFN groups of which some part got no gradient are still waiting here
        self._add([key for key, parts in self._parts.items() if any(self._grad(p) is not None for p in parts)])
        if self.gradients != "keep":
            self._drop(self._parts)
        if not self._seen:
            raise LeamlError(
                "no gradient has reached any of the scored weights: call accumulate() once after each loss.backward(), "
                "with the model's parameters not frozen by torch.no_grad() or inference mode."
            )
        self._seen.clear()
        self.micro_batches += 1
        self.squared_norm = torch.stack([norm.to(self._norms[0].device) for norm in self._norms]).sum()
        self._norms.clear()

    # -- results

    def scores(self, criterion: ops.Criterion | None = None, *, reduce: bool = True) -> NeuronScores:
        """The scores so far, on the CPU, by ``criterion`` (default: the first that the scorer was made with).

        With ``reduce`` and ``torch.distributed`` initialised they are summed over ranks: every rank must call it
        then, and every rank gets the same result.
        """
        criterion = criterion or self.criteria[0]
        if criterion not in self.criteria:
            raise unknown_name("accumulated criterion", criterion, self.criteria)
        which = self.criteria.index(criterion)
        values = {name: s[which].clone() for name, s in self._scores.items()}
        count = self.micro_batches
        if reduce and torch.distributed.is_available() and torch.distributed.is_initialized():
            device = next(iter(values.values())).device
            flat = torch.cat([v.reshape(-1).to(device, torch.float64) for v in values.values()])
            total = torch.cat([flat, flat.new_tensor([count])])
            torch.distributed.all_reduce(total)
            count = int(total[-1].item())
            sizes = [v.numel() for v in values.values()]
            values = {n: v.float() for n, v in zip(values, total[:-1].split(sizes))}
        return NeuronScores(
            scores={name: v.cpu() for name, v in values.items()},
            criterion=criterion,
            granularity=self.granularity,
            micro_batches=count,
            base=self.base,
            groups=dict(self._groups),
        )

    def reset(self) -> None:
        """Forget all scores, the micro-batch count and the norm."""
        for s in self._scores.values():
            s.zero_()
        self.micro_batches = 0
        self.squared_norm = None
        self._seen.clear()
        self._norms.clear()

    def _axis(self, name: str) -> int:
        """The axis of the stored weight along which the neurons lie."""
        down = bool(self._groups) and self._parts[self._key_of[name]][-1] == name
        return int(down) ^ int(is_conv1d(self._modules[name]))


def _name_groups(groups: Iterable[Sequence[str | None]] | None, modules: Mapping[str, nn.Module]) -> dict[str, tuple]:
    """FFN groups keyed by their modules' common parent, checked: names exist, widths agree, none is used twice."""
    out: dict[str, tuple[str, ...]] = {}
    used: set[str] = set()
    for group in groups or ():
        parts = tuple(name for name in group if name is not None)
        if len(parts) not in (2, 3):
            raise LeamlError(f"an FFN group is (gate, up, down) or (up, down), got {parts!r}.")
        for name in parts:
            if name not in modules:
                raise unknown_name("module in an FFN group", name, modules)
            if name in used:
                raise LeamlError(f"module {name} is in two FFN groups.")
            used.add(name)
        widths = [linear_shape(modules[n])[0] for n in parts[:-1]] + [linear_shape(modules[parts[-1]])[1]]
        if len(set(widths)) != 1:
            raise LeamlError(f"FFN group {parts!r}: hidden widths {widths} differ; the last name must be the down one.")
        parents = {name.rpartition(".")[0] for name in parts}
        key = parents.pop() if len(parents) == 1 else parts[0]
        out[key if key and key not in out else parts[0]] = parts
    if not out:
        raise LeamlError("FFN granularity needs groups=[(gate, up, down), ...] and got none.")
    return out


# ---------------------------------------------------------------------------------------------------------------
# Selections


@dataclass(frozen=True)
class Selection:
    """A choice of neurons: ``rows[module]`` is a sorted int64 ``[k]`` of output rows, without repeats.

    ``columns[module]`` is the same for input columns, which only FFN granularity makes: the selected hidden units of
    a block are rows of gate and up and columns of down. A module is in one of both, never in two. ``sizes[module]``
    is how many neurons there were to choose from; modules without a selected neuron stay listed with ``k = 0``.
    ``base`` is :func:`fingerprint` of the model that was scored (a selection may be used on another model of the same
    shapes: :meth:`validate` checks shapes always, the fingerprint only on request).
    """

    rows: dict[str, Tensor]
    columns: dict[str, Tensor] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    criterion: str = ""
    scope: str = ""
    granularity: str = "row"
    base: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for kind, index in (("rows", self.rows), ("columns", self.columns)):
            for name, value in index.items():
                value = torch.as_tensor(value).detach().cpu()
                if value.dim() != 1 or value.is_floating_point() or value.dtype == torch.bool:
                    raise LeamlError(
                        f"selection of {name}: {kind} must be a 1-D integer tensor, "
                        f"got {value.dtype} of shape {list(value.shape)}."
                    )
                index[name] = value.long().unique(sorted=True)
                if len(index[name]) != len(value):
                    raise LeamlError(f"selection of {name}: {kind} lists a neuron twice.")
                size = self.sizes.get(name)
                if len(value) and (value.min() < 0 or (size is not None and value.max() >= size)):
                    bad = int(value.min() if value.min() < 0 else value.max())
                    raise LeamlError(
                        f"selection of {name}: {kind[:-1]} {bad} is out of range"
                        + (f", the module has {size} neurons." if size is not None else ".")
                    )
        if both := sorted(set(self.rows) & set(self.columns)):
            raise LeamlError(f"selection of {both[0]}: a module may have selected rows or columns, not both.")

    # -- what is selected

    def __iter__(self):
        """``(module, axis, index)`` of every module with a selected neuron; axis 0 for rows, 1 for columns."""
        for axis, chosen in ((0, self.rows), (1, self.columns)):
            for name, index in chosen.items():
                if len(index):
                    yield name, axis, index

    def counts(self) -> dict[str, int]:
        """Selected neurons per module."""
        return {name: len(i) for name, i in (self.rows | self.columns).items()}

    @property
    def density(self) -> float:
        """Selected share of all neurons that there were to choose from (each FFN unit counts once per module)."""
        total = sum(self.sizes.values())
        return sum(self.counts().values()) / total if total else 0.0

    def overlap(self, other: Selection) -> dict[str, float]:
        """Jaccard index per module that both selections know: 1 the same neurons, 0 none in common.

        Two empty choices overlap by 1. Chance level for two random choices of density d is about ``d / (2 - d)``.
        """
        mine, theirs = self.rows | self.columns, other.rows | other.columns
        out = {}
        for name in mine:
            if name in theirs:
                a, b = set(mine[name].tolist()), set(theirs[name].tolist())
                out[name] = len(a & b) / len(a | b) if a | b else 1.0
        return out

    def jaccard(self, other: Selection) -> float:
        """Jaccard index of all selected neurons pooled."""
        mine = {(n, i) for n, _, index in self for i in index.tolist()}
        theirs = {(n, i) for n, _, index in other for i in index.tolist()}
        return len(mine & theirs) / len(mine | theirs) if mine | theirs else 1.0

    def heatmap(self) -> dict[str, list]:
        """Selected share by layer and kind of module, as plain lists for a report that imports no torch.

        ``{"layers": ["0", "1", ...], "kinds": ["self_attn.q_proj", ...], "share": [[share or None]]}`` with one row
        of ``share`` per layer. A layer is the part of the name up to its first number (``model.layers.3``); names
        without a number form a layer of their own, called ``""``.
        """
        counts = self.counts()
        layers, kinds, cells = _grid(counts)

        def share(names: list[str]) -> float:
            return sum(counts[n] for n in names) / max(sum(self.sizes.get(n, 0) for n in names), 1)

        matrix = [[share(cells[y, x]) if (y, x) in cells else None for x in kinds] for y in layers]
        return {"layers": layers, "kinds": kinds, "share": matrix}

    # -- against a model

    def validate(self, model: nn.Module, *, same_base: bool = False) -> dict[str, nn.Module]:
        """The selected modules of ``model`` by name, after checking names, kinds and shapes.

        With ``same_base`` also that their weights are those that were scored. Raises :class:`LeamlError`.
        """
        modules = dict(model.named_modules())
        out = {}
        for name, axis, index in self:
            if name not in modules:
                raise unknown_name("selected module", name, modules)
            if not is_linear(modules[name]):
                raise LeamlError(f"selected module {name} is a {type(modules[name]).__name__}, no Linear or Conv1D.")
            size = linear_shape(modules[name])[axis]
            if int(index[-1]) >= size or self.sizes.get(name, size) != size:
                raise LeamlError(
                    f"the selection of {name} is for {self.sizes.get(name, 'more than ' + str(int(index[-1])))} "
                    f"neurons with {('row', 'column')[axis]} {int(index[-1])} selected, the module has {size}: "
                    "it was made for another model."
                )
            out[name] = modules[name]
        if not out:
            raise LeamlError("the selection is empty: no neuron of any module is selected.")
        if same_base:
            check_base(self.base, out, "the selection")
        return out

    # -- as a file

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file (int32 indices) with the metadata as JSON; atomic and reproducible."""
        tensors = {f"rows.{n}": i.int() for n, i in self.rows.items()}
        tensors |= {f"columns.{n}": i.int() for n, i in self.columns.items()}
        meta = {
            "kind": "leaml.selection",
            "criterion": self.criterion,
            "scope": self.scope,
            "granularity": self.granularity,
            "sizes": self.sizes,
            "base": self.base,
            "order": list(tensors),
        }
        _write(path, tensors, meta)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Selection:
        tensors, meta = _read(path, "leaml.selection", "a neuron selection")
        rows, columns = {}, {}
        for key in meta["order"]:
            kind, _, name = key.partition(".")
            (rows if kind == "rows" else columns)[name] = tensors[key].long()
        return cls(rows, columns, meta["sizes"], meta["criterion"], meta["scope"], meta["granularity"], meta["base"])


def split_layer(name: str) -> tuple[str, str]:
    """``model.layers.3.mlp.up_proj`` → ``("model.layers.3", "mlp.up_proj")``; no number → ``("", name)``."""
    parts = name.split(".")
    for i, part in enumerate(parts[:-1]):
        if part.isdigit():
            return ".".join(parts[: i + 1]), ".".join(parts[i + 1 :])
    return "", name


def _grid(names: Iterable[str]) -> tuple[list[str], list[str], dict[tuple[str, str], list[str]]]:
    """Module names arranged by layer and kind: ``(layers, kinds, {(layer, kind): names})``, in order of appearance."""
    cells: dict[tuple[str, str], list[str]] = {}
    for name in names:
        cells.setdefault(split_layer(name), []).append(name)
    return list(dict.fromkeys(y for y, _ in cells)), list(dict.fromkeys(x for _, x in cells)), cells


def _group_of(name: str) -> str:
    return split_layer(name)[1]


def select(
    scores: NeuronScores, density: float, scope: Scope = "layer", *, group: Callable[[str], str] = _group_of
) -> Selection:
    """The most relevant share ``density`` (0 < density <= 1) of the neurons; ties go to the lower index.

    ``scope`` is the pool from which the share is taken: ``"layer"``, each scored module on its own (every module gets
    at least one neuron); ``"group"``, all modules of one kind (``self_attn.q_proj`` of all layers; ``group`` maps a
    module name to its kind); ``"model"``, all neurons of the model, so that layers compete. A pool of n neurons gives
    ``ops.selected_count(density, n)``: rounded, at least one.

    Raises :class:`LeamlError` for a density outside (0, 1], unknown scopes, and scores that are NaN or infinite.
    """
    if scope not in SCOPES:
        raise unknown_name("selection scope", scope, SCOPES)
    _check_density(density)
    for name, s in scores.scores.items():
        if not torch.isfinite(s).all():
            bad = int((~torch.isfinite(s)).sum())
            raise LeamlError(
                f"{bad} of {s.numel()} scores of {name} are NaN or infinite: the gradients overflowed; "
                "score in bfloat16 or float32, or with a smaller loss scale."
            )
    names = list(scores.scores)
    kinds = [group(name) for name in names] if scope == "group" else None
    ids = [list(dict.fromkeys(kinds)).index(kind) for kind in kinds] if kinds is not None else None
    chosen = dict(zip(names, ops.select_top(list(scores.scores.values()), density, scope=scope, groups=ids)))
    return _expand(scores, chosen, scope)


def random_selection(like: NeuronScores | Selection, density: float | None = None, *, seed: int = 0) -> Selection:
    """Neurons drawn at random: the control that any relevance criterion must beat.

    ``like`` a :class:`Selection`: as many neurons of each module as it has (``density`` must be None), so that only
    the choice differs and not where the capacity lies. ``like`` :class:`NeuronScores`: share ``density`` per layer.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(k: int, n: int) -> Tensor:
        return torch.randperm(n, generator=generator)[:k].sort().values

    if isinstance(like, NeuronScores):
        if density is None:
            raise LeamlError("random_selection from scores needs a density.")
        _check_density(density)
        drawn = {n: draw(ops.selected_count(density, s.numel()), s.numel()) for n, s in like.scores.items()}
        return replace(_expand(like, drawn, "layer"), criterion="random")
    if density is not None:
        raise LeamlError("random_selection like a selection takes its counts; leave density out.")
    if like.granularity == "row":
        rows = {n: draw(len(i), like.sizes[n]) for n, i in like.rows.items()}
        return replace(like, rows=rows, criterion="random")
    # the modules of one FFN block share their units: draw once for each set of modules that was chosen alike
    draws: dict[tuple, Tensor] = {}

    def drawn_for(name: str, index: Tensor) -> Tensor:
        key = (split_layer(name)[0], tuple(index.tolist()))
        if key not in draws:
            draws[key] = draw(len(index), like.sizes[name])
        return draws[key].clone()

    return replace(
        like,
        rows={n: drawn_for(n, i) for n, i in like.rows.items()},
        columns={n: drawn_for(n, i) for n, i in like.columns.items()},
        criterion="random",
    )


def all_neurons(modules: Mapping[str, nn.Module]) -> Selection:
    """Every row of every module: full fine-tuning of these Linears as a selection (density 1)."""
    sizes = {name: linear_shape(m)[0] for name, m in modules.items()}
    rows = {name: torch.arange(n) for name, n in sizes.items()}
    return Selection(rows, sizes=sizes, criterion="all", scope="model", base=fingerprint(modules))


def _check_density(density: float) -> None:
    if not (isinstance(density, (int, float)) and 0 < density <= 1 and math.isfinite(density)):
        raise LeamlError(f"density must be above 0 and at most 1 (a share of the neurons), got {density!r}.")


def _expand(scores: NeuronScores, chosen: dict[str, Tensor], scope: str) -> Selection:
    """Chosen units per scored name → rows and columns per module."""
    rows, columns, sizes = {}, {}, {}
    for name, index in chosen.items():
        parts = scores.groups.get(name)
        n = scores.scores[name].numel()
        for part in parts[:-1] if parts else (name,):
            rows[part], sizes[part] = index.clone(), n
        if parts:
            columns[parts[-1]], sizes[parts[-1]] = index.clone(), n
    return Selection(rows, columns, sizes, scores.criterion, scope, scores.granularity, dict(scores.base))


# ---------------------------------------------------------------------------------------------------------------
# Files: safetensors with one JSON metadata entry


def _write(path: str | os.PathLike[str], tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    data = save({n: t.contiguous().cpu() for n, t in tensors.items()}, metadata={"leaml": json.dumps(meta)})
    with artifacts.atomic_path(Path(path)) as temporary:
        temporary.write_bytes(data)


def _read(path: str | os.PathLike[str], kind: str, what: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            meta = json.loads((file.metadata() or {}).get("leaml", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError as error:
        raise LeamlError(f"{os.fspath(path)}: no such file; expected {what}.") from error
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise LeamlError(f"{os.fspath(path)}: cannot be read as safetensors ({error}).") from error
    if meta.get("kind") != kind:
        raise LeamlError(f"{os.fspath(path)}: holds {meta.get('kind', 'no LEAML metadata')}, wanted {what}.")
    return tensors, meta
