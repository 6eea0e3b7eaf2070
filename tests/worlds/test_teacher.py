"""The larger teacher grows without changing, learns from pictures of its own, resumes; its captions are checked."""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re

import pytest

from leaml_plugin.errors import LeamlError
from leaml_plugin.worlds import WORLDS, evaluate, export, gate, pretrain, render, teacher
from leaml_plugin.worlds.files import checkpoint_path
from leaml_plugin.worlds.general import GROUNDS
from leaml_plugin.worlds.raster import COLORS, SHAPES, SIZES, TEXTURES
from leaml_plugin.worlds.scenes import POSITIONS, TEACHER_NOISE

SMALL = {"width": 32, "vision_width": 32, "layers": 2, "vision_layers": 2, "steps": 3, "batch": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A random checkpoint with one layer on each side."""
    recipe = pretrain.Recipe(width=32, layers=1, vision_width=32, vision_layers=1)
    run = pretrain.Run(recipe, tmp_path_factory.mktemp("work"))
    directory = tmp_path_factory.mktemp("base")
    pretrain.write_checkpoint(run, directory)
    return directory


@pytest.fixture(scope="module")
def scenes():
    return [render("endoscopy", 3, 5), render("sports", 4, 5), render("garden", 5, 5)]


def answers(scenes):
    return [(scene.frames, [(teacher.PROMPT, scene.true_caption)]) for scene in scenes]


# -- growth and training ---------------------------------------------------------------------------------------------


def test_the_grown_model_computes_what_the_shipped_one_does(scenes, tmp_path):
    import torch

    from leaml_plugin.worlds.packing import logits, pack

    small, encoder = gate.load(checkpoint_path())
    run = pretrain.Run(teacher.Recipe(), tmp_path)
    large = run.model
    batch = pack(encoder, answers(scenes))
    with torch.no_grad():
        before, other = logits(small, batch)[0], logits(large, batch)[0]
        teacher.grow(small, large)
        assert torch.equal(logits(large, batch)[0], before) and not torch.equal(other, before)
    layers = large.model.language_model.layers
    assert (len(layers), len(large.model.visual.blocks)) == (8, 6)
    # all new layers take part in the very first step
    loss = logits(large, batch)[0].square().mean()
    loss.backward()
    for layer in [*layers[1::2], *large.model.visual.blocks[1::2]]:
        last = [p for n, p in layer.named_parameters() if re.search(r"(o_proj|attn\.proj|down_proj)\.weight", n)]
        assert len(last) == 2 and all(not p.any() and p.grad.any() for p in last)


def test_only_whole_multiples_of_the_same_width_grow(tmp_path):
    small, _ = gate.load(checkpoint_path())
    with pytest.raises(LeamlError, match="6 layers cannot be grown from 4"):
        teacher.grow(small, pretrain.Run(teacher.Recipe(layers=6), tmp_path).model)
    with pytest.raises(LeamlError, match="growing keeps the width"):
        teacher.grow(small, pretrain.Run(teacher.Recipe(width=32), tmp_path).model)


def test_killed_and_taken_up_again_it_ends_with_the_same_bytes(base, tmp_path):
    recipe = teacher.Recipe(**SMALL)
    options = {"save_every": 1, "pictures": 2}
    whole = teacher.train(recipe, base, tmp_path / "whole", **options)
    for until in (1, 2):
        assert teacher.train(recipe, base, tmp_path / "parts", until=until, **options).step == until
    (tmp_path / "parts" / "state.tmp").write_bytes(b"half a state")
    last = teacher.train(recipe, base, tmp_path / "parts", **options)
    assert last.step == whole.step == 3
    for run, name in ((whole, "a"), (last, "b")):
        pretrain.write_checkpoint(run, tmp_path / name)
    assert pretrain.weights_hash(tmp_path / "a") == pretrain.weights_hash(tmp_path / "b")
    log = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2, 3] and set(log[-1]["held_out"]) == set(WORLDS)
    with pytest.raises(LeamlError, match=r"another recipe \(base differ"):
        teacher.train(teacher.Recipe(base="other", **SMALL), base, tmp_path / "whole")


def test_it_learns_to_describe_and_nothing_else():
    recipe = teacher.Recipe(**{**SMALL, "batch": 40})
    asked = teacher.training_scenes(recipe, 7)
    assert {scene.world for scene, _ in asked} == set(WORLDS)
    assert asked[3][0].id == teacher.training_scenes(recipe, 7)[3][0].id
    assert {scene.id for scene, _ in asked}.isdisjoint(s.id for s, _ in teacher.training_scenes(recipe, 8))
    cells, grounds = teacher.cell_targets([scene for scene, _ in asked])
    frames = sum(len(scene.frames) for scene, _ in asked)
    assert cells.shape == (frames, 9, 4) and grounds.shape == (frames, 2)
    general = [scene for scene, _ in asked if scene.world == "general"]
    assert teacher.cell_targets(general)[1].equal(pretrain.cell_targets(general)[1])


def test_its_pictures_are_no_others():
    from leaml_plugin.study import world as study

    balance = int(re.search(r"seed=(\d+)", (checkpoint_path().parents[2] / "scripts/balance_worlds.py").read_text())[1])
    others = {study.WORLD_SEED, evaluate.HELD_OUT_SEED, gate.TRAIN_SEED, gate.TEST_SEED, balance}
    assert others.isdisjoint({teacher.SEED, teacher.HELD_OUT}) and teacher.SEED != teacher.HELD_OUT
    recipe = teacher.Recipe()
    drawn = [scene for step in (0, 1, recipe.steps - 1) for scene, _ in teacher.training_scenes(recipe, step)]
    assert {scene.seed for scene in drawn} == {teacher.SEED}
    pixels = {scene.frames[0].tobytes() for scene in drawn}
    pools = [render(world, study.POOL_START + i, study.WORLD_SEED) for world in teacher.CAPTIONED for i in range(20)]
    assert pixels.isdisjoint(scene.frames[0].tobytes() for scene in pools)


# -- captions --------------------------------------------------------------------------------------------------------


def test_it_writes_what_transformers_writes(scenes):
    from transformers import AutoProcessor

    model, encoder = gate.load(checkpoint_path())
    processor = AutoProcessor.from_pretrained(checkpoint_path(), local_files_only=True)
    texts = teacher.describe(model, encoder, scenes, batch=2)
    for scene, text in zip(scenes, texts):
        content = [*({"type": "image", "image": image} for image in scene.images())]
        content.append({"type": "text", "text": teacher.PROMPT})
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        )  # fmt: skip
        out = model.generate(**inputs, max_new_tokens=160, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert processor.tokenizer.decode(out, skip_special_tokens=True).strip() == text
        assert text.endswith("background.") and len(text) > 40
    assert teacher.describe(model, encoder, scenes[::-1], batch=1, longest=3) != texts[::-1]


def test_errors_are_told_apart():
    true = "A large striped red circle at the upper-left, a tiny blue bar at the center. Cloudy pink background."
    cases = {
        true: {},
        "A large red circle at the upper-left, a tiny blue bar at the center. Cloudy pink background.": {"texture": 1},
        "A small striped red ring at the upper-left, a tiny blue bar at the center. Cloudy pink background.":
            {"size": 1, "shape": 1},
        "A tiny blue bar at the center. Lined pink background.": {"overlooked": 1, "ground": 1},
        # what moves within the reading order is still the same thing
        "A tiny blue bar at the upper-left, a large striped red circle at the center-right. Cloudy pink background.":
            {"position": 2},
        "A large striped red circle at the upper-left, a tiny blue bar at the center, a tiny gray star at the center. "
        "Cloudy pink background.": {"invented": 1},
        "A large striped red polyp at the upper-left, a tiny blue bar at the center. Cloudy pink background.":
            {"overlooked": 1, "invented": 1},
        "A large striped red circle moving left, a tiny blue bar at the center. Cloudy pink background.":
            {"position": 1, "motion": 1},
        "": {"overlooked": 2, "ground": 1},
    }  # fmt: skip
    for said, expected in cases.items():
        assert {k: n for k, n in teacher.errors(said, true).items() if n and k != "things"} == expected, said
    assert teacher.errors(true, true)["things"] == 2
    assert teacher.errors("Cloudy pink background.", "Cloudy pink background.").total() == 0


def test_the_generators_captions_have_the_documented_errors():
    many = [render(world, i, 5) for world in ("endoscopy", "garden") for i in range(120)]
    found = teacher.quality([s.caption for s in many], many)
    chance = {"color": 10 / 11, "size": 3 / 4, "position": 8 / 9, "shape": 8 / 9, "overlooked": 1}
    for kind, share in chance.items():
        assert abs(found[kind] - share * TEACHER_NOISE[kind] / 100) < 0.022, kind
    assert found["invented"] < 0.01 and found["motion"] == found["ground"] == 0
    assert teacher.quality([s.true_caption for s in many], many)["right"] == 1


def test_captions_are_kept_with_their_pictures(scenes, tmp_path):
    one, two = (teacher.captions_file(tmp_path / name, "abcd1234", "endoscopy") for name in "ab")
    texts = [scene.caption for scene in scenes]
    teacher.save_captions(one, scenes, texts)
    teacher.save_captions(two, scenes[::-1], texts[::-1])
    assert one.read_bytes() == two.read_bytes() and one.name == "endoscopy.jsonl.gz"
    assert teacher.load_captions(one, scenes[:2]) == {scene.id: scene.caption for scene in scenes[:2]}
    make = "worlds.teacher --captions DIR"
    with pytest.raises(LeamlError, match=f"none.gz: .* not there.*{make}"):
        teacher.load_captions(tmp_path / "none.gz", scenes)
    with pytest.raises(LeamlError, match=f"has no caption of endoscopy-0-000009.*{make}"):
        teacher.load_captions(one, [render("endoscopy", 9)])
    changed = teacher.replace(scenes[0], frames=(scenes[0].frames[0] ^ 1,))
    with pytest.raises(LeamlError, match=f"endoscopy-5-000003 looks otherwise now.*{make}"):
        teacher.load_captions(one, [changed])
    for damaged in (one.read_bytes()[:-20], b"no gzip", gzip.compress(b'{"id": "x"}\n'), gzip.compress(b"[1]\n")):
        two.write_bytes(damaged)
        with pytest.raises(LeamlError, match=r"endoscopy\.jsonl\.gz: is damaged"):
            teacher.load_captions(two, scenes)


def test_the_command_trains_captions_and_says_how_well(base, tmp_path, monkeypatch, capsys):
    def run(*more):
        parser = argparse.ArgumentParser()
        teacher.add_arguments(parser)
        options = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
        options += ["--work", str(tmp_path / "work"), "--base", str(base), "--captions", str(tmp_path / "out")]
        return teacher.main(parser.parse_args([*options, "--pictures", "2", *more]))

    monkeypatch.setattr(teacher, "exact", lambda *args: 0.0)
    # a random model never ends a text
    monkeypatch.setattr(teacher, "describe", lambda model, encoder, scenes, **_: [s.true_caption for s in scenes])
    assert run("--until", "1") == 0 and "1 of 3 steps" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    whole = teacher.caption_pool

    def killed(checkpoint, out, world, **options):
        if world == "sports":
            raise KeyboardInterrupt
        return whole(checkpoint, out, world, **options)

    monkeypatch.setattr(teacher, "caption_pool", killed)
    with pytest.raises(KeyboardInterrupt):
        run()
    monkeypatch.setattr(teacher, "caption_pool", whole)
    (directory,) = (tmp_path / "out").iterdir()
    first = (directory / "endoscopy.jsonl.gz").stat().st_mtime_ns
    assert run() == 0 and "endoscopy: 100.0 % of the captions right" in capsys.readouterr().out
    assert (directory / "endoscopy.jsonl.gz").stat().st_mtime_ns == first, "what is there is not written again"
    figures = json.loads((directory / "card.json").read_text())
    assert figures["sha256"] == pretrain.weights_hash(tmp_path / "work" / "checkpoint")
    assert directory.name == figures["sha256"][:8] and figures["steps"] == 3
    assert figures["recipe"]["base"] == pretrain.weights_hash(base)
    assert set(figures["worlds"]) == {"endoscopy", "sports", "garden"}
    text = (directory / "CARD.md").read_text()
    assert "| sports | larger | 100.0 |" in text and figures["sha256"] in text and "3 steps of 2 pictures" in text
    with pytest.raises(LeamlError, match=r"no model\.safetensors"):
        run("--base", str(tmp_path))


def test_an_export_takes_the_captions_of_a_model(tmp_path):
    told = export("endoscopy", tmp_path / "a", pictures=3, seed=5, teacher=checkpoint_path())
    rows = [json.loads(line) for line in told.captions.read_text().splitlines()]
    model, encoder = gate.load(checkpoint_path())
    some = [render("endoscopy", i, 5) for i in range(3)]
    assert [row["caption"] for row in rows] == teacher.describe(model, encoder, some)
    plain = export("endoscopy", tmp_path / "b", pictures=3, seed=5)
    assert plain.captions.read_text() != told.captions.read_text()
    assert plain.labels.read_text() == told.labels.read_text()
    with pytest.raises(LeamlError, match="make teacher"):
        export("endoscopy", tmp_path / "c", pictures=3, teacher=tmp_path)
    assert not (tmp_path / "c").exists()


# -- the captions that are committed ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def committed():
    from leaml_plugin.study.protocol import LARGER_TEACHER

    return checkpoint_path().parents[2] / "results" / "teacher" / LARGER_TEACHER


def test_the_committed_captions_name_no_term_of_a_domain(committed):
    words = """a an at the that moving left right up down grows shrinks appears disappears stays background"""
    words = {*words.split(), *SHAPES, *COLORS, *SIZES, *TEXTURES, *POSITIONS, *GROUNDS}
    for world in teacher.CAPTIONED:
        rows = [json.loads(row) for row in gzip.decompress((committed / f"{world}.jsonl.gz").read_bytes()).splitlines()]
        seed, start = teacher.POOL
        assert [row["id"] for row in rows] == [f"{world}-{seed}-{start + i:06d}" for i in range(2000)]
        for row in rows:
            assert set(re.findall(r"[a-z-]+", row["caption"].lower())) <= words, row


def test_the_committed_captions_belong_to_the_worlds_and_the_card_tells_the_truth(committed):
    figures = json.loads((committed / "card.json").read_text())
    assert figures["recipe"] == teacher.asdict(teacher.Recipe(base=pretrain.weights_hash(checkpoint_path())))
    assert figures["sha256"].startswith(committed.name) and figures["steps"] == teacher.Recipe().steps
    assert (committed / "CARD.md").read_text() == teacher.card(figures)
    seed, start = teacher.POOL
    for world in teacher.CAPTIONED:
        path = committed / f"{world}.jsonl.gz"
        assert hashlib.sha256(path.read_bytes()).hexdigest() == figures["worlds"][world]["sha256"]
        some = [render(world, start + i, seed) for i in range(40)]
        found = teacher.quality(teacher.load_captions(path, some).values(), some)
        said = figures["worlds"][world]["larger"]
        assert abs(found["right"] - said["right"]) < 0.25 and abs(found["shape"] - said["shape"]) < 0.06
        assert said["right"] > figures["worlds"][world]["world"]["right"] + 0.2, (
            "it sees better than the generator tells"
        )
