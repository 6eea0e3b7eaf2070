"""How well a model knows the general world: held-out question answering, and forgetting.

Covers accuracy by greedy decoding, computed without decoding (``packing.right``), on pictures that pre-training never
draws from. Does not cover the evaluation of methods on the other worlds, which goes through lmms-eval.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

HELD_OUT_SEED = 9001  # pre-training draws its scenes under other keys; these pictures are never trained on
OBJECT_TEMPLATES = ("color", "color-at", "what", "where", "exists", "count", "size", "texture")


def accuracy(
    model: Any, encoder: Any, scenes: list[Any], *, batch: int = 25, limit: int | None = None
) -> dict[str, Any]:
    """Exact-match accuracy over the scenes' questions: ``{"overall", "templates": {...}, "questions", "correct"}``.

    ``correct`` lists True or False per question in order. A ``set`` answer counts in its canonical order only,
    multiple choice by the text of the right option.
    """
    import torch

    from leaml_plugin.worlds.packing import logits, pack, right

    model.eval()
    marks: list[bool] = []
    for start in range(0, len(scenes), batch):
        part = [s for s in scenes[start : start + batch] if s.qas]
        if not part:
            continue
        packed = pack(encoder, [(s.frames, [(q.prompt, q.reply) for q in s.qas[:limit]]) for s in part])
        with torch.inference_mode():
            scores, _ = logits(model, packed.to(model.device))
            marks += right(scores, packed.to(model.device)).tolist()
    by_template: dict[str, list[bool]] = defaultdict(list)
    asked = [qa for s in scenes for qa in s.qas[:limit]]
    for qa, mark in zip(asked, marks, strict=True):
        by_template[qa.template].append(mark)
    return {
        "overall": sum(marks) / max(len(marks), 1),
        "templates": {k: sum(v) / len(v) for k, v in sorted(by_template.items())},
        "questions": len(marks),
        "correct": marks,
    }


def general_accuracy(model: Any, encoder: Any, *, pictures: int, seed: int = HELD_OUT_SEED) -> dict[str, Any]:
    """``object`` (mean over questions about single objects), ``overall`` and ``templates`` on held-out pictures."""
    from leaml_plugin.worlds.scenes import render

    scenes = [render("general", i, seed) for i in range(pictures)]
    out = accuracy(model, encoder, scenes)
    marks = out.pop("correct")
    asked = [qa.template for s in scenes for qa in s.qas]
    chosen = [m for m, t in zip(marks, asked, strict=True) if t in OBJECT_TEMPLATES]
    model.train()
    return {
        "object": round(sum(chosen) / max(len(chosen), 1), 4),
        "overall": round(out["overall"], 4),
        "templates": {k: round(v, 3) for k, v in out["templates"].items()},
        "questions": out["questions"],
    }


def general_object_qa(
    model: Any, processor: Any = None, *, pictures: int = 300, seed: int = HELD_OUT_SEED
) -> dict[str, Any]:
    """Held-out general accuracy of a model loaded from the checkpoint (or adapted from it).

    ``processor`` defaults to the shipped one. Returns ``object``, ``overall``, ``templates`` and ``questions``.
    """
    return general_accuracy(model, _encoder(processor), pictures=pictures, seed=seed)


def forgetting(
    model: Any, processor: Any = None, *, pictures: int = 300, seed: int = HELD_OUT_SEED
) -> dict[str, float]:
    """The two figures to take before and after an adaptation: ``qa`` (accuracy) and ``caption_loss`` (nats a token)."""
    import torch

    from leaml_plugin.worlds.general import CAPTION_PROMPTS
    from leaml_plugin.worlds.packing import logits, pack, token_losses
    from leaml_plugin.worlds.scenes import render

    encoder = _encoder(processor)
    scenes = [render("general", i, seed) for i in range(pictures)]
    qa = accuracy(model, encoder, scenes)["overall"]
    total, tokens = 0.0, 0
    for start in range(0, pictures, 25):
        packed = pack(encoder, [(s.frames, [(CAPTION_PROMPTS[0], s.true_caption)]) for s in scenes[start : start + 25]])
        with torch.inference_mode():
            losses = token_losses(logits(model, packed.to(model.device))[0], packed.to(model.device))
        total, tokens = total + float(losses.sum()), tokens + losses.numel()
    return {"qa": qa, "caption_loss": total / tokens}


def _encoder(processor: Any) -> Any:
    from leaml_plugin.worlds.packing import Encoder

    if processor is None:
        from transformers import AutoTokenizer

        from leaml_plugin.worlds.files import checkpoint_path

        return Encoder(AutoTokenizer.from_pretrained(checkpoint_path()))
    return Encoder(getattr(processor, "tokenizer", processor))
