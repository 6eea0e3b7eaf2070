"""The pre-training recipe goes on where a kill left it and ends with the bytes of an undisturbed run."""

from __future__ import annotations

import pytest

from leaml_plugin.errors import LeamlError
from leaml_plugin.worlds import pretrain

SMALL = pretrain.Recipe(
    width=32, layers=1, vision_width=32, vision_layers=1, vision_steps=2, vision_batch=2, joint_steps=3, batch=2,
    questions=2,
)  # fmt: skip


@pytest.fixture(autouse=True)
def few_questions(monkeypatch):
    """The held-out evaluation at the end asks three pictures, not 150."""
    from leaml_plugin.worlds import evaluate

    full = evaluate.general_accuracy
    monkeypatch.setattr(evaluate, "general_accuracy", lambda model, encoder, pictures: full(model, encoder, pictures=3))


def test_killed_and_taken_up_again_it_ends_with_the_same_bytes(tmp_path):
    whole = pretrain.train(SMALL, tmp_path / "whole", save_every=1)
    for until in (1, 3, 4):  # within the first phase, at the change of phases, within the second
        part = pretrain.train(SMALL, tmp_path / "parts", save_every=1, until=until)
        assert part.step == until
    # a kill in the middle of writing leaves a file that nobody reads
    (tmp_path / "parts" / "state.tmp").write_bytes(b"half a state")
    last = pretrain.train(SMALL, tmp_path / "parts", save_every=1)
    assert last.step == whole.step == 5
    for run, name in ((whole, "a"), (last, "b")):
        pretrain.write_checkpoint(run, tmp_path / name)
    assert pretrain.weights_hash(tmp_path / "a") == pretrain.weights_hash(tmp_path / "b")


def test_a_state_of_another_recipe_is_refused(tmp_path):
    pretrain.train(SMALL, tmp_path, save_every=1, until=1)
    other = pretrain.Recipe(**{**pretrain.asdict(SMALL), "seed": 2})
    with pytest.raises(LeamlError, match=r"another recipe \(seed differ"):
        pretrain.train(other, tmp_path, until=2)


def test_the_checkpoint_loads_offline_through_the_auto_classes(tmp_path):
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from leaml_plugin.worlds import render

    run = pretrain.Run(SMALL, tmp_path / "work")
    pretrain.write_checkpoint(run, tmp_path / "out")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", local_files_only=True)
    processor = AutoProcessor.from_pretrained(tmp_path / "out", local_files_only=True)
    assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration" and model.dtype == torch.bfloat16
    scene = render("sports", 0)
    content = [*({"type": "image", "image": im} for im in scene.images()), {"type": "text", "text": "What is it?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    out = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert out.shape[1] <= inputs["input_ids"].shape[1] + 3
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 27
