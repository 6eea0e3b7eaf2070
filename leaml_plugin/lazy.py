"""Names of a package that are imported when they are first used, so that importing the package stays instant."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def attributes(package: str, exports: Mapping[str, str]) -> Callable[[str], Any]:
    """A package's ``__getattr__``: ``exports`` maps each public name to the module that defines it."""

    def __getattr__(name: str) -> Any:
        if name not in exports:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(exports[name]), name)
        setattr(sys.modules[package], name, value)  # the next use is an ordinary attribute
        return value

    return __getattr__
