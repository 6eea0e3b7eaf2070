"""``method=...`` among the model arguments: ours and others', cached by everything the result depends on."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import pytest

from leaml_plugin.errors import LeamlError
from leaml_plugin.lmms import methods


@pytest.fixture
def counting(monkeypatch):
    """A method of another package, which remembers what it was asked."""
    asked = []

    def method(request):
        asked.append(request)
        return methods.Adapted(request.pretrained, str(request.output))

    class Point:
        name = "theirs"

        @staticmethod
        def load():
            return method

    monkeypatch.setattr(methods, "entry_points", lambda group: [Point] if group == "leaml.methods" else [])
    return asked


@pytest.fixture
def labels(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("{}\n")
    return path


def test_methods_of_other_packages_are_found(counting, labels, tiny_models):
    model = str(tiny_models("qwen2_5_vl"))
    where, adapter = methods.adapted("theirs", model, None, {"labeled": str(labels), "rank": 4})
    assert where == model
    assert adapter == str(counting[0].output)
    assert counting[0].options == {"rank": 4}


def test_the_place_depends_on_everything_that_decides_the_result(counting, labels, tiny_models):
    model = str(tiny_models("qwen2_5_vl"))

    def place(model=model, **options):
        return methods.adapted("theirs", model, None, {"labeled": str(labels), **options})[1]

    first = place()
    assert place() == first
    assert place(rank=4) != first
    assert place(model=str(tiny_models("llava"))) != first
    labels.write_text("{} \n")
    assert place() != first


def test_what_is_missing_is_said(counting, labels, tiny_models):
    model = str(tiny_models("qwen2_5_vl"))
    with pytest.raises(LeamlError, match=r"unknown method 'thiers'; did you mean 'theirs'"):
        methods.adapted("thiers", model, None, {"labeled": str(labels)})
    with pytest.raises(LeamlError, match="needs labeled="):
        methods.adapted("lora", model, None, {})
    with pytest.raises(LeamlError, match="either method or adapter"):
        methods.adapted("lora", model, "x", {"labeled": str(labels)})


def test_only_the_first_process_adapts(counting, labels, tiny_models):
    order = []

    class Process:
        def __init__(self, first):
            self.is_main_process = first

        def wait_for_everyone(self):
            order.append((self.is_main_process, len(counting)))

    for first in (True, False):
        before = len(counting)
        methods.adapted("theirs", str(tiny_models("qwen2_5_vl")), None, {"labeled": str(labels)}, Process(first))
        assert order[-1] == (first, before + 1 if first else before), "the others come after the barrier"


def test_the_group_is_the_documented_one():
    assert methods.GROUP == "leaml.methods"
    assert all(callable(point.load()) for point in importlib.metadata.entry_points(group=methods.GROUP))


def test_lora_through_the_model_arguments(kvasir, tiny_models, tmp_path):
    """The whole way: files, adaptation, an adapter that the model loads; the second time nothing is trained."""
    pytest.importorskip("lmms_eval")
    from leaml_plugin.lmms import prepare
    from leaml_plugin.lmms.model import Leaml

    files = prepare.endoscopy_files(tmp_path / "endo", data=str(kvasir), labels=0.1, max_unlabelled=3)
    options = {"method": "lora", "labeled": str(files.train), "finetune.train.steps": 2, "finetune.train.batch_size": 2}
    lm = Leaml(str(tiny_models("qwen2_5_vl")), device="cpu", **options)
    adapter = Path(lm.loaded.adapter)
    assert json.loads((adapter / "adapter_config.json").read_text())["peft_type"] == "LORA"
    written = {path: path.stat().st_mtime_ns for path in adapter.iterdir()}
    Leaml(str(tiny_models("qwen2_5_vl")), device="cpu", **options)
    assert {path: path.stat().st_mtime_ns for path in adapter.iterdir()} == written
    with pytest.raises(LeamlError, match=r"finetune\.train\.stepz"):
        Leaml(str(tiny_models("qwen2_5_vl")), device="cpu", **{**options, "finetune.train.stepz": 1})
