"""Six more architectures in memory, for the ways in which processors differ: tiles of one picture padded to the most
(LLaVA-OneVision), tiles in one stack (InternVL), token types (Gemma 3), deep-stacked patches (Qwen3-VL), one row a
sample with cross-attention masks (Mllama), pictures padded to the largest (Pixtral); and SmolVLM, whose processor
needs a package of its own.
"""

from __future__ import annotations

import tiny_models as tiny
import transformers as tf

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}{% if c['type'] == 'image' %}IMAGE"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _tokenizer(*special: str, bos: str | None = None):
    return tiny.byte_tokenizer([*special, "<|im_start|>"], eos="<|im_end|>", pad="<|endoftext|>", bos=bos)


def _vision(**kw) -> dict:
    return dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, **kw)


def _text(tok, **kw) -> dict:
    return {**tiny._text_config(tok, tok.eos_token), **kw}


def llava_onevision():
    tok = _tokenizer("<image>", "<video>")
    pinpoints = [[28, 56], [56, 28], [56, 56]]
    processor = tf.LlavaOnevisionProcessor(
        image_processor=tf.LlavaOnevisionImageProcessor(
            size={"height": 28, "width": 28}, image_grid_pinpoints=pinpoints
        ),
        tokenizer=tok,
        video_processor=tf.LlavaOnevisionVideoProcessor(),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE.replace("IMAGE", "<image>"),
    )
    config = tf.LlavaOnevisionConfig(
        text_config=tf.Qwen2Config(**_text(tok, model_type="qwen2")),
        vision_config=tf.SiglipVisionConfig(**_vision(image_size=28, patch_size=14), vision_use_head=False),
        image_token_id=tok.convert_tokens_to_ids("<image>"),
        video_token_id=tok.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-1,
    )
    return tf.LlavaOnevisionForConditionalGeneration(config), processor


def internvl():
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    tok = _tokenizer(*names.values(), "<video>")
    tok.video_token = "<video>"
    for name, token in names.items():
        setattr(tok, name, token)
        setattr(tok, f"{name}_id", tok.convert_tokens_to_ids(token))
    processor = tf.InternVLProcessor(
        image_processor=tf.GotOcr2ImageProcessor(size={"height": 28, "width": 28}, crop_to_patches=True, max_patches=4),
        tokenizer=tok,
        video_processor=tf.InternVLVideoProcessor(),
        image_seq_length=1,
        chat_template=TEMPLATE.replace("IMAGE", "<IMG_CONTEXT>"),
    )
    config = tf.InternVLConfig(
        text_config=tf.Qwen2Config(**_text(tok, model_type="qwen2")),
        vision_config=tf.InternVLVisionConfig(**_vision(image_size=[28, 28], patch_size=[14, 14])),
        image_token_id=tok.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=1,
    )
    return tf.InternVLForConditionalGeneration(config), processor


def gemma3():
    names = {"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<image_soft>"}
    tok = _tokenizer(*names.values())
    for name, token in names.items():
        setattr(tok, name, token)
        setattr(tok, f"{name}_id", tok.convert_tokens_to_ids(token))
    processor = tf.Gemma3Processor(
        image_processor=tf.Gemma3ImageProcessor(size={"height": 28, "width": 28}),
        tokenizer=tok,
        image_seq_length=4,
        chat_template=TEMPLATE.replace("IMAGE", "<boi>"),
    )
    config = tf.Gemma3Config(
        text_config=_text(
            tok, model_type="gemma3_text", head_dim=8, layer_types=["sliding_attention", "full_attention"]
        ),
        vision_config=_vision(image_size=28, patch_size=7, model_type="siglip_vision_model", vision_use_head=False),
        image_token_id=tok.image_token_id,
        boi_token_id=tok.boi_token_id,
        eoi_token_id=tok.eoi_token_id,
        mm_tokens_per_image=4,
    )
    model = tf.Gemma3ForConditionalGeneration(config)
    # starts at 0, which would hide the pictures
    model.model.multi_modal_projector.mm_input_projection_weight.data.normal_(0, 0.2)
    return model, processor


def qwen3_vl():
    _, _, processor = tiny._qwen2_5_vl()
    tok = processor.tokenizer
    ids = tok.convert_tokens_to_ids
    processor = tf.Qwen3VLProcessor(
        image_processor=tf.Qwen2VLImageProcessor(min_pixels=32 * 32, max_pixels=32 * 32 * 16, patch_size=16),
        tokenizer=tok,
        video_processor=tf.Qwen3VLVideoProcessor(),
        chat_template=tiny.QWEN_TEMPLATE,
    )
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    config = tf.Qwen3VLConfig(
        text_config=_text(tok, model_type="qwen3_vl_text", head_dim=8, rope_parameters=rope),
        vision_config=dict(
            depth=2,
            hidden_size=32,
            intermediate_size=64,
            num_heads=2,
            out_hidden_size=32,
            patch_size=16,
            spatial_merge_size=2,
            deepstack_visual_indexes=[0],
            num_position_embeddings=64,
        ),
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
    )
    return tf.Qwen3VLForConditionalGeneration(config), processor


def mllama():
    tok = _tokenizer("<|image|>", bos="<|begin|>")
    processor = tf.MllamaProcessor(
        image_processor=tf.MllamaImageProcessor(size={"height": 28, "width": 28}, max_image_tiles=2),
        tokenizer=tok,
        chat_template=TEMPLATE.replace("IMAGE", "<|image|>"),
    )
    text = _text(tok, cross_attention_layers=[1], num_hidden_layers=3)
    text.pop("model_type")
    config = tf.MllamaConfig(
        text_config=text,
        vision_config=dict(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_global_layers=1,
            attention_heads=2,
            image_size=28,
            patch_size=14,
            vision_output_dim=64,
            intermediate_layers_indices=[1],
            max_num_tiles=2,
            supported_aspect_ratios=[[1, 1], [1, 2], [2, 1]],
        ),
        image_token_index=tok.convert_tokens_to_ids("<|image|>"),
    )
    model = tf.MllamaForConditionalGeneration(config)
    for name, p in model.named_parameters():
        if "gate" in name and p.numel() == 1:
            p.data.fill_(1.0)  # the gates of cross attention start at 0, which would hide the pictures
    return model, processor


def pixtral():
    tok = _tokenizer("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    processor = tf.PixtralProcessor(
        image_processor=tf.PixtralImageProcessor(size={"longest_edge": 56}, patch_size={"height": 7, "width": 7}),
        tokenizer=tok,
        patch_size=7,
        spatial_merge_size=1,
        chat_template=TEMPLATE.replace("IMAGE", "[IMG]"),
    )
    config = tf.LlavaConfig(
        text_config=tf.LlamaConfig(**_text(tok)),
        vision_config=tf.PixtralVisionConfig(**_vision(image_size=56, patch_size=7)),
        image_token_id=tok.convert_tokens_to_ids("[IMG]"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return tf.LlavaForConditionalGeneration(config), processor


def smolvlm():
    _, _, processor = tiny._idefics3()
    tok = processor.tokenizer
    sizes = {"size": {"longest_edge": 56}, "max_image_size": {"longest_edge": 28}}
    processor = tf.SmolVLMProcessor(
        image_processor=tf.SmolVLMImageProcessor(**sizes),
        tokenizer=tok,
        video_processor=tf.SmolVLMVideoProcessor(**sizes),
        image_seq_len=4,
        chat_template=tiny.IDEFICS_TEMPLATE,
    )
    config = tf.SmolVLMConfig(
        text_config=_text(tok),
        vision_config=_vision(image_size=28, patch_size=7),
        image_token_id=tok.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    return tf.SmolVLMForConditionalGeneration(config), processor


BUILDERS = {f.__name__: f for f in (llava_onevision, internvl, gemma3, qwen3_vl, mllama, pixtral, smolvlm)}
