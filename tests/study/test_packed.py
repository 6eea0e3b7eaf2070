"""The batched model and collator against transformers' own: same loss, same texts."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from PIL import Image

from leaml_plugin import models
from leaml_plugin.data import Collator
from leaml_plugin.errors import LeamlError
from leaml_plugin.inference import Sampling, generate
from leaml_plugin.records import ImageRef
from leaml_plugin.study.packed import PackedModel
from leaml_plugin.worlds.scenes import render


@pytest.fixture(params=["endoscopy", "sports"])
def turns(request, study, tmp_path):
    """The same questions twice: over pictures in memory, and over PNG files."""
    world = study.world(request.param)
    files = {}
    for qa in world.test:
        for ref in qa.images:
            name, number = ref.uri.removeprefix("world:").split("/")
            scene = render(request.param, int(name.rsplit("-", 1)[1]))
            files[ref] = ImageRef(str(tmp_path / f"{name}-{number}.png"))
            Image.fromarray(scene.frames[int(number)]).save(files[ref].uri)
    packed = [study.prompts.vqa(qa) for qa in world.test[:9]]
    return packed, [dataclasses.replace(t, images=tuple(files[ref] for ref in t.images)) for t in packed]


def test_loss_is_that_of_transformers(turns, study, checkpoint):
    ours, files = turns
    plain = models.load(checkpoint, dtype="float32", device="cpu")
    collator = Collator(plain.processor, study.prompts)
    with torch.no_grad():
        expected = plain.model(**collator(files)).loss
        for vision in (False, True):  # features computed once, and the vision side in the step
            copy = study._copy(vision=vision)
            loss = copy.model(**study._collator(copy)(ours)).loss
            torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sampling", [None, Sampling(temperature=1.0, top_p=0.9, seed=3)])
def test_texts_are_those_of_transformers(turns, study, checkpoint, sampling):
    ours, files = turns
    plain = models.load(checkpoint, dtype="float32", device="cpu")
    options = {"max_new_tokens": 6, "sampling": sampling, "num_samples": 2 if sampling else 1, "progress": False}
    expected = list(
        generate(plain, files, collator=Collator(plain.processor, study.prompts), return_logprobs=True, **options)
    )
    copy = study._copy()
    got = list(generate(copy, ours, collator=study._collator(copy), return_logprobs=True, **options))
    assert [g.text for g in got] == [e.text for e in expected]
    assert len({g.text for g in got}) > 1
    assert [g.logprob for g in got] == pytest.approx([e.logprob for e in expected], abs=1e-4)


def test_gradients_reach_the_vision_side_only_where_it_learns(study):
    turns = [study.prompts.vqa(qa) for qa in study.world("endoscopy").test[:4]]
    for vision in (False, True):
        copy = study._copy(vision=vision)
        copy.model(**study._collator(copy)(turns)).loss.backward()
        touched = [p.grad is not None for p in copy.model.model.visual.parameters()]
        assert all(touched) if vision else not any(touched)


def test_a_text_cannot_forge_a_picture(study):
    copy = study._copy()
    turn = dataclasses.replace(study.prompts.vqa(study.world("endoscopy").test[0]), prompt="<|image_pad|> what?")
    batch = study._collator(copy)([turn])
    assert torch.isfinite(copy.model(**batch).loss)


def test_another_model_is_refused(tiny_models):
    from leaml_plugin.study import packed

    with pytest.raises(LeamlError, match=r"tiny Qwen2\.5-VL"):
        packed.load(tiny_models("llava"))


def test_a_copy_is_the_packed_model(study):
    assert type(study._copy().model) is PackedModel
