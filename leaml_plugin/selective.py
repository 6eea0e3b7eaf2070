"""Training the selected neurons in place: no adapter, no cost in the forward pass, compact gradients.

Covers: :func:`attach`, which makes the Linear layers of any model compute the weight gradient of their selected
neurons only, and the :class:`Handle` that gives those neurons to an optimizer and takes everything off again.
Does not cover: which neurons (``selection``), the optimizer (``optim``), the adapter that is loaded by PEFT
(``tuner``), FSDP and ZeRO-3, which shard the base's rows away from the tuned ones (use ``tuner.LeamlConfig`` there).

The whole loop, on any ``nn.Module`` and any loss::

    >>> import torch
    >>> from leaml_plugin import RelevanceScorer, SparseAdamW, attach, select
    >>> from leaml_plugin.selection import linears
    >>> model, x, y = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4)), torch.ones(2, 8), 0.5
    >>> with RelevanceScorer(linears(model)) as scorer:
    ...     (model(x) - y).square().mean().backward()
    ...     scorer.accumulate()
    >>> handle = attach(model, select(scorer.scores(), density=0.25))
    >>> optimizer = SparseAdamW(handle.parameters(), lr=1e-2)
    >>> for _ in range(20):
    ...     loss = (model(x) - y).square().mean()
    ...     loss.backward(); optimizer.step(); optimizer.zero_grad()
    >>> handle.detach()

How it works: each target module gets a parameter ``selected_weight``, the fp32 copy ``[k, fan]`` of its selected
neurons (the master weights where the base is bf16 or fp16), which is what optimizer, clipping, DDP and ``state_dict``
see. The forward pass uses the whole base weight as before. The backward pass computes ``[k, fan]`` gradients. After
each step of any ``torch.optim.Optimizer`` the new values are written into the base's rows: by ``SparseAdamW`` in the
pass that takes the step, for any other optimizer by a hook on its step. Where neither runs (weights changed by hand,
an optimizer that is no ``torch.optim.Optimizer``) call :meth:`Handle.sync`.

Memory beside the frozen base: ``k * fan`` times 4 bytes of weights, 4 of gradient, and the optimizer's states.
Not trained: biases, and every parameter that is not selected (``attach`` freezes them; thaw what else should learn).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

from leaml_plugin import ops
from leaml_plugin.errors import LeamlError
from leaml_plugin.optim import BaseRows, SparseAdamW
from leaml_plugin.selection import Selection, fingerprint, is_conv1d, refuse_shared

WEIGHT, INDEX = "selected_weight", "selected_index"


class _SelectedLinear(torch.autograd.Function):
    """``F.linear`` whose backward gives ``[k, fan]`` for the selected neurons in place of ``[out, in]``."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, selected: Tensor, index: Tensor, axis: int) -> Tensor:
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, weight, _, _, index, axis = inputs
        ctx.axis = axis
        needed = x if axis == 0 else x.index_select(-1, index)  # columns need the selected inputs only
        ctx.save_for_backward(needed, weight, index)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        x, weight, index = ctx.saved_tensors
        grad_x = grad_bias = grad_selected = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ weight.to(grad.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        if ctx.needs_input_grad[3]:
            if ctx.axis == 0:
                grad_selected = ops.selected_weight_grad(x, grad, index)
            else:
                grad_selected = x.reshape(-1, x.shape[-1]).t() @ grad.reshape(-1, grad.shape[-1])
        return grad_x, None, grad_bias, grad_selected, None, None


class _Selective:
    """What :func:`attach` adds to a Linear (or Conv1D) by changing its class; the weight stays where it is."""

    selected_weight: nn.Parameter
    selected_index: Tensor
    selected_axis: int

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and not hasattr(self.selected_weight, "leaml_base"):
            self.link()  # a deep copy of the model has new parameters
        kind = x.device.type
        if torch.is_autocast_enabled(kind) and x.is_floating_point():
            x = x.to(torch.get_autocast_dtype(kind))
        weight = self.weight.t() if self._leaml_transposed else self.weight
        return _SelectedLinear.apply(
            x, weight, self.bias, self.selected_weight, self.selected_index, self.selected_axis
        )

    def link(self) -> BaseRows:
        """Tie ``selected_weight`` to this module's base weight, for optimizers to find."""
        self.selected_weight.leaml_base = BaseRows(self, self.selected_axis ^ int(self._leaml_transposed))
        return self.selected_weight.leaml_base

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        loaded = state_dict.get(prefix + INDEX)
        if loaded is not None and not torch.equal(loaded.cpu(), self.selected_index.cpu()):
            raise LeamlError(
                f"the checkpoint has other neurons of {prefix[:-1]} selected than the model; "
                "attach the selection that it was trained with first."
            )
        super()._load_from_state_dict(state_dict, prefix, *args)
        base = self.link()
        if prefix + WEIGHT in state_dict:
            base.write(self.selected_weight)
        elif prefix + "weight" in state_dict:
            rows = base.read()
            with torch.no_grad():  # masters that agree with the loaded base keep their precision
                changed = self.selected_weight.to(rows.dtype) != rows
                self.selected_weight.copy_(torch.where(changed, rows.float(), self.selected_weight))


class SelectiveLinear(_Selective, nn.Linear):
    """An ``nn.Linear`` of which only the selected neurons get a weight gradient."""

    _leaml_plain, _leaml_transposed = nn.Linear, False


@functools.cache
def _selective_class(kind: type[nn.Module]) -> type[nn.Module]:
    if kind is nn.Linear:
        return SelectiveLinear
    members = {"_leaml_plain": kind, "_leaml_transposed": not issubclass(kind, nn.Linear)}
    return type(f"Selective{kind.__name__}", (_Selective, kind), members)


def _write_back(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """After a step of any optimizer: write the tuned neurons that it moved into their base weights."""
    if isinstance(optimizer, SparseAdamW):
        return  # has written them in the same pass
    for group in optimizer.param_groups:
        for p in group["params"]:
            base: BaseRows | None = getattr(p, "leaml_base", None)
            if base is not None:
                base.write(p)


@functools.cache
def _watch_optimizers() -> None:
    """Register :func:`_write_back` with torch, once in a process and not before something is attached."""
    register_optimizer_step_post_hook(_write_back)


class Handle:
    """What :func:`attach` returns: the selected neurons of a model as parameters. See the module's docstring.

    ``selection`` is the current selection, ``modules`` the target modules by name, ``base`` the fingerprint of their
    weights before training. Usable as a context manager that
    detaches at its end.
    """

    def __init__(self, model: nn.Module, selection: Selection, *, freeze: bool = True):
        targets = selection.validate(model)
        for name, module in targets.items():
            _refuse(model, name, module)
        self.model, self.selection = model, selection
        self.modules: dict[str, nn.Module] = {}
        self.base: dict[str, str] = {}
        self._required: list[tuple[nn.Parameter, bool]] = []
        self._originals: dict[str, tuple[Tensor, Tensor]] = {}
        if freeze:
            self._freeze(model.parameters())
        self._axes: dict[str, int] = {}
        self._attached = True
        self._final: dict[str, tuple[int, Tensor, Tensor]] | None = None
        for name, axis, index in selection:
            self._attach(name, targets[name], axis, index)
        _watch_optimizers()

    # -- parameters

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """``(module name, fp32 [k, fan])`` of each target; ``fan`` is inputs for rows, outputs for columns."""
        for name, module in self.modules.items():
            yield name, module.selected_weight

    def parameters(self) -> Iterator[nn.Parameter]:
        """The tuned neurons, for any ``torch.optim.Optimizer``."""
        for _, p in self.named_parameters():
            yield p

    def param_groups(self, options: Callable[[str], dict[str, Any]] | None = None) -> list[dict[str, Any]]:
        """Parameter groups; ``options(module name)`` gives a module's settings, e.g. ``{"lr": 1e-4}``.

        Modules with equal settings share a group.
        """
        groups: list[tuple[dict[str, Any], list[nn.Parameter]]] = []
        for name, p in self.named_parameters():
            chosen = options(name) if options is not None else {}
            for known, params in groups:
                if known == chosen:
                    params.append(p)
                    break
            else:
                groups.append((chosen, [p]))
        return [{"params": params, **chosen} for chosen, params in groups]

    # -- the base's rows

    def sync(self) -> None:
        """Write the tuned neurons into the base. Optimizer steps do this by themselves."""
        for module in self.modules.values():
            module.link().write(module.selected_weight)

    def delta(self) -> dict[str, tuple[int, Tensor, Tensor]]:
        """What training changed: ``{module: (axis, index [k], tuned - original fp32 [k, fan])}``, on the CPU.

        Covers every neuron that was ever selected, so that ``original + delta`` is the tuned model also after
        :meth:`reselect`; axis 0 are output rows, 1 input columns.
        """
        if self._final is not None:
            return self._final
        out = {}
        for name, (index, original) in self._originals.items():
            module = self.modules[name]
            tuned = module.link().read(index).float().cpu()
            # the masters are more precise than the base's own rows
            tuned[torch.searchsorted(index, module.selected_index.cpu())] = (
                module.selected_weight.detach().float().cpu()
            )
            out[name] = (self._axes[name], index, tuned - original.float())
        return out

    def detach(self, restore: bool = False) -> None:
        """Turn the targets back into plain Linears, with the tuned neurons left in them.

        ``restore`` puts the original neurons back instead. ``requires_grad`` of all parameters is as before
        :func:`attach`. :meth:`delta` stays available. Does nothing the second time.
        """
        if not self._attached:
            return
        self.sync()
        self._final = self.delta()
        for name, module in self.modules.items():
            if restore:
                index, original = self._originals[name]
                module.link().write(original, index)
            del module.selected_weight, module.selected_index, module.selected_axis
            module.__class__ = module._leaml_plain
        for p, required in reversed(self._required):
            p.requires_grad_(required)
        self._originals.clear()
        self._attached = False

    def reselect(self, selection: Selection, optimizer: SparseAdamW | None = None) -> None:
        """Change the neurons that learn. Neurons dropped keep their tuned values in the base.

        Surviving neurons keep their master weights and, where ``optimizer`` is the :class:`SparseAdamW` in use, their
        optimizer state; new ones start with none. With an unchanged selection this changes nothing numerically.
        Gradients are dropped. Modules that had no selected neuron before join the optimizer's last group. Wrap the
        model in DDP again afterwards: its buckets have the old shapes.
        """
        if not self._attached:
            raise LeamlError("reselect: the handle has been detached.")
        optimizer = getattr(optimizer, "optimizer", optimizer)  # inside accelerate's wrapper, which the HF Trainer has
        if not isinstance(optimizer, SparseAdamW | None):
            raise LeamlError(
                f"reselect: the states of {type(optimizer).__name__} cannot follow other neurons; "
                "pass the SparseAdamW in use, or None and make a new optimizer afterwards."
            )
        targets = selection.validate(self.model)
        chosen = {}
        for name, axis, index in selection:
            if name not in self.modules:
                _refuse(self.model, name, targets[name])
            elif axis != self._axes[name]:
                raise LeamlError(f"{name} has been trained by {('rows', 'columns')[self._axes[name]]}; keep that axis.")
            chosen[name] = index
        for name in list(self.modules):
            self._reindex(name, chosen.get(name, torch.empty(0, dtype=torch.int64)), optimizer)
        for name, axis, index in selection:
            if name not in self.modules:
                self._attach(name, targets[name], axis, index)
                if optimizer is not None:
                    optimizer.param_groups[-1]["params"].append(targets[name].selected_weight)
        self.selection = selection

    # -- inside

    def _freeze(self, parameters: Iterable[nn.Parameter]) -> None:
        for p in parameters:
            self._required.append((p, p.requires_grad))
            p.requires_grad_(False)

    def _attach(self, name: str, module: nn.Module, axis: int, index: Tensor) -> None:
        self._freeze([module.weight])
        self.base |= fingerprint({name: module})
        index = index.to(module.weight.device)
        module.__class__ = _selective_class(type(module))
        module.selected_axis = axis
        module.register_buffer(INDEX, index)
        module.selected_weight = nn.Parameter(torch.empty(0))
        rows = module.link().read()
        module.selected_weight = nn.Parameter(rows.to(torch.float32, copy=True))
        module.link()
        self.modules[name], self._axes[name] = module, axis
        self._originals[name] = (index.cpu(), rows.detach().cpu().clone())

    def _reindex(self, name: str, new: Tensor, optimizer: SparseAdamW | None) -> None:
        module = self.modules[name]
        p, old = module.selected_weight, module.selected_index
        new = new.to(old.device)
        if torch.equal(new, old):
            p.grad = None
            return
        base = module.link()
        base.write(p)
        known, original = self._originals[name]
        extra = new.cpu()[~torch.isin(new.cpu(), known)]
        if len(extra):  # remember what the newcomers were before training
            both, order = torch.cat([known, extra]).sort()
            self._originals[name] = (both, torch.cat([original, base.read(extra).cpu()])[order])
        (kept,) = ops.remap_rows(old, new, [p.detach()], [0.0])
        survived = torch.isin(new, old).unsqueeze(1)
        if optimizer is not None:
            optimizer.remap(p, old, new)
        module.selected_index = new
        p.grad = None
        # a graph that is still alive (the `loss` of a training loop) holds autograd's note of the old shape, which
        # would refuse gradients of the new one; autograd drops its note only where the dtype changes
        p.data = p.data.new_empty(0, dtype=torch.float16)
        p.data = torch.where(survived, kept, base.read().float())

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()


def attach(model: nn.Module, selection: Selection, *, freeze: bool = True) -> Handle:
    """Make the selected neurons of ``model`` trainable in place, and nothing else.

    Each selected Linear (rows: output neurons; columns: input neurons, at FFN granularity) then computes the weight
    gradient of its selected neurons only, ``[k, fan]`` in the compute dtype, accumulated in fp32. Works under
    autocast, gradient checkpointing, ``torch.compile`` and DDP. Selected base weights may be fp32, bf16 or fp16.

    ``freeze``: all other parameters stop requiring gradients until :meth:`Handle.detach`; with False only the target
    weights do.

    Raises :class:`LeamlError` for a selection that does not fit the model, an empty one, tied, quantised or sharded
    weights, a module with a forward of its own, and one that is attached already.
    """
    return Handle(model, selection, freeze=freeze)


def _refuse(model: nn.Module, name: str, module: nn.Module) -> None:
    """Raise :class:`LeamlError` for a module that cannot be tuned in place."""
    if isinstance(module, _Selective):
        raise LeamlError(f"{name} has selected neurons attached already; detach that handle first, or reselect it.")
    plain = type(module).forward is nn.Linear.forward or is_conv1d(module)
    if not plain or "forward" in vars(module) or not module.weight.is_floating_point() or module.weight.dim() != 2:
        raise LeamlError(
            f"{name} is a {type(module).__name__} with a forward pass of its own (quantised, adapted or hooked): "
            "tune it through the adapter (leaml_plugin.LeamlConfig), which leaves the base opaque."
        )
    if hasattr(module.weight, "placements"):
        raise LeamlError(
            f"{name}.weight is sharded (FSDP2, tensor parallel): its neurons lie on several ranks; "
            "tune it through the adapter (leaml_plugin.LeamlConfig)."
        )
    if module.weight.device.type == "meta":
        raise LeamlError(f"{name}.weight has not been loaded yet (meta device).")
    refuse_shared(model, name)
