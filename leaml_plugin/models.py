"""Loading image-text models, and finding the neurons of their language model.

Covers: any ``AutoModelForImageTextToText`` with an ``AutoProcessor`` and a chat template, from a directory or the Hub,
with or without a PEFT adapter; its language model's Linear layers; a hash of what was loaded.
Does not cover: quantised loading, sharding over devices, text-only models.

Only safetensors are read, never pickles, and code from a checkpoint runs only with ``trust_remote_code=True``.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from leaml_plugin.errors import LeamlError, unknown_name
from leaml_plugin.progress import Progress

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Which Linear layers are the language model's: a regular expression on the full module name for each model type whose
# decoder transformers does not point at; everything else goes by `get_decoder()`.
TARGETS = {
    "git": r"^git\.encoder\.",
    "idefics": r"^model\.(layers|gated_cross_attn_layers)\.",
}

# Inside the language model, these are no neurons of a block: output heads, embeddings, expert routers, whatever an
# adapter added.
_NOT_BLOCKS = re.compile(r"(^|\.)(lm_head|embed\w*|router|gate|\w+_gate|lora_\w+|leaml_\w+|modules_to_save)(\.|$)")
# Where the decoder is not known, parts of these names are not the language model.
_NOT_LANGUAGE = re.compile(
    r"(^|\.)(vis\w*|image\w*|vit\w*|clip\w*|audio\w*|speech\w*|\w*projector\w*|\w*projection|connector|merger|"
    r"\w*resampler|perceiver\w*|patch\w*|qformer|encoder)(\.|$)"
)

# (gate, up, down) by the names that feed-forward blocks use; a block without gate has two layers
_FFN_NAMES = (
    ("gate_proj", "up_proj", "down_proj"),
    ("w1", "w3", "w2"),
    (None, "fc1", "fc2"),
    (None, "up_proj", "down_proj"),
    (None, "dense_h_to_4h", "dense_4h_to_h"),
    (None, "c_fc", "c_proj"),
)


@dataclass
class Loaded:
    """A model in evaluation mode with its processor, and where they came from."""

    model: nn.Module
    processor: Any
    path: str
    adapter: str | None = None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point type that pictures must have."""
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    def to_device(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """``batch`` on the model's device; floating-point tensors (pictures) in the model's type."""
        return to_device(batch, self.device, self.dtype)


def to_device(batch: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """``batch`` on ``device``; floating-point tensors (pictures) become ``dtype``, others keep their type."""
    return {
        k: (v.to(device, dtype) if v.is_floating_point() else v.to(device)) if isinstance(v, Tensor) else v
        for k, v in batch.items()
    }


def load(
    path: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    device: str = "auto",
    adapter: str | os.PathLike[str] | None = None,
    trust_remote_code: bool = False,
    attn: str | None = None,
    processor_options: Mapping[str, Any] | None = None,
) -> Loaded:
    """Load a model and its processor.

    Args:
        path: a directory or a Hub id.
        dtype: "auto" (as stored), "float32", "bfloat16", "float16" or a torch dtype.
        device: "auto" (an accelerator if there is one), or what torch takes.
        adapter: a directory or Hub id of a PEFT adapter: LEAML's own or any other.
        trust_remote_code: run code that lies beside the weights.
        attn: transformers' ``attn_implementation``.
        processor_options: passed to ``AutoProcessor``, e.g. ``{"max_pixels": 401408}`` for Qwen2.5-VL.

    Raises:
        LeamlError: nothing there, no image-text model, no chat template, weights that are incomplete or no
            safetensors, an adapter that does not fit.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForImageTextToText

    kind, where = _dtype(dtype), _device(device)
    config = _config(path, trust_remote_code)
    processor = load_processor(path, trust_remote_code=trust_remote_code, options=processor_options)
    _check_weights(path)
    try:
        with no_bars(path):
            model, info = AutoModelForImageTextToText.from_pretrained(
                path,
                config=config,
                dtype=kind,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                **({"attn_implementation": attn} if attn else {}),
            )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise LeamlError(f"{path}: the weights cannot be loaded ({_first_line(error)})") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise LeamlError(
            f"{path}: the checkpoint lacks {len(missing)} tensors, {missing[0]} among them, which would stay random; "
            "use a complete checkpoint."
        )
    model = model.to(where)
    if adapter is not None:
        model = _with_adapter(model, str(adapter))
    return Loaded(model.eval(), processor, str(path), None if adapter is None else str(adapter))


@contextlib.contextmanager
def no_bars(path: str | os.PathLike[str]) -> Iterator[None]:
    """No progress bars of transformers while a directory is loaded. A model from the Hub shows how its files come."""
    from transformers.utils import logging

    if not os.path.isdir(path) or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def check(
    path: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> None:
    """Everything that :func:`load` can find wrong with its arguments without reading the weights.

    Raises:
        LeamlError: as :func:`load`.
    """
    from leaml_plugin.data.collate import Collator

    _dtype(dtype)
    _device(device)
    _config(path, trust_remote_code)
    Collator(load_processor(path, trust_remote_code=trust_remote_code))
    _check_weights(path)


def check_targets(
    path: str | os.PathLike[str], patterns: Iterable[str], *, ffn: bool = False, trust_remote_code: bool = False
) -> None:
    """Find target patterns that match no Linear layer, on the model's layers without their weights.

    Args:
        patterns: as :func:`target_linears` takes them.
        ffn: whether the model must have feed-forward blocks of known layer names.

    Raises:
        LeamlError: as :func:`target_linears` and :func:`ffn_groups`.
    """
    from transformers import AutoModelForImageTextToText

    config = _config(path, trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, trust_remote_code=trust_remote_code)
    for pattern in patterns:
        target_linears(model, pattern)
    if ffn:
        ffn_groups(model)


def save(model: nn.Module, processor: Any, directory: str | os.PathLike[str]) -> None:
    """Write a full model (safetensors) and its processor so that :func:`load` and transformers read them."""
    model.save_pretrained(directory, safe_serialization=True)  # type: ignore[operator]
    processor.save_pretrained(directory)


def target_linears(model: nn.Module, pattern: str | None = None) -> dict[str, nn.Linear]:
    """The Linear layers whose rows are neurons: those of the language model's blocks, by full module name.

    The output head, embeddings, expert routers, the vision tower and the projector are left out, by default.

    Args:
        pattern: a regular expression to be found in the full name; chooses among *all* Linear layers of the model
            but the output head, so that ``r"visual.*mlp"`` reaches the vision tower.

    Raises:
        LeamlError: nothing matches, or the pattern is no regular expression.
    """
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    linears = {n: m for n, m in linears.items() if m is not head and not _NOT_BLOCKS.search(n)}
    kind = str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))
    if pattern is None:
        pattern = TARGETS.get(kind)
    if pattern is not None:
        try:
            regex = re.compile(pattern)
        except re.error as error:
            raise LeamlError(f"target pattern {pattern!r} is no regular expression ({error}); correct it.") from error
        found = {n: m for n, m in linears.items() if regex.search(n)}
    else:
        prefix = _decoder_prefix(model)
        if prefix is not None:
            found = {n: m for n, m in linears.items() if n.startswith(prefix)}
        else:
            found = {n: m for n, m in linears.items() if not _NOT_LANGUAGE.search(n)}
    if not found:
        some = ", ".join(list(linears)[:3]) or "none at all"
        chosen = f"matches {pattern!r}" if pattern is not None else "was found in its language model"
        raise LeamlError(f"no Linear layer of this {kind} model {chosen}; give targets that match (it has {some}, …).")
    return found


def ffn_groups(model: nn.Module) -> list[tuple[str | None, str, str]]:
    """The language model's feed-forward blocks as (gate, up, down) module names.

    Row ``i`` of gate and up and column ``i`` of down belong to one hidden unit. ``gate`` is ``None`` in a block
    without gate.

    Raises:
        LeamlError: no block has the known layer names (fused gate and up layers are not split).
    """
    linears = target_linears(model)
    blocks: dict[str, set[str]] = {}
    for name in linears:
        parent, _, leaf = name.rpartition(".")
        blocks.setdefault(parent, set()).add(leaf)
    groups: list[tuple[str | None, str, str]] = []
    for parent, leaves in blocks.items():
        for gate, up, down in _FFN_NAMES:
            if {up, down} <= leaves and (gate is None or gate in leaves):
                dot = f"{parent}." if parent else ""
                groups.append((f"{dot}{gate}" if gate else None, f"{dot}{up}", f"{dot}{down}"))
                break
    if not groups:
        raise LeamlError("this model has no feed-forward block of known layer names; use granularity 'row'.")
    return groups


def max_positions(model: nn.Module) -> int | None:
    """The most tokens that the language model has positions for, by its configuration; None where it says nothing."""
    config = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "max_position_embeddings", None)


def fingerprint(path: str | os.PathLike[str]) -> str:
    """What was loaded, independent of where it lies: a SHA-256 over the directory's weights and configuration files,
    or ``<Hub id>@<commit>``.

    Raises:
        LeamlError: nothing there.
    """
    directory = Path(path)
    if not directory.is_dir():
        from transformers.utils import cached_file

        try:
            file = cached_file(str(path), "config.json")
        except (OSError, ValueError) as error:
            raise _not_found(path, error) from error
        return f"{path}@{Path(file).parent.name}"
    kinds = {".safetensors", ".json", ".jinja", ".model", ".txt", ".py"}
    files = sorted(p for p in directory.iterdir() if p.suffix in kinds and p.is_file())
    key = (str(directory.resolve()), tuple((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files))
    if key not in _FINGERPRINTS:
        bar = Progress("hashing the model", sum(p.stat().st_size for p in files) >> 20, unit="MB")
        digest = hashlib.sha256()
        for file in files:
            digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
            with open(file, "rb") as stream:
                while chunk := stream.read(1 << 24):
                    digest.update(chunk)
                    bar.update(len(chunk) >> 20)
        bar.close()
        _FINGERPRINTS[key] = digest.hexdigest()
    return _FINGERPRINTS[key]


_FINGERPRINTS: dict[Any, str] = {}  # a run asks several times; the key holds sizes and times of all files


def _dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    if dtype not in DTYPES:
        raise unknown_name("dtype", dtype, ["auto", *DTYPES])
    return DTYPES[dtype]


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        where = torch.device(device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        raise LeamlError(f"device {device!r} cannot be used here ({_first_line(error)})") from error
    return where


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _not_found(path: Any, error: BaseException) -> LeamlError:
    return LeamlError(
        f"{path}: is neither a model directory nor a model that can be fetched from the Hub "
        f"({_first_line(error)}); give a directory that has config.json, or an id like Qwen/Qwen2.5-VL-3B-Instruct."
    )


def _config(path: str | os.PathLike[str], trust_remote_code: bool) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    text = os.fspath(path)
    if not os.path.isdir(text) and (os.path.isabs(text) or text.startswith((".", "~")) or text.count("/") > 1):
        raise LeamlError(f"{text}: no such model directory; correct the path.")
    if os.path.isdir(text) and not os.path.isfile(os.path.join(text, "config.json")):
        what = "an adapter, not a model; pass it as the adapter and its base model as the model"
        if not os.path.isfile(os.path.join(text, "adapter_config.json")):
            what = "no model directory: config.json is missing; give a directory written by save_pretrained"
        raise LeamlError(f"{text}: is {what}.")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except ValueError as error:
        if "trust_remote_code" in str(error):
            raise LeamlError(
                f"{path}: runs code of its own; pass trust_remote_code if you trust its authors."
            ) from error
        raise LeamlError(f"{path}: transformers does not know this model ({_first_line(error)})") from error
    except OSError as error:
        raise _not_found(path, error) from error
    remote = "AutoModelForImageTextToText" in (getattr(config, "auto_map", None) or {})
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and not (remote and trust_remote_code):
        raise LeamlError(
            f"{path}: is a {config.model_type} model, which takes no pictures and text; "
            "use an image-text model such as Qwen2.5-VL, LLaVA, SmolVLM or InternVL."
        )
    return config


def load_processor(
    path: str | os.PathLike[str], *, trust_remote_code: bool = False, options: Mapping[str, Any] | None = None
) -> Any:
    """The processor alone, as :func:`load` gives it; ``options`` go to ``AutoProcessor``."""
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=trust_remote_code, **(options or {}))
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        raise LeamlError(
            f"{path}: the processor cannot be loaded ({_first_line(error)}); the directory needs the tokenizer's and "
            "the image processor's files beside the weights."
        ) from error
    if getattr(processor, "image_processor", None) is None or getattr(processor, "tokenizer", None) is None:
        raise LeamlError(
            f"{path}: has a {type(processor).__name__} where an image-text processor was wanted; "
            "add preprocessor_config.json and the tokenizer's files."
        )
    if not (getattr(processor, "chat_template", None) or getattr(processor.tokenizer, "chat_template", None)):
        raise LeamlError(f"{path}: the processor has no chat template; use the instruction-tuned checkpoint.")
    return processor


def _check_weights(path: str | os.PathLike[str]) -> None:
    directory = Path(path)
    if not directory.is_dir() or any(directory.glob("*.safetensors")):
        return
    if any(directory.glob("*.bin")) or any(directory.glob("*.pt*")):
        raise LeamlError(f"{path}: its weights are pickles, which can run code; convert them to safetensors.")
    raise LeamlError(f"{path}: has no weights (*.safetensors); copy them there.")


def _with_adapter(model: nn.Module, adapter: str) -> nn.Module:
    from peft import PeftModel
    from peft.utils import SAFETENSORS_WEIGHTS_NAME
    from safetensors import SafetensorError

    import leaml_plugin.tuner  # noqa: F401  (makes peft know our adapter type)

    local = Path(adapter)
    if local.is_dir():
        for name in ("adapter_config.json", SAFETENSORS_WEIGHTS_NAME):
            if not (local / name).is_file():
                raise LeamlError(f"{adapter}: is no adapter directory: {name} is missing.")
    elif local.is_absolute() or adapter.startswith((".", "~")) or adapter.count("/") > 1:
        raise LeamlError(f"{adapter}: no such adapter directory; correct the path.")
    else:
        from huggingface_hub import hf_hub_download

        # peft falls back to a pickle where there is no safetensors file
        try:
            hf_hub_download(adapter, SAFETENSORS_WEIGHTS_NAME)
        except (OSError, ValueError) as error:
            raise LeamlError(
                f"{adapter}: is neither an adapter directory nor an adapter with safetensors on the Hub "
                f"({_first_line(error)})"
            ) from error
    try:
        return PeftModel.from_pretrained(model, adapter)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError) as error:
        raise LeamlError(f"{adapter}: the adapter does not fit this model ({_first_line(error)})") from error


def _decoder_prefix(model: nn.Module) -> str | None:
    """``"model.language_model."`` where transformers tells which submodule is the decoder, else ``None``."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else None
    if decoder is None or decoder is base:
        return None
    name = next((n for n, m in model.named_modules() if m is decoder), None)
    # a wrapper that holds the vision tower too is not the decoder
    if not name or any(re.search(r"(^|\.)(vis\w*|image\w*)$", n) for n, _ in decoder.named_modules()):
        return None
    return name + "."
