"""Collation and generation on architectures beyond the three that every test uses."""

from __future__ import annotations

import pytest
import torch
from more_models import BUILDERS

from leaml_plugin import models
from leaml_plugin.data.collate import IGNORE, Collator
from leaml_plugin.data.prompts import Turn
from leaml_plugin.inference import Sampling, generate
from leaml_plugin.records import ImageRef


@pytest.fixture(scope="module", params=sorted(BUILDERS))
def built(request):
    if request.param == "smolvlm":
        pytest.importorskip("num2words", reason="transformers' SmolVLM processor needs num2words")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, processor = BUILDERS[request.param]()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(30)
    return model.eval(), processor


@pytest.fixture(scope="module")
def turns(built, pictures):
    refs = [ImageRef(str(p)) for p in pictures]
    if built[0].config.model_type == "mllama":
        # transformers' own batches of unequal numbers of pictures change this model's logits: equal numbers only
        return [Turn(str(i), (ref,), "What is this" + "?" * i, "a polyp") for i, ref in enumerate(refs[:3])]
    return [
        Turn("a", (refs[0],), "What is this?", "a polyp"),
        Turn("b", (refs[1], refs[2]), "And these?", "two"),
        Turn("c", (), "Only text?", "yes indeed"),
        Turn("d", (refs[4],), "x?", "y"),
    ]


def test_a_batch_is_its_turns(built, turns):
    model, processor = built
    collator = Collator(processor)
    batch = collator(turns)
    assert [
        processor.tokenizer.decode(row[row != IGNORE]).strip()[: len(t.target)]
        for row, t in zip(batch["labels"], turns)
    ] == [t.target for t in turns]
    with torch.no_grad():
        together = model(**batch).logits
        for row, turn in enumerate(turns):
            alone = model(**collator.encode(turn)).logits[0]
            torch.testing.assert_close(together[row, : len(alone)], alone, atol=1e-3, rtol=1e-3)


def test_pictures_matter(built, turns, pictures):
    model, processor = built
    collator = Collator(processor)
    other = Turn("a", (ImageRef(str(pictures[3])),), turns[0].prompt, turns[0].target)
    with torch.no_grad():
        a, b = (model(**collator.encode(turn)).logits[0, -1] for turn in (turns[0], other))
    assert (a - b).abs().max() > 1e-6


def test_generation_is_the_same_alone_and_in_a_batch(built, turns):
    model, processor = built
    collator = Collator(processor, cache_bytes=1 << 24)

    def generate(some):
        batch = collator.prompt_batch(some)
        out = model.generate(**batch, max_new_tokens=5, min_new_tokens=5, do_sample=False)
        return out[:, batch["input_ids"].shape[1] :].tolist()

    together = generate(turns)
    assert [generate([turn])[0] for turn in turns] == together


def test_the_language_models_layers_are_found(built):
    model, _ = built
    found = models.target_linears(model)
    assert len(found) in (14, 21) and all("vision" not in n and "visual" not in n for n in found)
    assert len(models.ffn_groups(model)) == len(found) // 7


def test_samples_that_share_a_reading_are_those_read_alone(built, turns):
    model, processor = built
    loaded, collator = models.Loaded(model, processor, "memory"), Collator(processor)
    options = {"max_new_tokens": 5, "sampling": Sampling(seed=3), "num_samples": 3, "progress": False}
    shared, alone = (list(generate(loaded, turns, collator=collator, batch_size=n, **options)) for n in (9, 1))
    assert [(o.id, o.sample, o.text) for o in shared] == [(o.id, o.sample, o.text) for o in alone]
