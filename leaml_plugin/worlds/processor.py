"""The tokenizer, the processor, the chat template and the configuration of the tiny Qwen2.5-VL, made by code.

Covers building and saving them so that ``AutoProcessor`` and ``AutoModelForImageTextToText`` load the directory
offline. A picture is 96x96 pixels, 6x6 patches of 16 pixels, merged 2x2: nine image tokens, one a grid cell.
Does not cover training (``pretrain``).
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leaml_plugin.worlds.raster import SIZE

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLProcessor

PATCH, MERGE = 16, 2
VOCABULARY = 1280
TOKENIZER = Path(__file__).with_name("tokenizer.json")
SPECIAL = (
    "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>",
    "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
PAD, END, USER, ASSISTANT, SYSTEM, VISION_START, VISION_END, IMAGE, VIDEO = range(len(SPECIAL))

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for item in message['content'] %}"
    "{% if item['type'] == 'image' or 'image' in item or 'image_url' in item %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif item['type'] == 'video' or 'video' in item %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in item %}{{ item['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# How a server (`transformers serve`) cuts the answer out of what was generated; without it Qwen's own would be taken.
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|assistant|>",
    "fields": {"content": {"close_pattern": r"<\|end\|>", "content": "text"}},
}
# letters (with hyphens inside words), single digits, runs of other signs; a leading blank belongs to the piece
WORDS = r" ?\p{L}+(?:-\p{L}+)*| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s"


def corpus() -> list[str]:
    """What the tokenizer's merges are counted on: the general world's text and everyday words, nothing else."""
    from leaml_plugin.worlds import general
    from leaml_plugin.worlds.rng import Rng

    lines = []
    for index in range(1500):
        scene = general.scene(index, seed=77)
        lines.append(scene.caption)
        for qa in scene.qas:
            lines += [qa.prompt, qa.reply, general.written(qa)]
    lines += [*general.CAPTION_PROMPTS * 40, *general.WRITE_PROMPTS * 40, *[general.SHORT_REQUEST] * 200]
    rng = Rng("tokenizer")
    for _ in range(30):
        lines += [f" {word} {word.capitalize()} {word}" for word in general.EVERYDAY]
        lines.append(" ".join(general.pseudo_word(rng) for _ in range(100)))
    return lines


def train_tokenizer() -> Any:
    """Count the merges of a byte-level BPE of :data:`VOCABULARY` pieces anew.

    The outcome is committed as ``tokenizer.json``, because a checkpoint is worth nothing without the very pieces it
    was trained with, and they would change with any word of the general world. Save over it, then pre-train.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


@lru_cache(maxsize=1)
def build_tokenizer() -> Any:
    """The committed tokenizer with its special tokens and chat template, as a ``PreTrainedTokenizerFast``."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(TOKENIZER)),
        eos_token=SPECIAL[END],
        pad_token=SPECIAL[PAD],
        additional_special_tokens=[s for s in SPECIAL if s not in (SPECIAL[END], SPECIAL[PAD])],
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
        response_template=RESPONSE_TEMPLATE,
    )


def build_processor(tokenizer: Any = None) -> Qwen2_5_VLProcessor:
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    pixels = {"shortest_edge": SIZE * SIZE, "longest_edge": SIZE * SIZE}
    common = {
        "patch_size": PATCH,
        "temporal_patch_size": 1,
        "merge_size": MERGE,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=pixels, **common),
        tokenizer=tokenizer or build_tokenizer(),
        video_processor=Qwen2VLVideoProcessor(size=pixels, **common),
        chat_template=CHAT_TEMPLATE,
    )


def build_config(
    vocabulary: int = VOCABULARY, *, width: int = 160, layers: int = 4, vision_width: int = 128, vision_layers: int = 3
) -> Qwen2_5_VLConfig:
    """The architecture. The rotary sections interleave time, height and width, so that the few rows and columns of a
    picture fall on fast frequencies: with the usual contiguous sections a column's angle would be a few thousandths."""
    from transformers import Qwen2_5_VLConfig

    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": vocabulary, "hidden_size": width, "intermediate_size": width * 3, "num_hidden_layers": layers,
            "num_attention_heads": width // 32, "num_key_value_heads": width // 32, "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [1] * 14 + [2]},
            "bos_token_id": USER, "eos_token_id": END, "pad_token_id": PAD, "tie_word_embeddings": True,
        },
        vision_config={
            "depth": vision_layers, "hidden_size": vision_width, "intermediate_size": vision_width * 3,
            "num_heads": vision_width // 32, "out_hidden_size": width, "patch_size": PATCH, "spatial_merge_size": MERGE,
            "temporal_patch_size": 1, "window_size": SIZE, "fullatt_block_indexes": list(range(vision_layers)),
            "rope_parameters": {"rope_type": "axial", "rope_theta": 100.0},
        },
        image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=VISION_START, vision_end_token_id=VISION_END,
        tie_word_embeddings=True,
    )  # fmt: skip
