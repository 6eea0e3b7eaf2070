"""Adaptation methods by name, so that lmms-eval can compare them: adapt first (once), then evaluate.

    lmms-eval --model leaml --tasks leaml_endoscopy \\
        --model_args pretrained=Qwen/Qwen2.5-VL-3B-Instruct,method=lora,labeled=data/endo/train.jsonl

Covers: LEAML and its baselines through ``leaml adapt``; methods of other packages, which register a function in the
entry-point group ``leaml.methods``; a cache (``LEAML_CACHE``), in which a method's result is found again as long as
model, files and options stay the same; several processes, of which the first adapts and the others wait.
Does not cover: adapting on several devices.

A method is a function ``(request: Request) -> Adapted``. It must write into ``request.output`` alone, and leave there
what it needs to take up an interrupted run.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from leaml_plugin import config
from leaml_plugin.artifacts import file_sha256, fingerprint
from leaml_plugin.errors import LeamlError, unknown_name
from leaml_plugin.lmms.cache import cache_root

GROUP = "leaml.methods"


@dataclass(frozen=True)
class Request:
    """What a method gets.

    ``pretrained`` is a model directory or Hub id; ``labeled``, ``unlabeled`` and ``captions`` are files or directories
    as ``leaml adapt`` takes them (empty where not given); ``output`` is the method's own directory; ``options`` is
    everything else that stood among the model arguments.
    """

    pretrained: str
    labeled: str
    unlabeled: str
    captions: str
    output: Path
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Adapted:
    """What a method leaves: a model, and an adapter on it where the method trained one."""

    pretrained: str
    adapter: str | None = None


Method = Callable[[Request], Adapted]


def pipeline_method(request: Request, **settings: Any) -> Adapted:
    """``leaml adapt`` with ``settings``; ``request.options`` are any of its settings by their full names."""
    from leaml_plugin.pipeline import AdaptConfig, adapt

    data: dict[str, Any] = {
        "model": request.pretrained,
        "labeled": request.labeled,
        "unlabeled": request.unlabeled,
        "captions": request.captions,
        "output": str(request.output),
    }
    for name, value in {**settings, **request.options}.items():
        _put(data, name, value)
    done = adapt(config.build(AdaptConfig, data))
    if done.adapter is not None:
        return Adapted(request.pretrained, str(done.adapter))
    return Adapted(str(done.model))


def _put(data: dict[str, Any], name: str, value: Any) -> None:
    *parents, last = name.split(".")
    for parent in parents:
        data = data.setdefault(parent, {})
        if not isinstance(data, dict):
            raise LeamlError(f"model argument {name}: {parent} is a setting, not a group of settings.")
    data[last] = value


#: The methods of this package: LEAML, and plain fine-tuning on the labels in three ways.
METHODS: Mapping[str, Method] = {
    "leaml": functools.partial(pipeline_method, method="leaml"),
    "full": functools.partial(pipeline_method, method="labels", **{"finetune.mode": "full"}),
    "lora": functools.partial(pipeline_method, method="labels", **{"finetune.mode": "lora"}),
    "selected": functools.partial(pipeline_method, method="labels", **{"finetune.mode": "selected"}),
}


def find(name: str) -> Method:
    """The method of this name: ours, or one that another package registered. Ours cannot be replaced."""
    if name in METHODS:
        return METHODS[name]
    others = {point.name: point for point in entry_points(group=GROUP)}
    if name not in others:
        raise unknown_name("method", name, [*METHODS, *others])
    return others[name].load()


def adapted(
    name: str, pretrained: str, adapter: str | None, options: Mapping[str, Any], accelerator: Any = None
) -> tuple[str, str | None]:
    """Model and adapter after method ``name``; at once where the same was done before.

    Args:
        options: ``labeled``, ``unlabeled``, ``captions`` and the method's own options.
        accelerator: of several processes; the first one adapts.

    Raises:
        LeamlError: no such method, no labels, or what the method finds wrong.
    """
    method = find(name)
    if adapter is not None:
        raise LeamlError("method= adapts the base model; give either method or adapter.")
    rest = dict(options)
    labeled, unlabeled, captions = (str(rest.pop(key, "") or "") for key in ("labeled", "unlabeled", "captions"))
    if not labeled:
        raise LeamlError(f"method={name} needs labeled=, a file of labelled questions ('leaml data' makes one).")
    key = fingerprint(
        {
            "method": name,
            "model": _model_key(str(pretrained)),
            "files": {path: _content_key(Path(path)) for path in (labeled, unlabeled, captions) if path},
            "options": rest,
        }
    )
    output = cache_root() / "methods" / f"{name}-{key[:16]}"
    request = Request(str(pretrained), labeled, unlabeled, captions, output, rest)
    first = accelerator is None or accelerator.is_main_process
    result = method(request) if first else None
    if accelerator is not None:
        accelerator.wait_for_everyone()
    if result is None:
        result = method(request)  # complete by now: a method finds its own result again
    return dataclasses.astuple(result)


def _model_key(pretrained: str) -> str:
    from leaml_plugin import models

    return models.fingerprint(pretrained)


def _content_key(path: Path) -> str:
    """What a file holds, or the names and sizes in a directory; a Hub id is its own name."""
    if path.is_file():
        return file_sha256(path)
    if path.is_dir():
        return fingerprint(sorted((str(p.relative_to(path)), p.stat().st_size) for p in path.rglob("*") if p.is_file()))
    return str(path)
