"""AdamW for selected neurons: compact states, and everything that ``torch.optim`` users expect of an optimizer.

Covers: :class:`SparseAdamW`, a ``torch.optim.Optimizer`` over the kernels of ``leaml_plugin.ops``: parameter groups,
learning-rate schedulers, ``state_dict`` with compact states, ``GradScaler``, clipping, 8-bit states, change of the
selection during training.
Does not cover: which neurons (``selection``), and where compact gradients come from (``selective``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from leaml_plugin import ops
from leaml_plugin.errors import LeamlError


@dataclass
class BaseRows:
    """Where a compact parameter ``[k, fan]`` belongs: neurons ``index`` along ``axis`` of ``module.weight``.

    ``leaml_plugin.selective`` puts it on its parameters as ``leaml_base``. It reads weight and index from the module,
    because moving a model to another device replaces them.
    """

    module: nn.Module
    axis: int

    @property
    def index(self) -> Tensor:
        return self.module.selected_index

    @property
    def view(self) -> Tensor:
        """The base weight with its neurons along the first axis, sharing storage."""
        weight = self.module.weight.detach()
        return weight if self.axis == 0 else weight.t()

    @torch.no_grad()
    def read(self, index: Tensor | None = None) -> Tensor:
        """The base's neurons (default: the selected ones) as ``[k, fan]`` in the base's dtype."""
        return self.view.index_select(0, self.index if index is None else index.to(self.module.weight.device))

    @torch.no_grad()
    def write(self, values: Tensor, index: Tensor | None = None) -> None:
        """Put ``values`` ``[k, fan]`` into the base; every other weight keeps its bits."""
        weight = self.module.weight
        index = (self.index if index is None else index).to(weight.device)
        values = values.detach().to(weight.device, weight.dtype)
        weight.index_copy_(self.axis, index, values if self.axis == 0 else values.t())


class SparseAdamW(torch.optim.Optimizer):
    """AdamW (decoupled weight decay, AMSGrad off) that moves and keeps state for selected neurons only.

    Three kinds of parameter may be given, in any mixture:

    - those of :func:`leaml_plugin.attach`'s handle: compact ``[k, fan]`` masters with compact gradients. One pass
      steps the masters and writes the base's rows;
    - whole parameters with row indices, ``SparseAdamW([{"params": [w1, w2], "rows": [r1, r2]}])``: gradients are
      dense, states compact, other rows keep their bits. bf16 and fp16 weights get fp32 master rows, or stochastic
      rounding where ``master_weights`` is False (seeded by ``seed``, the row and its step);
    - whole parameters without indices: ordinary AdamW.

    Each neuron counts its own steps, so that one selected later gets the bias correction of its own age. Weight decay
    reaches the selected neurons only: an unselected neuron does not move at all.

    Args:
        params: parameters or parameter groups. ``rows`` in a group: one integer tensor ``[k]`` (or None: all rows)
            for each of its parameters.
        lr: a number or a one-element tensor, read on the device.
        betas, eps, weight_decay, maximize: as ``torch.optim.AdamW``.
        max_grad_norm: clip the gradients of all parameters together to this L2 norm inside the step, without
            writing them; ``grad_norm`` then holds the norm before clipping (fp32 device scalar). The norm is taken in
            fp32 whatever the gradients' dtype, and costs a read of them unless :meth:`use_squared_norm` gives it.
            None leaves clipping to the caller (``torch.nn.utils.clip_grad_norm_`` works as usual).
        eight_bit: states as block-wise 8-bit codes, 2 bytes a weight in place of 8.
        master_weights, seed: see above; handles always have masters.
        relevance: a criterion of ``ops.CRITERIA``: every step also adds the relevance of all rows of whole
            parameters to :meth:`relevance`, in the same pass, for selection that follows training.

    Steps are skipped on the device where ``GradScaler`` found infinities (``scaler.step(optimizer)``; the optimizer
    unscales by itself, ``scaler.unscale_`` is not needed for clipping by ``max_grad_norm``). Step counters live on
    the device and no step synchronises, so a CUDA graph can capture it after one step outside, which makes the states.

    Raises:
        LeamlError: rows out of range, repeated, or not one list per parameter; sharded parameters; a state_dict of
            other shapes.
    """

    _step_supports_amp_scaling = True  # torch.amp.GradScaler then sets grad_scale and found_inf for step()
    _squared_norm: tuple[Tensor, bool] | None = None  # what use_squared_norm() gave for the next step

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        max_grad_norm: float | None = None,
        eight_bit: bool = False,
        master_weights: bool = True,
        seed: int = 0,
        relevance: ops.Criterion | None = None,
    ):
        for name, value in (("lr", float(lr)), ("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise LeamlError(f"SparseAdamW: {name} must be at least 0, got {value}.")
        if not all(0 <= beta < 1 for beta in betas):
            raise LeamlError(f"SparseAdamW: betas must be at least 0 and below 1, got {betas}.")
        self.max_grad_norm, self.relevance_criterion = max_grad_norm, relevance
        self.grad_norm: Tensor | None = None
        self._every_row: dict[tuple[int, torch.device], Tensor] = {}
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "eight_bit": eight_bit,
            "master_weights": master_weights,
            "seed": seed,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As ``torch.optim.Optimizer``, with an optional list ``rows`` beside ``params``."""
        param_group = dict(param_group)
        rows = param_group.pop("rows", None)
        super().add_param_group(param_group)
        params = self.param_groups[-1]["params"]
        try:
            checked = _rows_of_group(params, rows)
        except LeamlError:
            self.param_groups.pop()  # a group that was refused must not be stepped, least of all with all its rows
            raise
        for p, index in zip(params, checked):
            if index is not None:
                self.state[p]["rows"] = index

    def __getstate__(self) -> dict[str, Any]:
        # torch copies and pickles the groups, their defaults and the states only
        own = {name: getattr(self, name) for name in ("max_grad_norm", "relevance_criterion", "grad_norm")}
        return {**super().__getstate__(), **own, "_every_row": {}, "_squared_norm": None}

    # -- the step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient. ``closure`` as in ``torch.optim``."""
        loss = None
        if closure is not None:
            self._squared_norm = None  # the closure makes other gradients than those that it was the norm of
            with torch.enable_grad():
                loss = closure()
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        clip = self._clip(grad_scale)
        for number, group in enumerate(self.param_groups):
            by_device: dict[torch.device, list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None and p.numel():
                    if p.grad.layout != torch.strided:
                        raise LeamlError("SparseAdamW takes dense gradients; this one is a sparse tensor.")
                    by_device.setdefault(p.device, []).append(p)
            for device, params in by_device.items():
                for with_relevance in (False, True):
                    some = [p for p in params if self._rides(p) == with_relevance]
                    if some:
                        self._step(some, group, number, device, with_relevance, clip, grad_scale, found_inf)
        return loss

    def _rides(self, p: nn.Parameter) -> bool:
        """Whether the step of ``p`` adds up relevance too: that of all rows needs a dense gradient."""
        return self.relevance_criterion is not None and not hasattr(p, "leaml_base")

    def _step(
        self,
        params: list[nn.Parameter],
        group: dict[str, Any],
        number: int,
        device: torch.device,
        with_relevance: bool,
        clip: Tensor | None,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        state = [self._state(p, group) for p in params]
        targets, rows, grads, masters, relevance = [], [], [], [], []
        no_master = torch.empty(0, dtype=torch.float32, device=device)
        for p, s in zip(params, state):
            base: BaseRows | None = getattr(p, "leaml_base", None)
            if base is not None:
                targets.append(base.view)
                rows.append(base.index)
                grads.append(p.grad)
                masters.append(p.detach())
            else:
                targets.append(_matrix(p.detach()))
                rows.append(s["rows"] if "rows" in s else self._all_rows(targets[-1]))
                grads.append(_matrix(p.grad))
                masters.append(s.get("master", no_master))
                if with_relevance:
                    if "relevance" not in s:
                        s["relevance"] = torch.zeros(targets[-1].shape[0], dtype=torch.float32, device=device)
                    relevance.append(s["relevance"])
        scales = None
        if group["eight_bit"]:
            scales = ([s["exp_avg_scale"] for s in state], [s["exp_avg_sq_scale"] for s in state])
        options = {
            "lr": group["lr"],
            "betas": group["betas"],
            "eps": group["eps"],
            "weight_decay": group["weight_decay"],
            "maximize": group["maximize"],
            "scales": scales,
            "masters": masters,
            "stochastic_rounding": not group["master_weights"],
            "seed": group["seed"] + number,
            "clip_coef": _on(clip, device),
            "grad_scale": _on(grad_scale, device),
            "found_inf": _on(found_inf, device),
        }
        tensors = (
            targets,
            rows,
            grads,
            [s["exp_avg"] for s in state],
            [s["exp_avg_sq"] for s in state],
            [s["step"] for s in state],
        )
        if with_relevance:
            ops.relevance_sparse_adamw_(*tensors, relevance, criteria=self.relevance_criterion, **options)
        else:
            ops.sparse_adamw_(*tensors, **options)
        if not torch.compiler.is_compiling():  # the masters changed too
            torch.autograd.graph.increment_version([p for p in params if hasattr(p, "leaml_base")])
        for p, target in zip(params, targets):
            if p.dim() > 2 and target.data_ptr() != p.data_ptr():
                p.copy_(target.view_as(p))

    def _state(self, p: nn.Parameter, group: dict[str, Any]) -> dict[str, Tensor]:
        state = self.state[p]
        if "step" not in state:
            matrix = _matrix(p.detach())
            handled = hasattr(p, "leaml_base")
            low = matrix.dtype != torch.float32
            rows = state["rows"] if "rows" in state else self._all_rows(matrix)
            state.update(
                ops.new_state(
                    matrix, rows, eight_bit=group["eight_bit"], master=group["master_weights"] and low and not handled
                )
            )
        return state

    def _all_rows(self, matrix: Tensor) -> Tensor:
        """``0 .. rows - 1`` on the matrix's device, made once for each size."""
        key = (matrix.shape[0], matrix.device)
        if key not in self._every_row:
            self._every_row[key] = torch.arange(matrix.shape[0], device=matrix.device)
        return self._every_row[key]

    def use_squared_norm(self, squared_norm: Tensor, *, unscaled: bool = False) -> None:
        """Clip the next step by a norm that is known already, so that it does not read the gradients for it.

        A relevance pass over the same gradients knows it: ``RelevanceScorer(..., gradients="keep").squared_norm``, or
        what ``ops.neuron_relevance_`` returns. Consumed by the next :meth:`step` (one that ``GradScaler`` skips too)
        and forgotten by :meth:`zero_grad`; every other step takes the norm itself. With a closure, call it inside.

        Args:
            squared_norm: floating point, one element, on any device: the squared L2 norm of the gradients of *all*
                parameters that the step moves, before clipping. It is read on its device, without synchronising.
            unscaled: True where it has been divided by ``GradScaler``'s squared scale (``neuron_relevance_`` was given
                ``grad_scale``); False where it is that of the gradients as they lie.

        Raises:
            LeamlError: the optimizer was made without ``max_grad_norm``, or ``squared_norm`` is not one number.
        """
        if self.max_grad_norm is None:
            raise LeamlError("use_squared_norm: SparseAdamW was made without max_grad_norm=..., so it clips nothing.")
        if not isinstance(squared_norm, Tensor) or squared_norm.numel() != 1 or not squared_norm.is_floating_point():
            got = squared_norm
            if isinstance(got, Tensor):
                got = f"{got.dtype} of shape {list(got.shape)}"
            raise LeamlError(f"use_squared_norm: wanted a floating-point tensor of one element, got {got}.")
        self._squared_norm = squared_norm.detach().reshape(()).to(torch.float32), unscaled

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As ``torch.optim.Optimizer``."""
        self._squared_norm = None
        super().zero_grad(set_to_none)

    def _clip(self, grad_scale: Tensor | None) -> Tensor | None:
        given, self._squared_norm = self._squared_norm, None
        if self.max_grad_norm is None:
            return None
        unscaled = False
        if given is not None:
            norm, unscaled = given[0].sqrt(), given[1]
        else:
            grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None and p.numel()]
            if not grads:
                return None
            norm = _total_norm(grads)
        self.grad_norm = norm if grad_scale is None or unscaled else norm / grad_scale.to(norm.device)
        return ops.clip_coefficient(self.grad_norm.square(), self.max_grad_norm)

    # -- selection that follows training

    def relevance(self, p: nn.Parameter) -> Tensor:
        """Relevance ``[out]`` (fp32) of all rows of ``p`` accumulated since the last :meth:`reselect`."""
        if self.relevance_criterion is None:
            raise LeamlError("SparseAdamW was made without relevance=...; it accumulates none.")
        state = self.state.get(p, {})
        if "relevance" in state:
            return state["relevance"]
        return torch.zeros(_matrix(p.detach()).shape[0], dtype=torch.float32, device=p.device)

    @torch.no_grad()
    def reselect(self, rows: Mapping[nn.Parameter, Tensor]) -> None:
        """Change the selected rows of whole parameters (a handle has its own ``reselect``).

        Surviving rows keep their state bit for bit, so an unchanged selection changes nothing; new rows start with
        none; dropped rows keep their weights. Relevance accumulated so far is cleared.
        """
        for p, index in rows.items():
            if "rows" not in self.state.get(p, {}):
                raise LeamlError("reselect: the parameter was not given with rows, or not to this optimizer.")
            new, state = _checked_rows(p, index), self.state[p]
            old = state["rows"]
            fresh = None
            if "master" in state:
                fresh = _matrix(p.detach()).index_select(0, new).float()
            self.remap(p, old, new, fresh)
            state["rows"] = new
            if "relevance" in state:
                state["relevance"].zero_()

    def remap(self, p: nn.Parameter, old: Tensor, new: Tensor, fresh_master: Tensor | None = None) -> None:
        """Carry the compact state of ``p`` from ascending rows ``old`` to ``new``.

        ``fresh_master``: what the master rows of newly selected neurons start from, ``[len(new), in]``.
        """
        state = self.state.get(p, {})
        names = [n for n in ("step", "exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale") if n in state]
        eight_bit = "exp_avg_scale" in state
        fill = [128 if eight_bit and n == "exp_avg" else 0 for n in names]
        for name, value in zip(names, ops.remap_rows(old, new, [state[n] for n in names], fill)):
            state[name] = value
        if "master" in state and fresh_master is not None:
            (kept,) = ops.remap_rows(old, new, [state["master"]], [float("nan")])
            survived = torch.isin(new, old).unsqueeze(1)
            state["master"] = torch.where(survived, kept, fresh_master)

    # -- saving

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As ``torch.optim.Optimizer``; states keep the dtype they were saved in (fp32 beside bf16 weights, codes).

        Selected rows are part of the state, so a run that changed its selection resumes with the changed one.

        Raises:
            LeamlError: a state that does not fit its parameter, naming it; ValueError: groups of other sizes. The
                optimizer is then as it was.
        """
        if any("eight_bit" not in group for group in state_dict["param_groups"]):
            raise LeamlError(
                "the optimizer state to load was not saved by SparseAdamW: "
                "its parameter groups lack settings, and its states are not laid out by selected rows."
            )
        saved = {
            key: {name: v for name, v in entry.items() if isinstance(v, Tensor)}
            for key, entry in state_dict["state"].items()
        }
        pairs = []
        for number, (group, theirs) in enumerate(zip(self.param_groups, state_dict["param_groups"])):
            for i, (p, key) in enumerate(zip(group["params"], theirs["params"])):
                pairs.append((p, key))
                called = group["param_names"][i] if "param_names" in group else f"{i} of group {number}"
                self._check_saved(p, saved.get(key, {}), theirs, f"parameter {called} ({list(p.shape)})")
        super().load_state_dict(state_dict)
        self._squared_norm = None
        for p, key in pairs:
            for name, value in saved.get(key, {}).items():
                self.state[p][name] = value.detach().to(device=p.device, copy=True)

    def _check_saved(self, p: nn.Parameter, entry: dict[str, Tensor], group: dict[str, Any], called: str) -> None:
        """Refuse a saved ``entry`` that ``p`` cannot be stepped with under the saved settings ``group``."""
        base: BaseRows | None = getattr(p, "leaml_base", None)
        if "rows" in self.state.get(p, {}) and "rows" not in entry:
            raise LeamlError(
                f"the optimizer state to load has no selected rows for {called}, which was given with rows: loading it "
                "would train all of them; give the parameter without rows, or make the state anew."
            )
        remedy = "load it into an optimizer over the parameters that it was saved from, or start with a new state"
        matrix = _matrix(p.detach())
        k, width = len(base.index) if base is not None else matrix.shape[0], matrix.shape[1]
        if "rows" in entry:
            if base is not None:
                raise LeamlError(
                    f"the optimizer state to load has row indices for {called}, which is compact already "
                    f"(leaml_plugin.attach): {remedy}."
                )
            try:
                rows = _checked_rows(p.detach(), entry["rows"])
            except LeamlError as error:
                raise LeamlError(f"the optimizer state to load does not fit {called}: {error} {remedy}.") from error
            if not torch.equal(rows, entry["rows"].to(rows)):  # the states lie in the order of their rows
                raise LeamlError(f"the optimizer state to load has rows of {called} that do not ascend: {remedy}.")
            k = len(rows)
        state, blocks = (torch.uint8 if group["eight_bit"] else torch.float32), ops.reference.blocks(width)
        wanted = {
            "step": (torch.float32, [k]),
            "exp_avg": (state, [k, width]),
            "exp_avg_sq": (state, [k, width]),
        }
        if group["eight_bit"]:
            wanted |= {name: (torch.float32, [k, blocks]) for name in ("exp_avg_scale", "exp_avg_sq_scale")}
        low = base is None and p.dtype != torch.float32
        if "master" in entry or (low and group["master_weights"]):
            wanted["master"] = (torch.float32, [k, width])
        if "relevance" in entry:
            wanted["relevance"] = (torch.float32, [matrix.shape[0]])
        if not entry.keys() - {"rows", "relevance"}:
            wanted = {name: shape for name, shape in wanted.items() if name in entry}  # saved before its first step
        for name, (dtype, shape) in wanted.items():
            value = entry.get(name)
            if value is None:
                why = f": the weights are {p.dtype} and master_weights is on" if name == "master" else ""
                raise LeamlError(f"the optimizer state to load lacks {name} for {called}{why}; {remedy}.")
            if value.dtype != dtype or list(value.shape) != shape:
                raise LeamlError(
                    f"the optimizer state to load has {name} as {value.dtype} {list(value.shape)} for {called}, "
                    f"wanted {dtype} {shape}: it was saved with another selection or from another model; {remedy}."
                )

    def state_bytes(self) -> int:
        """Bytes of the optimizer's states (moments, step counters, scales, master rows, row indices)."""
        return sum(v.numel() * v.element_size() for s in self.state.values() for v in s.values() if torch.is_tensor(v))


def _matrix(t: Tensor) -> Tensor:
    """A parameter of any shape as ``[rows, inputs]``: sharing storage, or a copy of a channels-last convolution."""
    if t.dim() == 2:
        return t
    return t.reshape(1, 1) if t.dim() == 0 else t.reshape(t.shape[0], -1) if t.dim() > 2 else t.unsqueeze(1)


def _rows_of_group(params: list[nn.Parameter], rows: Any) -> list[Tensor | None]:
    """What a group's ``rows`` say about each of its parameters, checked."""
    if any(hasattr(p, "placements") for p in params):
        raise LeamlError(
            "SparseAdamW cannot step sharded parameters (FSDP2, tensor parallel): use torch.optim.AdamW on the "
            "adapter's deltas, whose states are as compact."
        )
    if rows is None:
        return [None] * len(params)
    rows = [rows] if isinstance(rows, Tensor) else list(rows)
    if len(rows) != len(params):
        raise LeamlError(f"SparseAdamW: {len(params)} parameters but {len(rows)} row lists in one group.")
    return [None if index is None else _checked_rows(p, index) for p, index in zip(params, rows)]


def _total_norm(grads: list[Tensor]) -> Tensor:
    """The L2 norm of all gradients together, an fp32 scalar on the first one's device; nothing synchronises.

    ``torch.nn.utils.get_total_norm`` takes it in the gradients' dtype: fp16 gradients times a loss scale overflow to a
    norm of infinity, and so to a step of zero, and bf16 norms have 8 bits.
    """
    norms: list[Tensor] = []
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for grad in grads:
        if grad.device.type == "cpu" and grad.dim() > 1:
            # row by row: no slower than one reduction, whose running fp32 sums are off by 3e-4 at 10^7 weights
            inner = min(range(grad.dim()), key=lambda d: (grad.stride(d), -d))
            rows = torch.linalg.vector_norm(grad, dim=inner, dtype=torch.float32)
            norms.append(torch.linalg.vector_norm(rows))
        else:
            alike.setdefault((grad.device, grad.dtype), []).append(grad)  # one launch for each
    for some in alike.values():
        norms += torch._foreach_norm(some, 2.0, dtype=torch.float32)
    return torch.linalg.vector_norm(torch.stack([norm.to(grads[0].device) for norm in norms]))


def _on(scalar: Tensor | None, device: torch.device) -> Tensor | None:
    return scalar if scalar is None or scalar.device == device else scalar.to(device)


def _checked_rows(p: Tensor, index: Any) -> Tensor:
    index = torch.as_tensor(index)
    n = p.shape[0] if p.dim() else 1
    if index.dim() != 1 or index.is_floating_point() or index.dtype == torch.bool:
        raise LeamlError(f"rows must be a 1-D integer tensor, got {index.dtype} of shape {list(index.shape)}.")
    out = index.long().unique(sorted=True)
    if len(out) != len(index):
        raise LeamlError("rows lists a row twice.")
    if len(out) and (out[0] < 0 or out[-1] >= n):
        bad = int(out[0] if out[0] < 0 else out[-1])
        raise LeamlError(f"row {bad} is out of range: the parameter has {n} rows.")
    return out.to(p.device)
