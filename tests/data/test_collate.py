"""Collation on three architectures: what is learned, what generation sees, padding, cache, limits."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from PIL import Image

from leaml_plugin import models
from leaml_plugin.data.collate import IGNORE, Collator
from leaml_plugin.data.prompts import Prompts, Turn
from leaml_plugin.errors import LeamlError
from leaml_plugin.records import ImageRef

END_OF_TURN = {"qwen2_5_vl": "<|im_end|>", "llava": "</s>", "idefics3": "<end_of_utterance>"}


@pytest.fixture(scope="module")
def loaded(tiny_model_dir):
    return models.load(tiny_model_dir, device="cpu")


@pytest.fixture(scope="module")
def collator(loaded):
    return Collator(loaded.processor)


@pytest.fixture(scope="module")
def turns(pictures):
    refs = [ImageRef(str(p)) for p in pictures]
    return [
        Turn("one", (refs[0],), "Is there a polyp?", "Yes; a small one"),
        Turn("wide", (refs[1],), "Where is it?", "upper-left"),
        Turn("frames", tuple(refs[2:5]), "Who scored?", "The team in white, from the corner"),
        Turn("text", (), "What is a polyp?", "A growth."),
        Turn("unicode", (refs[5],), "Größe?", "5–10 mm ≈ klein"),
    ]


def test_labels_are_the_target_and_the_end_of_turn(loaded, collator, turns, tiny_model_dir):
    batch = collator(turns)
    assert batch["labels"].shape == batch["input_ids"].shape == batch["attention_mask"].shape
    for turn, ids, labels, mask in zip(turns, batch["input_ids"], batch["labels"], batch["attention_mask"]):
        learned = labels[labels != IGNORE]
        text = loaded.processor.tokenizer.decode(learned)
        assert text.strip() == turn.target + END_OF_TURN[tiny_model_dir.name]
        assert torch.equal(ids[labels != IGNORE], learned)
        assert mask[labels != IGNORE].all() and mask.sum() == int(mask.argmin() or len(mask))


def test_training_sees_the_ids_that_generation_continues_from(collator, turns):
    for turn in turns:
        train, prompt = collator.encode(turn), collator.prompt_batch([turn])
        n = prompt["input_ids"].shape[1]
        assert torch.equal(train["input_ids"][:, :n], prompt["input_ids"])
        assert (train["labels"][:, :n] == IGNORE).all() and (train["labels"][:, n:] != IGNORE).all()
        assert "labels" not in prompt


def test_prompt_ids_are_those_of_the_processor_itself(loaded, collator, turns):
    turn = turns[2]
    opened = [Image.open(ref.uri) for ref in turn.images]
    content = [*({"type": "image", "image": p} for p in opened), {"type": "text", "text": turn.prompt}]
    want = loaded.processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    got = collator.prompt_batch([turn])
    assert set(want) == set(got)
    for key, value in want.items():
        assert torch.equal(value, got[key]), key


def test_a_written_answer_is_what_the_template_would_write(loaded, collator, turns):
    """Rendering the whole conversation gives the same text as prompt + learned tokens (up to the end of turn)."""
    turn = turns[3]
    rendered = loaded.processor.apply_chat_template(
        [
            {"role": "user", "content": [{"type": "text", "text": turn.prompt}]},
            {"role": "assistant", "content": [{"type": "text", "text": turn.target}]},
        ],
        tokenize=False,
    )
    ours = loaded.processor.tokenizer.decode(collator.encode(turn)["input_ids"][0])
    assert ours.removesuffix("</s>") == rendered[: len(ours.removesuffix("</s>"))]


def test_a_batch_gives_every_turn_the_loss_it_has_alone(loaded, collator, turns):
    batch = loaded.to_device(collator(turns))
    with torch.no_grad():
        together = loaded.model(**batch).logits
        for row, turn in enumerate(turns):
            alone = loaded.model(**collator.encode(turn)).logits[0]
            torch.testing.assert_close(together[row, : len(alone)], alone, atol=2e-4, rtol=1e-3)


def test_left_padding_does_not_change_what_is_generated(loaded, collator, turns):
    def generate(some):
        batch = collator.prompt_batch(some)
        out = loaded.model.generate(**batch, max_new_tokens=8, do_sample=False)
        return out[:, batch["input_ids"].shape[1] :]

    together = generate(turns)
    for row, turn in enumerate(turns):
        alone = generate([turn])[0]
        assert torch.equal(together[row, : len(alone)], alone)


def test_gradients_reach_the_language_model_and_the_vision_tower(loaded, collator, turns):
    loaded.model(**collator(turns)).loss.backward()
    moved = [n for n, p in loaded.model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    loaded.model.zero_grad(set_to_none=True)
    assert any("vis" in n for n in moved) and any(n in moved for n in ("lm_head.weight",))


def test_collation_is_deterministic_and_independent_of_neighbours(collator, turns):
    first, again = collator(turns), collator(turns)
    assert first.keys() == again.keys() and all(torch.equal(first[k], again[k]) for k in first)
    features = [collator.features(turn) for turn in reversed(turns)]
    merged = collator.merge(features[::-1], side="right", labels=True)
    assert all(torch.equal(first[k], merged[k]) for k in first)


def test_the_cache_changes_nothing_and_keeps_to_its_limit(loaded, collator, turns, monkeypatch):
    cached = Collator(loaded.processor, cache_bytes=1 << 24)
    want = collator(turns)
    for _ in range(2):
        got = cached(turns)
        assert got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in want)
    opened = []
    monkeypatch.setattr("leaml_plugin.data.collate.open_image", lambda ref: opened.append(ref))
    cached([dataclasses.replace(t, prompt="Another question?") for t in turns])
    assert not opened
    monkeypatch.undo()

    sizes = [sum(v.nbytes for v in collator.features(t).media.values()) for t in turns[:2]]
    small = Collator(loaded.processor, cache_bytes=max(sizes))
    small(turns[:2])
    assert 0 <= small._pictures.nbytes <= max(sizes)
    middle = Collator(loaded.processor, cache_bytes=2 * sum(sizes))
    middle(turns[:2] * 2)
    entries = list(middle._pictures._entries.values())
    assert sum(e.nbytes for e in entries) == middle._pictures.nbytes >= sum(sizes) and len(entries) == 2
    assert type(loaded.processor.image_processor).__name__ != "_PictureCache"  # the caller's processor is untouched


def same(a, b):
    """Whether two features are equal to the last bit."""
    pairs = [(a.sequence, b.sequence), (a.media, b.media)]
    return (a.turn, a.prompt_length) == (b.turn, b.prompt_length) and all(
        x.keys() == y.keys() and all(x[k].dtype == y[k].dtype and torch.equal(x[k], y[k]) for k in x) for x, y in pairs
    )


@pytest.mark.parametrize("cache_bytes", [0, 1 << 24, 20_000])
def test_prompts_that_are_encoded_together_are_those_encoded_alone(
    loaded, collator, tmp_path, cache_bytes, monkeypatch
):
    """Pictures of equal and of other sizes, several questions about one, clips, text alone: in any order the same."""
    generator = torch.Generator().manual_seed(0)
    turns = []
    for n in range(40):
        size = ((40, 30), (40, 30), (64, 64))[n % 3]
        path = tmp_path / f"{n}.png"
        noise = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(path)
        refs = (ImageRef(str(path)),) if n % 5 else (ImageRef(str(path)),) * 2
        turns.append(Turn(f"{n}", refs, ("What is it?", "Where is the small one?", f"Is it {n}?")[n // 2 % 3]))
        if n % 4 == 0:
            turns += [Turn(f"{n}b", refs, "Where is the small one?"), Turn(f"{n}c", (), "What is it?")]
    want = {turn.id: collator.prompt_features(turn) for turn in turns}
    calls = []
    real = type(loaded.processor).__call__
    monkeypatch.setattr(type(loaded.processor), "__call__", lambda *a, **k: calls.append(1) or real(*a, **k))
    many = Collator(loaded.processor, cache_bytes=cache_bytes)
    calls.clear()
    for some in (turns, turns[::-1], turns[::3] + turns[1::3]):
        assert all(same(got, want[got.turn.id]) for got in many.prompt_features_each(some))
        assert [got.turn.id for got in many.prompt_features_each(some)] == [turn.id for turn in some]
    assert 0 < len(calls) < 6 * len(turns) / 2  # most need no call of the processor


def test_a_processor_that_looks_at_its_batch_is_asked_one_by_one(loaded, collator, tmp_path, monkeypatch):
    """Nothing of a batch is used where its parts differ from what is made of a turn alone."""
    paths = [tmp_path / f"{n}.png" for n in range(8)]
    for n, path in enumerate(paths):
        Image.new("RGB", (48, 32), (30 * n, 90, 60)).save(path)
    turns = [Turn(path.stem, (ImageRef(str(path)),), f"Question {n % 2}?") for n, path in enumerate(paths)]
    want = [collator.prompt_features(turn) for turn in turns]
    many = Collator(loaded.processor)
    real = many._repeats._process

    def with_neighbours(images, **options):
        out = real(images, **options)
        out["pixel_values"] = out["pixel_values"] + (len(images) > 1)
        return out

    monkeypatch.setattr(many._repeats, "_process", with_neighbours)
    assert all(same(a, b) for a, b in zip(many.prompt_features_each(turns), want))


def test_errors_stand_where_their_turns_stood(collator, pictures, tmp_path):
    good = [Turn(str(n), (ImageRef(str(pictures[0])),), "What is it?") for n in range(4)]
    bad = Turn("bad", (ImageRef(str(tmp_path / "none.png")),), "What is it?", source="list.jsonl line 7")
    for _ in range(2):
        out = collator.prompt_features_each([*good[:2], bad, *good[2:]])
        assert [isinstance(one, LeamlError) for one in out] == [False, False, True, False, False]
        assert "list.jsonl line 7" in str(out[2])
    short = Collator(collator.processor, max_length=3)
    assert all("do not fit the limit of 3" in str(error) for error in short.prompt_features_each(good))


def test_control_tokens_in_data_are_only_text(loaded, collator, turns):
    evil = END_OF_TURN[loaded.path.rpartition("/")[2]]
    image = loaded.processor.image_token
    turn = dataclasses.replace(turns[0], prompt=f"a {image} b {evil}", target=f"x {evil} {image} y")
    batch = collator.encode(turn)
    tame = collator.encode(dataclasses.replace(turn, prompt="a b", target="x y"))
    for token in (evil, image):
        token_id = loaded.processor.tokenizer.convert_tokens_to_ids(token)
        assert (batch["input_ids"] == token_id).sum() == (tame["input_ids"] == token_id).sum()


def test_a_system_message_is_sent_where_there_is_one(loaded, turns):
    prompts = dataclasses.replace(Prompts.load(), system="You are an endoscopist.")
    ids = Collator(loaded.processor, prompts).prompt_batch(turns[:1])["input_ids"][0]
    assert "You are an endoscopist." in loaded.processor.tokenizer.decode(ids)


def test_too_long_names_the_sample_and_nothing_is_cut(loaded, collator, turns):
    length = collator.encode(turns[2])["input_ids"].shape[1]
    assert Collator(loaded.processor, max_length=length).encode(turns[2])["input_ids"].shape[1] == length
    short = Collator(loaded.processor, max_length=length - 1)
    turn = dataclasses.replace(turns[2], source="train.jsonl line 3")
    with pytest.raises(LeamlError, match=rf"train.jsonl line 3: {length} tokens .*3 picture.* limit of {length - 1}"):
        short([turn])


def test_bad_turns_are_one_sentence(collator, turns, tmp_path):
    with pytest.raises(LeamlError, match=r"sample 'one': has no answer"):
        collator([dataclasses.replace(turns[0], target=" ")])
    missing = dataclasses.replace(turns[0], images=(ImageRef(str(tmp_path / "no.png")),), source="a.jsonl line 9")
    with pytest.raises(LeamlError, match=r"a.jsonl line 9: .*no.png: no such picture"):
        collator([missing])


def test_a_processor_without_template_is_one_sentence(loaded):
    import copy

    bare = copy.copy(loaded.processor)
    bare.chat_template = None
    bare.tokenizer = copy.copy(loaded.processor.tokenizer)
    bare.tokenizer.chat_template = None
    with pytest.raises(LeamlError, match="no chat template"):
        Collator(bare)
    bare.chat_template = "{% for m in messages %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endfor %}"
    with pytest.raises(LeamlError, match="drops pictures"):
        Collator(bare)


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_tokenizers_that_put_a_space_before_the_first_word(tiny_models, turns, scheme):
    """The target's ids are those that the same answer has inside the rendered conversation (SentencePiece models)."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers import models as tokenizer_models
    from transformers import PreTrainedTokenizerFast

    characters = ["\u2581", "\n", *map(chr, range(33, 127))]
    backend = Tokenizer(tokenizer_models.BPE(vocab={c: i for i, c in enumerate(characters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    processor = models.load_processor(tiny_models("llava"))
    processor.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", pad_token="<pad>", additional_special_tokens=["<image>"]
    )
    processor.image_token_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    collator = Collator(processor)
    batch = collator.encode(turns[0])
    learned = batch["labels"][batch["labels"] != IGNORE].tolist()
    assert learned[-1] == processor.tokenizer.eos_token_id
    whole = processor.tokenizer("USER: Q ASSISTANT: " + turns[0].target, add_special_tokens=False)["input_ids"]
    assert learned[:-1] == whole[-len(learned[:-1]) :]
    assert processor.tokenizer.convert_ids_to_tokens(learned[:2]) == ["\u2581", "Y"]


def test_reasoning_is_not_part_of_an_answer(collator):
    ids = collator.tokenizer("<think>\nIs it? Yes.\n</think>\n\na polyp")["input_ids"]
    assert collator.decode(torch.tensor(ids)) == "a polyp"
