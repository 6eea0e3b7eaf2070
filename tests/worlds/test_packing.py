"""Packed rows mean what single-turn chats through the processor mean: same pixels, positions, logits, decisions."""

from __future__ import annotations

import pytest
import torch

from leaml_plugin.worlds import render
from leaml_plugin.worlds.packing import Encoder, encode, logits, pack, patches, question_loss, right, token_losses
from leaml_plugin.worlds.processor import VOCABULARY, build_config, build_processor


@pytest.fixture(scope="module")
def tiny():
    from transformers import Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    config = build_config(width=64, layers=2, vision_width=64, vision_layers=2)
    return Qwen2_5_VLForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    """Saved and loaded again, as users get it."""
    from transformers import AutoProcessor

    directory = tmp_path_factory.mktemp("processor")
    build_processor().save_pretrained(directory)
    return AutoProcessor.from_pretrained(directory, local_files_only=True)


def chat(processor, scene, prompt):
    content = [*({"type": "image"} for _ in scene.frames), {"type": "text", "text": prompt}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    return text, scene.images()


def of_each_kind():
    scenes = [render("general", i, 11) for i in range(12)]
    return [next(s for s in scenes if len(s.frames) == 1), next(s for s in scenes if len(s.frames) == 3)]


def test_patches_are_the_processors(processor):
    scene = of_each_kind()[1]
    want = processor.image_processor(images=scene.images(), return_tensors="pt")
    assert want["image_grid_thw"].tolist() == [[1, 6, 6]] * 3
    torch.testing.assert_close(patches(scene.frames).flatten(0, 1), want["pixel_values"], atol=1e-6, rtol=0)


def test_batched_vision_is_transformers_picture_by_picture(tiny):
    pixels = torch.randn(3, 36, 768)
    grid = torch.tensor([[1, 6, 6]] * 3)
    with torch.no_grad():
        want = tiny.model.visual(pixels.flatten(0, 1), grid_thw=grid).pooler_output
        got = encode(tiny.model.visual, pixels)
    torch.testing.assert_close(got.flatten(0, 1), want, atol=1e-5, rtol=1e-5)


def test_every_question_of_a_row_has_the_logits_of_its_own_chat(tiny, processor):
    encoder = Encoder(processor.tokenizer)
    scenes = of_each_kind()
    packed = pack(encoder, [(s.frames, [(q.prompt, q.answer) for q in s.qas[:4]]) for s in scenes])
    with torch.no_grad():
        scores, _ = logits(tiny, packed)
    number = 0
    for scene in scenes:
        for qa in scene.qas[:4]:
            text, images = chat(processor, scene, qa.prompt)
            inputs = processor(text=[f"{text}{qa.answer}<|end|>"], images=images, return_tensors="pt")
            with torch.no_grad():
                want = tiny(**inputs).logits[0]
            got = scores[packed.block == number]
            n = len(got)
            assert inputs["input_ids"][0, -n:].tolist() == packed.targets[packed.block == number].tolist()
            torch.testing.assert_close(got, want[-n - 1 : -1], atol=1e-4, rtol=1e-4)
            number += 1


def test_right_is_what_greedy_decoding_writes(tiny, processor):
    encoder = Encoder(processor.tokenizer)
    scene = of_each_kind()[0]
    text, images = chat(processor, scene, "What is it?")
    inputs = processor(text=[text], images=images, return_tensors="pt")
    out = tiny.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    # what the model writes itself is right; with another first token it is not
    for tokens, expected in ((out, True), (torch.cat([(out[:1] + 1) % VOCABULARY, out[1:]]), False)):
        packed = pack(encoder, [(scene.frames, [("What is it?", "xxxx")])])
        head = packed.at[:1]
        ids = packed.ids[:, : int(head) + 1]
        packed.ids = torch.cat([ids, tokens[None]], 1)
        n = packed.ids.shape[1]
        positions = packed.positions[:, :, : int(head) + 1]
        more = positions[:, :, -1:] + torch.arange(1, len(tokens) + 1)
        packed.positions = torch.cat([positions, more], 2)
        packed.mask = torch.ones(n, n, dtype=torch.bool).tril()[None, None]
        packed.at, packed.targets = head + torch.arange(len(tokens)), tokens
        packed.block = torch.zeros(len(tokens), dtype=torch.long)
        with torch.no_grad():
            assert right(logits(tiny, packed)[0], packed).tolist() == [expected]


def test_long_targets_do_not_drown_short_ones(processor):
    encoder = Encoder(processor.tokenizer)
    scene = of_each_kind()[0]
    packed = pack(encoder, [(scene.frames, [("a", "no"), ("Describe the image.", scene.true_caption)])])
    scores = torch.randn(len(packed.targets), VOCABULARY)
    losses = token_losses(scores, packed)
    short, long = (losses[packed.block == i] for i in (0, 1))
    weights = [len(short) ** 0.5, len(long) ** 0.5]
    want = (short.mean() * weights[0] + long.mean() * weights[1]) / sum(weights)
    torch.testing.assert_close(question_loss(scores, packed), want)


def test_every_text_survives_the_tokenizer(processor):
    tokenizer = processor.tokenizer
    for text in (
        "ulcerative colitis; z-line",
        "A. None of the above\nB. x",
        "5-10mm",
        "Äußerst, 漢字 \t!",
        " two  blanks ",
    ):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer) == VOCABULARY
    assert len(tokenizer("upper-left; lower-center").input_ids) == 3
