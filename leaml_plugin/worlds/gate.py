"""The gate: whether a checkpoint leaves enough room, in every world, to tell adaptation methods apart.

Covers three conditions, each with its figures printed:

* on held-out pictures of the general world, questions about single objects are answered right in >= 75 %;
* in each out-of-distribution world, full fine-tuning on all training labels reaches >= 20 points over the oracle
  image-blind majority on test pictures;
* zero-shot accuracy there stays at least 20 points below that.

The fine-tuning is short, seeded, and packs a picture's questions (``packing``), so that it takes minutes on two cores.
Does not cover methods with fewer labels: that is the study's.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from leaml_plugin.errors import LeamlError
from leaml_plugin.progress import Progress

GENERAL_BAR = 0.75
MARGIN = 0.20
OUT_OF_DISTRIBUTION = ("endoscopy", "sports")
TRAIN_SEED, TEST_SEED = 0, 1  # of the worlds: disjoint pictures

EXAMPLES = """examples:
  leaml gate                                       # the shipped checkpoint
  leaml gate --checkpoint runs/pretrain/checkpoint --json gate.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, help="directory of the model (default: the shipped one)")
    parser.add_argument("--pictures", type=int, default=480, help="labelled training pictures a world (default: 480)")
    parser.add_argument("--steps", type=int, default=160, help="fine-tuning steps of 16 pictures (default: 160)")
    parser.add_argument("--test-pictures", type=int, default=150, help="test pictures a world (default: 150)")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate (default: 1e-3)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the pictures (default: 0)")
    parser.add_argument("--world", action="append", choices=(*OUT_OF_DISTRIBUTION, "garden"), help="only these worlds")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")


def main(args: argparse.Namespace) -> int:
    """Print every figure with its bar; 0 where all conditions hold, 1 otherwise."""
    from leaml_plugin.worlds.files import checkpoint_path

    checkpoint = args.checkpoint or checkpoint_path()
    if not (checkpoint / "config.json").exists():
        raise LeamlError(f"{checkpoint} holds no checkpoint; make one with 'leaml pretrain'.")
    figures = measure(
        checkpoint, worlds=tuple(args.world or OUT_OF_DISTRIBUTION), pictures=args.pictures, steps=args.steps,
        test_pictures=args.test_pictures, lr=args.lr, seed=args.seed,
    )  # fmt: skip
    for line in verdict(figures):
        print(line)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0 if figures["passed"] else 1


def measure(
    checkpoint: Path,
    *,
    worlds: tuple[str, ...] = OUT_OF_DISTRIBUTION,
    pictures: int = 480,
    steps: int = 160,
    test_pictures: int = 150,
    lr: float = 1e-3,
    seed: int = 0,
) -> dict[str, Any]:
    """All figures of the gate: ``general``, ``worlds`` {name: zero_shot, blind, all_labels, ...} and ``passed``."""
    from leaml_plugin.worlds.evaluate import accuracy, general_accuracy
    from leaml_plugin.worlds.scenes import render

    model, encoder = load(checkpoint)
    general = general_accuracy(model, encoder, pictures=200)
    out: dict[str, Any] = {"checkpoint": str(checkpoint), "general": general, "worlds": {}}
    passed = general["object"] >= GENERAL_BAR
    for world in worlds:
        from leaml_plugin.worlds.blind import blind_scores

        began = time.monotonic()
        test = [render(world, i, TEST_SEED) for i in range(test_pictures)]
        blind = blind_scores(test)
        model, encoder = load(checkpoint)
        zero = accuracy(model, encoder, test)["overall"]
        fine_tune(model, encoder, world, pictures=pictures, steps=steps, lr=lr, seed=seed)
        tuned = accuracy(model, encoder, test)
        good = tuned["overall"] >= blind["overall"] + MARGIN and zero <= tuned["overall"] - MARGIN
        passed = passed and good
        out["worlds"][world] = {
            "zero_shot": zero, "blind": blind["overall"], "all_labels": tuned["overall"], "passed": good,
            "questions": tuned["questions"], "pictures": pictures, "steps": steps,
            "templates": {t: [round(blind["templates"][t], 3), round(a, 3)] for t, a in tuned["templates"].items()},
            "seconds": round(time.monotonic() - began, 1),
        }  # fmt: skip
    out["passed"] = passed
    return out


def load(checkpoint: Path) -> tuple[Any, Any]:
    """Model in float32 and token encoder of a checkpoint directory."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    from leaml_plugin.worlds.packing import Encoder

    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32, local_files_only=True)
    return model, Encoder(AutoTokenizer.from_pretrained(checkpoint, local_files_only=True))


def fine_tune(
    model: Any, encoder: Any, world: str, *, pictures: int, steps: int, lr: float = 1e-3, batch: int = 16, seed: int = 0
) -> None:
    """Full fine-tuning in place on all labels of the first ``pictures`` of a world: AdamW, warm-up, linear decay."""
    import torch

    from leaml_plugin.worlds.packing import logits, pack, patches, question_loss
    from leaml_plugin.worlds.scenes import render

    scenes = [s for s in (render(world, i, TRAIN_SEED) for i in range(pictures)) if s.qas]
    pixels = [patches(s.frames) for s in scenes]
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    model.train()
    order: list[int] = []
    bar = Progress(f"fine-tuning on {world}", steps, unit="step", every=20.0)
    for step in range(steps):
        if len(order) < batch:
            order += torch.randperm(len(scenes), generator=generator).tolist()
        chosen, order = order[:batch], order[batch:]
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 20, (steps - step) / (0.6 * steps))
        rows = [(scenes[i].frames, [(q.prompt, q.reply) for q in scenes[i].qas]) for i in chosen]
        packed = pack(encoder, rows, pixels=torch.cat([pixels[i] for i in chosen]))
        loss = question_loss(logits(model, packed)[0], packed)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        bar.update(note=f"loss {loss.item():.3f}")
    bar.close()


def verdict(figures: dict[str, Any]) -> list[str]:
    """The figures as lines to print."""
    general = figures["general"]["object"]
    lines = [f"general object QA {general:.3f} (bar {GENERAL_BAR}): {'pass' if general >= GENERAL_BAR else 'FAIL'}"]
    for world, f in figures["worlds"].items():
        lines.append(
            f"{world}: image-blind majority {f['blind']:.3f}, zero-shot {f['zero_shot']:.3f}, all labels "
            f"{f['all_labels']:.3f} ({100 * (f['all_labels'] - f['blind']):+.1f} points over blind, bar "
            f"+{100 * MARGIN:.0f}), {f['questions']} questions: {'pass' if f['passed'] else 'FAIL'}"
        )
    lines.append("the gate is passed" if figures["passed"] else "the gate is NOT passed")
    return lines
