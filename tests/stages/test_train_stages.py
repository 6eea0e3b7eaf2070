"""What the training stages may move: the selected neurons, and for captions never anything else."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from safetensors.torch import load_file

from leaml_plugin import models
from leaml_plugin.artifacts import StageDirectory, read_json
from leaml_plugin.data import Collator, Prompts
from leaml_plugin.errors import LeamlError
from leaml_plugin.records import QA, ImageRef, Picture
from leaml_plugin.selection import Selection
from leaml_plugin.stages import finetune, relevance, train_generator
from leaml_plugin.training import TrainConfig

TRAIN = TrainConfig(steps=1, batch_size=2, lr=1e-2, clip=0.0, warmup=0.0)


@pytest.fixture(scope="module")
def tools(tiny_models):
    prompts = Prompts.load()
    load = functools.partial(models.load, str(tiny_models("qwen2_5_vl")), dtype="float32", device="cpu")
    return {"load": load, "collator": lambda loaded: Collator(loaded.processor, prompts), "prompts": prompts}


@pytest.fixture(scope="module")
def labels(pictures):
    return [QA(f"q{i}", (ImageRef(str(p)),), f"Which colour, {i}?", "red") for i, p in enumerate(pictures[:4])]


@pytest.fixture(scope="module")
def unlabelled(pictures):
    return [Picture(f"p{i}", (ImageRef(str(p)),), f"A spot, number {i}.") for i, p in enumerate(pictures)]


@pytest.fixture(scope="module")
def selection(tools, labels, tmp_path_factory):
    stage = StageDirectory(tmp_path_factory.mktemp("relevance"), "key")
    return relevance.run(relevance.RelevanceConfig(density=0.25), stage, labels=labels, **tools)


def outside(selection: Selection, name: str, value: torch.Tensor) -> torch.Tensor:
    """The rows of a parameter that the selection does not hold."""
    module = name.removesuffix(".weight")
    if module not in selection.rows or not name.endswith(".weight"):
        return value
    keep = torch.ones(len(value), dtype=torch.bool)
    keep[selection.rows[module]] = False
    return value[keep]


def inside(selection: Selection, name: str, value: torch.Tensor) -> torch.Tensor:
    return value[selection.rows[name.removesuffix(".weight")]]


@pytest.mark.parametrize("granularity", ["row", "ffn"])
@pytest.mark.parametrize("loss", ["generate", "vqa", "both"])
def test_relevance_of_every_loss_and_granularity(granularity, loss, tools, labels, tmp_path):
    config = relevance.RelevanceConfig(density=0.25, granularity=granularity, loss=loss)
    chosen = relevance.run(config, StageDirectory(tmp_path, "key"), labels=labels, **tools)
    assert 0.15 < chosen.density < 0.35
    shares = read_json(tmp_path / relevance.HEATMAP)["captured"]
    assert all(0.25 <= share <= 1.0 for row in shares for share in row)  # the top quarter holds at least a quarter
    overlap = read_json(tmp_path / relevance.OVERLAP)
    assert overlap["names"][0] == "taylor"
    assert [overlap["jaccard"][i][i] for i in range(len(overlap["names"]))] == [1.0] * len(overlap["names"])


def test_the_choices_for_ablation(tools, labels, selection, tmp_path):
    for choice, density in (("random", 0.25), ("all", 1.0)):
        config = relevance.RelevanceConfig(density=0.25, choice=choice)
        chosen = relevance.run(config, StageDirectory(tmp_path / choice, "key"), labels=labels, **tools)
        assert chosen.density == pytest.approx(density, abs=0.05)
        assert chosen.rows.keys() == selection.rows.keys()
    assert chosen.jaccard(selection) < 0.3


def generator(config, tools, labels, unlabelled, selection, path):
    stage = StageDirectory(path, "key")
    where = train_generator.run(config, stage, labels=labels, pictures=unlabelled, selection=selection, **tools)
    loaded = models.load(**{"path": tools["load"].args[0], **where}, dtype="float32", device="cpu")
    model = loaded.model.merge_and_unload() if "adapter" in where else loaded.model
    return {name: p.detach() for name, p in model.named_parameters()}


def test_captions_move_the_selected_neurons_only(tools, labels, unlabelled, selection, tmp_path):
    """With the QA loss free to move everything, captions change nothing outside the selection, bit for bit."""
    config = train_generator.GeneratorConfig(train=TRAIN, qa_updates="all", caption_weight=0.0)
    without = generator(config, tools, labels, unlabelled, selection, tmp_path / "without")
    config = dataclasses.replace(config, caption_weight=1.0)
    with_captions = generator(config, tools, labels, unlabelled, selection, tmp_path / "with")
    base = dict(tools["load"]().model.named_parameters())
    for name, value in without.items():
        assert torch.equal(outside(selection, name, value), outside(selection, name, with_captions[name])), name
    moved = [n for n in selection.rows if not torch.equal(without[f"{n}.weight"], with_captions[f"{n}.weight"])]
    assert moved
    assert not torch.equal(base["lm_head.weight"], without["lm_head.weight"])  # QA itself is free


def test_selected_updates_leave_everything_else(tools, labels, unlabelled, selection, tmp_path):
    config = train_generator.GeneratorConfig(train=TRAIN)
    tuned = generator(config, tools, labels, unlabelled, selection, tmp_path)
    base = dict(tools["load"]().model.named_parameters())
    for name, value in tuned.items():
        assert torch.equal(outside(selection, name, value), outside(selection, name, base[name].detach())), name
    changed = [
        n
        for n in selection.rows
        if not torch.equal(
            inside(selection, f"{n}.weight", tuned[f"{n}.weight"]), base[f"{n}.weight"][selection.rows[n]]
        )
    ]
    assert len(changed) > len(selection.rows) // 2


def test_distillation_without_captions_is_told(tools, labels, unlabelled, selection, tmp_path):
    bare = [dataclasses.replace(p, caption=None) for p in unlabelled]
    with pytest.raises(LeamlError, match="no picture has a caption; give --captions"):
        generator(train_generator.GeneratorConfig(train=TRAIN), tools, labels, bare, selection, tmp_path)


@pytest.mark.parametrize("mode", finetune.MODES)
def test_finetune_modes_change_what_they_should(mode, tools, labels, selection, tmp_path):
    config = finetune.FinetuneConfig(train=TRAIN, mode=mode, lora_rank=2)
    pseudo = [dataclasses.replace(qa, id=f"pseudo{i}", answer="green") for i, qa in enumerate(labels)]
    stage = StageDirectory(tmp_path, "key")
    where = finetune.run(config, stage, labels=labels, pseudo=pseudo, selection=selection, **tools)
    assert stage.done
    assert finetune.run(config, stage, labels=labels, pseudo=pseudo, selection=selection, **tools) == where
    files = where["adapter" if mode != "full" else "path"]
    tensors = load_file(next(files.glob("*.safetensors")))
    linears = models.target_linears(tools["load"]().model)
    if mode == "lora":
        assert {n.split("base_model.model.")[1].rsplit(".lora_", 1)[0] for n in tensors} == set(linears)
    if mode == "selected":
        assert sum(v.numel() for n, v in tensors.items() if n.endswith("delta")) == sum(
            len(rows) * linears[n].in_features for n, rows in selection.rows.items()
        )


def test_labels_and_pseudo_labels_share_every_batch(tools, labels):
    config = finetune.FinetuneConfig(train=TrainConfig(batch_size=8), pseudo_share=0.25)
    streams = finetune._streams(config, tools["prompts"], labels, labels)
    assert [(s.name, s.count) for s in streams] == [("labels", 6), ("pseudo", 2)]
    streams = finetune._streams(config, tools["prompts"], labels, [])
    assert [(s.name, s.count) for s in streams] == [("labels", 8)]
    little = dataclasses.replace(config, train=TrainConfig(batch_size=2), pseudo_share=0.01)
    streams = finetune._streams(little, tools["prompts"], labels, labels)
    assert [(s.name, s.count) for s in streams] == [("labels", 1), ("pseudo", 1)]
    # few pairs beside many labels: no more than their share of all questions
    half = dataclasses.replace(config, pseudo_share=0.5)
    for count, times, wanted in ((1, 1, 2), (1, 2, 1), (1, 20, 1), (2, 1, 3), (4, 1, 4), (12, 1, 4)):
        streams = finetune._streams(half, tools["prompts"], labels[:4] * times, (labels * 3)[:count])
        assert streams[1].count == wanted, (count, times)
    one = dataclasses.replace(config, train=TrainConfig(batch_size=1))
    with pytest.raises(LeamlError, match="at least 2"):
        finetune._streams(one, tools["prompts"], labels, labels)


def test_selected_mode_needs_a_selection(tools, labels, tmp_path):
    with pytest.raises(LeamlError, match="needs the selection"):
        finetune.run(finetune.FinetuneConfig(train=TRAIN), StageDirectory(tmp_path, "key"), labels=labels, **tools)
