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
def study(checkpoint, small):
    from leaml_plugin.study.runner import Study

    return Study(small, checkpoint)
