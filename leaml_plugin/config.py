"""Config dataclasses from files and from the command line.

Covers: building nested dataclasses from plain data, where an unknown key is an error with a suggestion and a value of
the wrong type one that names the key; ``key.sub=value`` settings; reading a JSON or TOML file.
Does not cover: what the keys mean; each stage owns its dataclass.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from leaml_plugin.errors import LeamlError, unknown_name

C = TypeVar("C")


def build(cls: type[C], data: Mapping[str, Any], prefix: str = "") -> C:
    """An instance of the dataclass ``cls`` from nested plain data.

    Raises:
        LeamlError: unknown key, missing key, or a value that is not of the field's type.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values = {}
    for key, value in data.items():
        if key not in fields:
            raise unknown_name("setting", prefix + key, [prefix + name for name in fields])
        values[key] = _convert(hints[key], value, prefix + key)
    required = [
        prefix + f.name
        for f in fields.values()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and f.name not in values
    ]
    if required:
        raise LeamlError(f"missing setting {', '.join(required)}.")
    return cls(**values)


def _convert(kind: Any, value: Any, name: str) -> Any:
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise LeamlError(f"setting {name} is {value!r}; it must be a table of settings.")
        return build(kind, value, name + ".")
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, (list, tuple)):
            raise LeamlError(f"setting {name} is {value!r}; it must be a list.")
        kinds = typing.get_args(kind)
        if len(value) != len(kinds):
            raise LeamlError(f"setting {name} is {value!r}; it must be a list of {len(kinds)}.")
        return tuple(_convert(k, v, name) for k, v in zip(kinds, value))
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        if value is None:
            return None
        (kind,) = (k for k in typing.get_args(kind) if k is not type(None))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise LeamlError(f"setting {name} is {value!r}; it must be of type {kind.__name__}.")
    if kind is float and not math.isfinite(value):
        raise LeamlError(f"setting {name} is {value!r}; it must be a finite number.")
    return value


def parse_value(text: str) -> Any:
    """A command-line value: JSON where it parses (numbers, true, lists), ``inf`` forms as floats, else the text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        pass
    try:
        return float(text)
    except ValueError:
        return text


def assign(data: dict[str, Any], setting: str) -> None:
    """Put ``a.b=value`` into nested dictionaries.

    Raises:
        LeamlError: no ``=`` in the setting.
    """
    path, equals, value = setting.partition("=")
    if not equals or not path:
        raise LeamlError(
            f"--set {setting!r} is no setting; write it as name=value, for example finetune.train.lr=1e-4."
        )
    *parents, last = path.strip().split(".")
    for name in parents:
        data = data.setdefault(name, {})
        if not isinstance(data, dict):
            raise LeamlError(f"--set {setting!r}: {name} is a value, not a table of settings.")
    data[last] = parse_value(value.strip())


def put(data: dict[str, Any], name: str, value: Any) -> None:
    """Put a command-line option's value at ``a.b`` of the nested dictionaries of a configuration file.

    Raises:
        LeamlError: ``a`` is a value there.
    """
    *parents, last = name.split(".")
    for parent in parents:
        data = data.setdefault(parent, {})
        if not isinstance(data, dict):
            raise LeamlError(f"the configuration file gives {parent} a value; it is a table of settings.")
    data[last] = value


def check_pattern(name: str, pattern: str) -> None:
    """Refuse a setting that is no regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise LeamlError(f"setting {name} is {pattern!r}, which is no regular expression ({error}).") from error


def read_file(path: str) -> dict[str, Any]:
    """A JSON or TOML configuration file as nested dictionaries."""
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise LeamlError(f"cannot read the configuration {path}: {error.strerror}.") from error
    try:
        if file.suffix == ".toml":
            try:
                import tomllib
            except ModuleNotFoundError as error:
                raise LeamlError(
                    f"{path}: TOML needs Python 3.11 or newer; write the configuration as JSON."
                ) from error
            data = tomllib.loads(text)
        else:
            data = json.loads(text)
    except ValueError as error:
        raise LeamlError(f"{path} does not parse: {error}.") from error
    if not isinstance(data, dict):
        raise LeamlError(f"{path} holds a {type(data).__name__}; a configuration is a table of settings.")
    return data


def from_arguments(args: argparse.Namespace, options: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Nested settings of a command line: the file ``--config`` first, then ``options``, then ``--set``.

    Args:
        options: attribute of ``args`` -> dotted names of the settings that it stands for.
    """
    data = read_file(args.config) if args.config else {}
    for option, names in options.items():
        value = getattr(args, option)
        if value is not None:
            for name in names:
                put(data, name, value)
    if args.trust_remote_code:
        data["trust_remote_code"] = True
    for setting in args.set:
        assign(data, setting)
    return data
