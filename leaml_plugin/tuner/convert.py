"""Adapters as files: from tuned weights and back, into a merged model, into LoRA.

Covers: :func:`save_adapter` (from the in-place path), :func:`load_delta`, :func:`selection_of`, :func:`diff` (base
and tuned model → adapter), :func:`merge` (base + adapter → model), :func:`export_lora`, :func:`hotswap`, and
:func:`max_logit_difference`, the check that each of them can be held to.
Does not cover: loading an adapter onto a model for use; that is PEFT's ``PeftModel.from_pretrained``.

A *delta* is ``{module: (axis, index int64 [k], values fp32 [k, fan])}``, what :meth:`Handle.delta` returns: rows
(axis 0) or columns (axis 1) of a Linear's weight, and what is added to them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from leaml_plugin import artifacts
from leaml_plugin.errors import LeamlError
from leaml_plugin.models import no_bars
from leaml_plugin.selection import Selection, check_base, fingerprint, is_conv1d, is_linear, linear_shape
from leaml_plugin.selective import Handle
from leaml_plugin.tuner.config import LeamlConfig
from leaml_plugin.tuner.layer import LeamlLayer

Delta = Mapping[str, tuple[int, Tensor, Tensor]]

PREFIX = "base_model.model."


# ---------------------------------------------------------------------------------------------------------------
# Delta ↔ files


def save_adapter(
    source: Handle | Delta,
    output: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
    base: Mapping[str, str] | None = None,
    base_model_name_or_path: str | None = None,
    task_type: str | None = None,
    criterion: str = "",
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a delta as an adapter that PEFT loads: ``adapter_model.safetensors`` and ``adapter_config.json``.

    Args:
        source: the handle of an in-place training (also after ``detach``), or a delta.
        output: the directory; created, and its two files replaced if they are there.
        model: with a delta, the *base* model (for sizes, fingerprint and name); a handle knows its own.
        base: fingerprint of the base, where neither a handle nor ``model`` can give it.
        base_model_name_or_path: what ``AutoPeftModel`` loads as the base. Default: the model's own name or path.
        task_type: PEFT's, e.g. ``"CAUSAL_LM"``.
        criterion: what the neurons were selected by, for the record.
        dtype: of the stored delta. fp32 reproduces the training's masters; bf16 halves the file and rounds.

    Raises:
        LeamlError: the delta is empty, or not finite.
    """
    if isinstance(source, Handle):
        delta, model = source.delta(), source.model
        base, criterion = source.base, criterion or source.selection.criterion
        sizes = {name: linear_shape(source.modules[name])[axis] for name, (axis, _, _) in delta.items()}
    else:
        delta = source
        modules = dict(model.named_modules()) if model is not None else {}
        sizes = {name: linear_shape(modules[name])[axis] for name, (axis, _, _) in delta.items() if name in modules}
        if base is None:
            base = fingerprint({name: modules[name] for name in delta if name in modules})
    delta = {name: entry for name, entry in delta.items() if len(entry[1])}
    if not delta:
        raise LeamlError("there is nothing to save: no neuron of any module was tuned.")
    tensors: dict[str, Tensor] = {}
    for name, (_, index, values) in delta.items():
        if not torch.isfinite(values).all():
            raise LeamlError(f"the tuned neurons of {name} are NaN or infinite: training diverged, nothing was saved.")
        tensors[f"{PREFIX}{name}.leaml_delta"] = values.to(dtype).contiguous()
        tensors[f"{PREFIX}{name}.leaml_index"] = index.long().contiguous()
    config = LeamlConfig(
        row_counts={name: len(index) for name, (axis, index, _) in delta.items() if axis == 0},
        column_counts={name: len(index) for name, (axis, index, _) in delta.items() if axis == 1},
        sizes=sizes,
        base=dict(base),
        criterion=criterion,
        base_model_name_or_path=base_model_name_or_path or _name_or_path(model),
        task_type=task_type,
        inference_mode=True,
    )
    mapping = None
    if task_type is None and model is not None and type(model).__module__.startswith("transformers."):
        mapping = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    _write(Path(output), config, tensors, mapping)
    return Path(output)


def load_delta(adapter: str | os.PathLike[str]) -> tuple[dict[str, tuple[int, Tensor, Tensor]], LeamlConfig]:
    """The delta in an adapter directory (fp32, CPU) and its configuration. Raises :class:`LeamlError`."""
    config, tensors = _read(Path(adapter))
    if not isinstance(config, LeamlConfig):
        raise LeamlError(f"{os.fspath(adapter)}: is a {config.peft_type.value} adapter, wanted a LEAML one.")
    delta = {}
    for axis, counts in ((0, config.row_counts), (1, config.column_counts)):
        for name, k in counts.items():
            try:
                index = tensors[f"{PREFIX}{name}.leaml_index"].long()
                values = tensors[f"{PREFIX}{name}.leaml_delta"].float()
            except KeyError as error:
                raise LeamlError(
                    f"{os.fspath(adapter)}: has no tensor {error.args[0]}; the file is incomplete."
                ) from error
            size = config.sizes.get(name)
            if len(index) != k or len(values) != k:
                raise LeamlError(f"{os.fspath(adapter)}: {name} has {len(index)} neurons, its configuration says {k}.")
            if k and (int(index.min()) < 0 or (size is not None and int(index.max()) >= size)):
                raise LeamlError(f"{os.fspath(adapter)}: neuron {int(index.max())} of {name} is out of range ({size}).")
            delta[name] = (axis, index, values)
    return delta, config


def selection_of(adapter: str | os.PathLike[str]) -> Selection:
    """The neurons that a LEAML adapter tunes, to be compared, drawn, or tuned further."""
    delta, config = load_delta(adapter)
    return Selection(
        {name: index for name, (axis, index, _) in delta.items() if axis == 0},
        {name: index for name, (axis, index, _) in delta.items() if axis == 1},
        sizes=dict(config.sizes),
        criterion=config.criterion,
        granularity="ffn" if config.column_counts else "row",
        base=dict(config.base),
    )


@torch.no_grad()
def apply_delta(model: nn.Module, delta: Delta, *, base: Mapping[str, str] | None = None) -> None:
    """Add a delta to the weights of ``model`` in place, in fp32 and rounded once. With ``base``: check it first.

    Raises :class:`LeamlError` before anything is changed where a module is missing, no plain Linear, or of another
    shape, or where a weight is not the one with the fingerprint in ``base``.
    """
    modules = dict(model.named_modules())
    for name, (axis, index, values) in delta.items():
        module = modules.get(name)
        if module is None:
            raise LeamlError(
                f"the adapter tunes {name}, which the model does not have: it belongs to another base model."
            )
        if not is_linear(module) or not module.weight.is_floating_point():
            raise LeamlError(
                f"{name} is a {type(module).__name__}; a delta can be merged into plain Linear layers only."
            )
        size, fan = linear_shape(module)[:: 1 if axis == 0 else -1]
        if values.shape[1] != fan or (len(index) and int(index.max()) >= size):
            raise LeamlError(f"the adapter does not fit {name} ({size} x {fan}): it belongs to another base model.")
    if base:
        check_base(base, modules, "the adapter")
    for name, (axis, index, values) in delta.items():
        weight, stored = modules[name].weight, axis ^ int(is_conv1d(modules[name]))
        index = index.to(weight.device)
        change = values.to(weight.device) if stored == 0 else values.t().to(weight.device)
        weight.data.index_copy_(stored, index, (weight.index_select(stored, index).float() + change).to(weight.dtype))


# ---------------------------------------------------------------------------------------------------------------
# Model directories


def merge(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    check: bool = True,
) -> float | None:
    """Write ``base`` with ``adapter`` merged into its weights as an ordinary model directory.

    ``adapter`` may be of any PEFT method that merges. With ``check``, returns the largest absolute difference between
    the logits of base + adapter and of the directory written, read back, on a fixed text; None without.

    Raises :class:`LeamlError` as :func:`apply_delta`, and where ``output`` exists and is not empty.
    """
    from peft import PeftModel

    _refuse_full(output)
    config, _ = _read(Path(adapter), weights=False)
    model = load_model(base)
    inputs = probe(model)
    adapted = PeftModel.from_pretrained(model, os.fspath(adapter)).eval()
    before = _logits(adapted, inputs) if check else None
    if isinstance(config, LeamlConfig):
        model = adapted.unload()
        delta, config = load_delta(adapter)
        apply_delta(model, delta, base=config.base)
    else:
        model = adapted.merge_and_unload(safe_merge=True)
    with artifacts.atomic_directory(Path(output)) as directory:
        model.save_pretrained(directory)
        _copy_processor(base, directory)
    if before is None:
        return None
    return float((before - _logits(load_model(output), inputs)).abs().max())


def diff(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    ignore_others: bool = False,
    check: bool = True,
) -> float | None:
    """Write what distinguishes the model directory ``tuned`` from ``base`` as an adapter.

    Of each Linear, the rows (or, where that is smaller, the columns) that differ are stored. With ``check``, returns
    the largest absolute difference between the logits of ``tuned`` and of base + adapter; None without.

    Raises:
        LeamlError: no Linear differs, the models have different parameters, or something other than an untied Linear
            weight differs, which an adapter cannot hold (``ignore_others`` leaves it out).
    """
    from peft import PeftModel

    before, after = load_model(base), load_model(tuned)
    save_adapter(delta_between(before, after, ignore_others=ignore_others), output, model=before, criterion="diff")
    if not check:
        return None
    inputs = probe(before)
    adapted = PeftModel.from_pretrained(before, os.fspath(output)).eval()
    return float((_logits(adapted, inputs) - _logits(after, inputs)).abs().max())


@torch.no_grad()
def delta_between(base: nn.Module, tuned: nn.Module, *, ignore_others: bool = False) -> Delta:
    """The delta that turns ``base`` into ``tuned``, exact in fp32 for bf16 and fp16 weights. See :func:`diff`."""
    mine, theirs = dict(base.named_parameters()), dict(tuned.named_parameters())
    if mine.keys() != theirs.keys() or any(p.shape != theirs[n].shape for n, p in mine.items()):
        odd = sorted(mine.keys() ^ theirs.keys()) or [n for n, p in mine.items() if p.shape != theirs[n].shape]
        raise LeamlError(f"the two models are of different make: {odd[0]} differs in name or shape.")
    modules = dict(base.named_modules(remove_duplicate=False))
    owners: dict[int, int] = {}
    for _, p in base.named_parameters(remove_duplicate=False):
        owners[id(p)] = owners.get(id(p), 0) + 1
    delta: dict[str, tuple[int, Tensor, Tensor]] = {}
    others = []
    for name, p in mine.items():
        q = theirs[name].to(p.device)
        if torch.equal(p, q):
            continue
        owner, _, kind = name.rpartition(".")
        module = modules[owner]
        if kind != "weight" or not is_linear(module) or owners[id(p)] > 1:
            others.append(name)
            continue
        old, new = (p.t(), q.t()) if is_conv1d(module) else (p, q)
        different = old != new
        rows, columns = different.any(1).nonzero().flatten(), different.any(0).nonzero().flatten()
        if len(rows) * old.shape[1] <= len(columns) * old.shape[0]:
            delta[owner] = (0, rows.cpu(), (new[rows].float() - old[rows].float()).cpu())
        else:
            delta[owner] = (
                1,
                columns.cpu(),
                (new[:, columns].float() - old[:, columns].float()).t().contiguous().cpu(),
            )
    if others and not ignore_others:
        raise LeamlError(
            f"{len(others)} parameters differ that an adapter cannot hold (first: {others[0]}): only weights of untied "
            "Linear layers can be stored; pass ignore_others to leave the rest out."
        )
    if not delta:
        raise LeamlError("the two models have the same Linear weights: there is nothing to store.")
    return delta


def export_lora(
    adapter: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    uniform: bool = False,
    base: str | os.PathLike[str] | None = None,
) -> float | None:
    """Write a LEAML adapter as an exactly equal LoRA adapter, for tools that know no other kind.

    Rows: ``B`` one-hot ``[out, k]``, ``A`` the delta ``[k, in]``. Columns: ``A`` one-hot, ``B`` the delta transposed.
    The rank of a module is its number of tuned neurons, scaling is 1. Ranks differ between modules (PEFT's
    ``rank_pattern``); ``uniform`` pads them with zeros to the largest, for tools that allow one rank only. Servers
    limit the rank (vLLM: ``max_lora_rank``, at most 512), so this suits low densities; merge otherwise.

    With ``base``, returns the largest absolute logit difference between the two adapters on it; None without.
    """
    from peft import PeftModel

    delta, config = load_delta(adapter)
    ranks = {name: len(index) for name, (_, index, _) in delta.items()}
    largest = max(ranks.values())
    tensors = {}
    for name, (axis, index, values) in delta.items():
        rank = largest if uniform else ranks[name]
        if name not in config.sizes:
            raise LeamlError(f"{os.fspath(adapter)}: its configuration lacks the size of {name}; save it again.")
        size = config.sizes[name]
        one_hot = torch.zeros(rank, size)
        one_hot[torch.arange(len(index)), index] = 1.0
        padded = torch.zeros(rank, values.shape[1])
        padded[: len(index)] = values
        a, b = (padded, one_hot.t()) if axis == 0 else (one_hot, padded.t())
        tensors[f"{PREFIX}{name}.lora_A.weight"] = a.contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = b.contiguous()
    lora = LoraConfig(
        r=largest,
        lora_alpha=largest,
        target_modules=list(delta),
        rank_pattern={} if uniform else _exactly(ranks),
        alpha_pattern={} if uniform else _exactly(ranks),
        base_model_name_or_path=config.base_model_name_or_path,
        task_type=config.task_type,
        inference_mode=True,
    )
    _write(Path(output), lora, tensors, _auto_mapping(Path(adapter)))
    if base is None:
        return None
    model = load_model(base)
    inputs = probe(model)
    ours = _logits(PeftModel.from_pretrained(model, os.fspath(adapter)).eval(), inputs)
    theirs = _logits(PeftModel.from_pretrained(load_model(base), os.fspath(output)).eval(), inputs)
    return float((ours - theirs).abs().max())


# ---------------------------------------------------------------------------------------------------------------
# Hot swap


@torch.no_grad()
def hotswap(model: nn.Module, adapter: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Replace the loaded adapter ``adapter_name`` of a PEFT model by that in a directory, without rebuilding layers.

    Modules that the new adapter does not tune get a delta of zero. Where the new adapter has at most as many neurons
    in every module as the old, shapes stay as they are (unused rows are zero), so that a compiled model does not
    compile again.

    Raises :class:`LeamlError` where the new adapter tunes modules that the old one did not, belongs to another base,
    or the old one is merged. Nothing has been changed then.
    """
    delta, config = load_delta(adapter)
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = {n: m for n, m in core.named_modules() if isinstance(m, LeamlLayer) and adapter_name in m.leaml_delta}
    if not layers:
        raise LeamlError(f"the model has no LEAML adapter {adapter_name!r} to swap.")
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise LeamlError(f"adapter {adapter_name!r} is merged; call unmerge_adapter() before swapping it.")
    for name, (axis, index, values) in delta.items():
        layer = layers.get(name)
        if layer is None:
            raise LeamlError(f"the new adapter tunes {name}, which adapter {adapter_name!r} does not; load it instead.")
        if layer.leaml_axis[adapter_name] != axis or layer.leaml_delta[adapter_name].shape[1] != values.shape[1]:
            raise LeamlError(f"the new adapter does not fit {name}: it belongs to another base model.")
        if len(index) and int(index.max()) >= layer.leaml_index.limits[adapter_name][1]:
            raise LeamlError(f"the new adapter does not fit {name}: it belongs to another base model.")
    if not any(layer.merged for layer in layers.values()):
        check_base(config.base, {n: layer.get_base_layer() for n, layer in layers.items()}, "the new adapter")
    for name, layer in layers.items():
        axis, old = layer.leaml_axis[adapter_name], layer.leaml_delta[adapter_name]
        if name not in delta:
            old.zero_()
        else:
            _, index, values = delta[name]
            index, k = index.to(old.device), len(index)
            if k <= len(old):
                # spare neurons get a zero delta; they must not repeat others, or merging would write them twice
                unused = torch.ones(layer.leaml_index.limits[adapter_name][1], dtype=torch.bool, device=old.device)
                unused[index] = False
                spare = unused.nonzero().flatten()[: len(old) - k]
                layer.leaml_index[adapter_name].copy_(torch.cat([index, spare]))
                old.zero_()
                old[:k] = values.to(old)
            else:
                layer.leaml_index[adapter_name] = index
                old.data = values.to(old)
        counts = config.row_counts if axis == 0 else config.column_counts
        counts[name] = len(layer.leaml_delta[adapter_name])
        config.sizes[name] = layer.leaml_index.limits[adapter_name][1]
    model.peft_config[adapter_name] = config


# ---------------------------------------------------------------------------------------------------------------
# Checks


def max_logit_difference(a: nn.Module, b: nn.Module, inputs: Mapping[str, Tensor] | None = None) -> float:
    """Largest absolute difference of the logits of two models on ``inputs`` (default: :func:`probe` of ``a``)."""
    inputs = probe(a) if inputs is None else inputs
    return float((_logits(a, inputs) - _logits(b, inputs)).abs().max())


def probe(model: nn.Module, length: int = 32, seed: int = 0) -> dict[str, Tensor]:
    """A fixed text batch ``[2, length]`` of ordinary tokens, for parity checks without a tokenizer or pictures."""
    config = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    special = set(_token_ids(config)) | set(_token_ids(text))
    ordinary = torch.tensor([i for i in range(min(text.vocab_size, 4096)) if i not in special])
    generator = torch.Generator().manual_seed(seed)
    ids = ordinary[torch.randint(len(ordinary), (2, length), generator=generator)]
    device = next(model.parameters()).device
    return {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device)}


def load_model(path: str | os.PathLike[str]) -> nn.Module:
    """A transformers model directory (image-text or text-only) as stored, on the CPU, in evaluation mode."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    path = os.fspath(path)
    try:
        config = AutoConfig.from_pretrained(path)
        image_text = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        kind = AutoModelForImageTextToText if image_text else AutoModelForCausalLM
        with no_bars(path):
            return kind.from_pretrained(path, dtype="auto", use_safetensors=True).eval()
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise LeamlError(f"{path}: cannot be loaded as a transformers model ({reason}).") from error


# ---------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _logits(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    was_training = model.training
    model.eval()
    try:
        return model(**inputs).logits.float()
    finally:
        model.train(was_training)


def _token_ids(config: Any) -> Iterable[int]:
    for key, value in config.to_dict().items():
        if key.endswith(("_token_id", "_token_index", "_id")):
            yield from (v for v in (value if isinstance(value, list) else [value]) if isinstance(v, int))


def _exactly(ranks: Mapping[str, int]) -> dict[str, int]:
    """PEFT matches pattern keys as regular expressions against the ends of names: anchor and escape them."""
    return {"^" + name.replace(".", r"\."): k for name, k in ranks.items()}


def _name_or_path(model: nn.Module | None) -> str | None:
    return getattr(model, "name_or_path", None) or None


def _auto_mapping(adapter: Path) -> dict[str, str] | None:
    return json.loads((adapter / CONFIG_NAME).read_text()).get("auto_mapping")


def _refuse_full(output: str | os.PathLike[str]) -> None:
    if os.path.isdir(output) and os.listdir(output):
        raise LeamlError(f"{os.fspath(output)}: exists and is not empty; choose another output directory.")


def _write(output: Path, config: PeftConfig, tensors: dict[str, Tensor], auto_mapping: dict | None) -> None:
    """Weights first, configuration last: a directory with a configuration is complete."""
    output.mkdir(parents=True, exist_ok=True)
    with artifacts.atomic_path(output / SAFETENSORS_WEIGHTS_NAME) as temporary:
        temporary.write_bytes(save(tensors, metadata={"format": "pt"}))
    values = {key: sorted(v) if isinstance(v, set) else v for key, v in config.to_dict().items()}
    values["auto_mapping"] = auto_mapping
    if isinstance(config, LeamlConfig) and not (output / "README.md").exists():
        artifacts.write_text(output / "README.md", _card(config))
    artifacts.write_text(output / CONFIG_NAME, json.dumps(values, indent=2, sort_keys=True) + "\n")


def _card(config: LeamlConfig) -> str:
    """A model card that tells whoever finds the directory how to load it."""
    counts = config.row_counts | config.column_counts
    base = config.base_model_name_or_path or "the base model"
    head = ["---", "library_name: peft", "tags: [leaml]"]
    if config.base_model_name_or_path:
        head.append(f"base_model: {json.dumps(config.base_model_name_or_path)}")
    return "\n".join(
        [
            *head,
            "---",
            f"A LEAML adapter: {sum(counts.values())} tuned neurons in {len(counts)} modules of {base}.",
            "PEFT knows the method once `leaml_plugin.tuner` is imported (`pip install leaml_plugin`):",
            "",
            "```python",
            "import leaml_plugin.tuner",
            "from peft import PeftModel",
            "",
            'model = PeftModel.from_pretrained(base_model, "this directory")',
            "```",
            "",
        ]
    )


def _read(adapter: Path, weights: bool = True) -> tuple[PeftConfig, dict[str, Tensor]]:
    for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
        if not (adapter / name).is_file():
            raise LeamlError(f"{adapter}: is no adapter directory: {name} is missing.")
    try:
        config = PeftConfig.from_pretrained(os.fspath(adapter))
        return config, load_file(adapter / SAFETENSORS_WEIGHTS_NAME) if weights else {}
    except (ValueError, TypeError, KeyError, SafetensorError, OSError) as error:
        raise LeamlError(f"{adapter}: the adapter cannot be read ({str(error) or type(error).__name__}).") from error


def _copy_processor(base: str | os.PathLike[str], output: Path) -> None:
    """Put the processor or tokenizer of ``base``, whichever it has, beside the merged weights."""
    from transformers import AutoProcessor

    try:
        AutoProcessor.from_pretrained(os.fspath(base)).save_pretrained(output)
    except (OSError, ValueError, KeyError):
        return  # a bare model without tokenizer files is complete without them
