"""Configs from plain data: unknown keys, wrong types and missing settings are told in a sentence."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import pytest

from leaml_plugin import config
from leaml_plugin.errors import LeamlError


@dataclass(frozen=True)
class Inner:
    lr: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    flag: bool = False


@dataclass(frozen=True)
class Outer:
    name: str
    count: int = 1
    maybe: int | None = None
    inner: Inner = field(default_factory=Inner)


def test_nested_values_are_converted():
    built = config.build(Outer, {"name": "x", "maybe": 3, "inner": {"lr": 1, "betas": [0.8, 0.9]}})
    assert built == Outer("x", 1, 3, Inner(1.0, (0.8, 0.9)))
    assert isinstance(built.inner.lr, float)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"name": "x", "inner": {"lrr": 1}}, r"unknown setting 'inner.lrr'; did you mean 'inner.lr'\?"),
        ({"name": "x", "count": "many"}, "setting count is 'many'; it must be of type int"),
        ({"name": "x", "count": True}, "setting count is True; it must be of type int"),
        ({"name": "x", "inner": {"flag": 1}}, "setting inner.flag is 1; it must be of type bool"),
        ({"name": "x", "inner": 3}, "setting inner is 3; it must be a table"),
        ({"name": "x", "inner": {"betas": 3}}, "inner.betas is 3; it must be a list"),
        ({"count": 1}, "missing setting name"),
    ],
)
def test_bad_data(data, message):
    with pytest.raises(LeamlError, match=message):
        config.build(Outer, data)


def test_assign():
    data = {"inner": {"lr": 1.0}}
    for setting in ("inner.lr=2e-5", "name=a=b", "inner.flag=true", "count=3", "low=-inf"):
        config.assign(data, setting)
    assert data == {"inner": {"lr": 2e-5, "flag": True}, "name": "a=b", "count": 3, "low": float("-inf")}
    with pytest.raises(LeamlError, match="is no setting"):
        config.assign(data, "inner.lr")
    with pytest.raises(LeamlError, match="count is a value"):
        config.assign(data, "count.deeper=1")


def test_read_file(tmp_path):
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"a": 1}))
    assert config.read_file(str(path)) == {"a": 1}
    path.write_text("{")
    with pytest.raises(LeamlError, match=r"c\.json does not parse"):
        config.read_file(str(path))
    path.write_text("[]")
    with pytest.raises(LeamlError, match="holds a list"):
        config.read_file(str(path))
    with pytest.raises(LeamlError, match="No such file"):
        config.read_file(str(tmp_path / "none.json"))
