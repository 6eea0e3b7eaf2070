"""A random checkpoint of the embedded model's architecture, and a study on it that takes seconds."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    from leaml_plugin.worlds.processor import END, PAD, build_config, build_processor, build_tokenizer

    directory = tmp_path_factory.mktemp("checkpoint")
    tokenizer = build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = build_config(len(tokenizer), width=64, layers=2, vision_width=32, vision_layers=1)
        model = Qwen2_5_VLForConditionalGeneration(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:  # with the usual small weights every answer would be the same
                parameter.data.mul_(6)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = END, PAD
    model.save_pretrained(directory)
    build_processor(tokenizer).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def small():
    """The smallest protocol that exercises everything."""
    from leaml_plugin.study.protocol import Protocol

    return Protocol(
        pool=12, test_pictures=4, test_questions=3, general_pictures=2, steps=4, batch=4, caption_batch=2,
        pseudo_pictures=3, samples=2, lora_rank=2, bf16=False,
    )  # fmt: skip


@pytest.fixture(scope="session")
def teacher_captions(tmp_path_factory, small):
    """Captions as a larger teacher would write them that makes no mistake, of the endoscopy pool."""
    from leaml_plugin.study.protocol import LARGER_TEACHER
    from leaml_plugin.study.world import POOL_START, WORLD_SEED
    from leaml_plugin.worlds import render
    from leaml_plugin.worlds.teacher import captions_file, save_captions

    directory = tmp_path_factory.mktemp("teacher")
    scenes = [render("endoscopy", POOL_START + i, WORLD_SEED) for i in range(small.pool)]
    save_captions(captions_file(directory, LARGER_TEACHER, "endoscopy"), scenes, [s.true_caption for s in scenes])
    return directory


@pytest.fixture(scope="session")
def study(checkpoint, small, teacher_captions):
    from leaml_plugin.study.runner import Study

    return Study(small, checkpoint, captions=teacher_captions)
