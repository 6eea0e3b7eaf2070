"""The recipe of the shipped checkpoint: ``python -m leaml_plugin.worlds.pretrain --work runs/pretrain``.

Covers two phases from random weights, both on the general world only:

1. vision alone: from each merged visual token predict what lies in its grid cell (shape, colour, size, texture) and
   from their mean the background. This grounds the vision tower before any word is learnt.
2. vision and language: eight questions, a caption and question-writing requests about each picture in one packed row,
   with the cell objective kept at a falling weight.

Every step's data is a function of the seed and the step; the state is written every ``--save-every`` steps, so the
command may be killed at any moment and given again. Learning rates warm up, stay, and fall over the last third of
each phase.
Does not cover the gate (``gate``) nor anything about the out-of-distribution worlds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from leaml_plugin.errors import LeamlError
from leaml_plugin.progress import Progress, duration


@dataclass(frozen=True)
class Recipe:
    """What decides the bytes of the checkpoint (with the versions of torch and transformers)."""

    seed: int = 1
    width: int = 160
    layers: int = 4
    vision_width: int = 128
    vision_layers: int = 3
    vision_steps: int = 1500
    vision_batch: int = 64
    joint_steps: int = 12000
    batch: int = 12
    questions: int = 8
    lr: float = 1.5e-3
    vision_lr: float = 0.25  # of the language side's rate in the second phase: text gradients must not undo the first
    cell_weight: float = 1.0  # of the cell objective in the second phase; falls to a fifth
    place_weight: float = 0.3  # of naming the own cell after the first language layer
    budget: int = 260  # tokens of questions and answers a picture in a packed row
    weight_decay: float = 0.02
    bf16: bool = True


HEADS = (10, 12, 5, 5)  # shape, colour, size, texture of a cell; 0 is an empty cell
SCENE_HEADS = (11, 6)  # colour and pattern of the background


class CellHeads:
    """Linear probes on the merged visual tokens; they exist during pre-training only."""

    def __init__(self, width: int):
        import torch

        self.module = torch.nn.ModuleDict({
            "cells": torch.nn.Linear(width, sum(HEADS)),
            "scene": torch.nn.Linear(width, sum(SCENE_HEADS)),
            "place": torch.nn.Linear(width, 9),
        })  # fmt: skip

    def place_loss(self, hidden: Any) -> tuple[Any, float]:
        """Cross-entropy of each image token's own cell, from language states ``[frames, 9, width]``; the accuracy.

        The vision tower has relative positions only, so where a token lies is for the language side to work out, from
        its rotary offset to the picture's start. Asked for directly, it learns that in minutes instead of hours.
        """
        import torch
        from torch.nn import functional as F

        scores = self.module["place"](hidden).float()
        cells = torch.arange(9).expand(len(hidden), 9)
        accuracy = float((scores.argmax(-1) == cells).float().mean())
        return F.cross_entropy(scores.flatten(0, 1), cells.flatten()), accuracy

    def loss(self, features: Any, cells: Any, scene: Any) -> tuple[Any, list[float]]:
        """Summed cross-entropies for ``features [n, 9, width]``, and the accuracy of each cell head on filled cells."""
        from torch.nn import functional as F

        total, accuracy = 0.0, []
        filled = cells[..., 0] > 0
        for i, scores in enumerate(self.module["cells"](features).float().split(HEADS, -1)):
            total = total + F.cross_entropy(scores.flatten(0, 1), cells[..., i].flatten())
            accuracy.append(float((scores.argmax(-1) == cells[..., i])[filled].float().mean()))
        for i, scores in enumerate(self.module["scene"](features.mean(1)).float().split(SCENE_HEADS, -1)):
            total = total + 0.3 * F.cross_entropy(scores, scene[:, i])
        return total, accuracy


def cell_targets(scenes: list[Any]) -> tuple[Any, Any]:
    """``int64 [frames, 9, 4]`` cell labels and ``int64 [frames, 2]`` background labels."""
    import numpy as np
    import torch

    from leaml_plugin.worlds.general import GROUNDS, cell_labels
    from leaml_plugin.worlds.raster import COLORS

    colors = list(COLORS)
    cells = [cell_labels(things) for scene in scenes for things in scene.things]
    ground = [
        (colors.index(s.facts["ground_color"]), GROUNDS.index(s.facts["pattern"])) for s in scenes for _ in s.frames
    ]
    return torch.from_numpy(np.stack(cells)), torch.tensor(ground)


def vision_scenes(recipe: Recipe, step: int) -> list[Any]:
    from leaml_plugin.worlds.general import compose
    from leaml_plugin.worlds.rng import Rng

    return [
        compose(
            Rng("pretrain-vision", recipe.seed, step, i), i, 0, clip=False, questions=0, objects=(1, 2, 3, 4, 5, 4, 3)
        )
        for i in range(recipe.vision_batch)
    ]


def joint_scenes(recipe: Recipe, step: int, encoder: Any) -> list[tuple[Any, list[tuple[str, str]]]]:
    """Scenes with their turns, within the token budget of a row. Clips grow from one in ten to two in five over the
    first third; multiple choice, which takes many tokens for one answer, from one in three questions to all."""
    from leaml_plugin.worlds.general import (
        CAPTION_PROMPTS,
        PLACES_PROMPTS,
        READABLE,
        WRITE_PROMPTS,
        compose,
        dictation,
        phrased,
        places,
        reading,
        written,
    )
    from leaml_plugin.worlds.rng import Rng

    out: list[tuple[Any, list[tuple[str, str]]]] = []
    clips = 10 + min(30, 90 * step // max(recipe.joint_steps, 1))
    other: Any = None  # the last still picture: its caption is read beside the next one
    for i in range(recipe.batch):
        rng = Rng("pretrain-joint", recipe.seed, step, i)
        scene = compose(rng, i, 0, clip=rng.chance(clips), questions=recipe.questions + 2)
        asked = scene.qas[: recipe.questions]
        if rng.below(recipe.joint_steps) > 2 * step:
            asked = tuple(qa for qa in asked if qa.kind != "choice" or rng.chance(33))
        turns = []
        if len(scene.frames) == 1 and rng.chance(25):
            turns.append((rng.choice(PLACES_PROMPTS), places(scene.things[0])))
        elif rng.chance(40):
            turns.append((rng.choice(CAPTION_PROMPTS), scene.true_caption))
        spare = [qa for qa in scene.qas[recipe.questions :] if qa.template not in ("repeat", "naming")]
        if spare and rng.chance(25):
            turns.append((rng.choice(WRITE_PROMPTS), written(rng.choice(spare))))
        if other is not None and rng.chance(50):
            told = [qa for qa in other.qas if qa.template in READABLE]
            turns += [reading(rng, other.true_caption, qa) for qa in rng.shuffled(told)[: rng.between(1, 2)]]
        if rng.chance(15):
            turns.append(dictation(rng))
        turns += [(phrased(rng, qa), qa.reply) for qa in asked]
        room, kept = recipe.budget, []
        for prompt, target in turns:
            tokens = len(encoder(prompt)) + len(encoder(target)) + 3
            if tokens <= room:
                kept.append((prompt, target))
                room -= tokens
        out.append((scene, kept))
        if len(scene.frames) == 1:
            other = scene
    return out


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    warm = min(1.0, (step + 1) / 100)
    rest = max(0.02, (steps - step) / (0.3 * steps))
    return recipe.lr * min(warm, rest, 1.0)


class Run:
    """Model, heads, optimizer and the number of finished steps, with their file."""

    def __init__(self, recipe: Recipe, work: Path):
        import torch
        from transformers import Qwen2_5_VLForConditionalGeneration

        from leaml_plugin.worlds.packing import Encoder
        from leaml_plugin.worlds.processor import build_config, build_tokenizer

        self.recipe, self.work = recipe, work
        work.mkdir(parents=True, exist_ok=True)
        self.tokenizer = build_tokenizer()
        self.encoder = Encoder(self.tokenizer)
        torch.manual_seed(recipe.seed)
        config = build_config(
            len(self.tokenizer), width=recipe.width, layers=recipe.layers,
            vision_width=recipe.vision_width, vision_layers=recipe.vision_layers,
        )  # fmt: skip
        self.model = Qwen2_5_VLForConditionalGeneration(config)
        self.heads = CellHeads(recipe.width)
        self.named = dict(self.model.named_parameters())
        self.named |= {f"heads.{n}": p for n, p in self.heads.module.named_parameters()}
        groups = []
        for sees in (True, False):
            own = [p for n, p in self.named.items() if n.startswith(("model.visual.", "heads.")) == sees]
            for wide in (True, False):
                chosen = [p for p in own if (p.ndim > 1) == wide]
                groups.append({"params": chosen, "weight_decay": recipe.weight_decay if wide else 0.0, "sees": sees})
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.98), eps=1e-8, fused=True)
        self.step = 0
        self.seconds = 0.0
        self.path = work / "state.safetensors"

    def load(self) -> None:
        """Go on from the state file, if there is one of this recipe."""
        import torch
        from safetensors import safe_open

        if not self.path.exists():
            return
        with safe_open(self.path, "pt") as f:
            meta = f.metadata()
            known = json.loads(meta["recipe"])
            changed = [k for k, v in asdict(self.recipe).items() if known.get(k) != v and k not in ("joint_steps",)]
            if changed:
                raise LeamlError(
                    f"{self.path} was begun with another recipe ({', '.join(changed)} differ); "
                    f"give another --work directory or the same options."
                )
            self.step, self.seconds = int(meta["step"]), float(meta["seconds"])
            keys = set(f.keys())
            with torch.no_grad():
                for name, p in self.named.items():
                    p.copy_(f.get_tensor(f"p.{name}"))
                    if f"m.{name}" in keys:
                        self.optimizer.state[p] = {
                            "step": f.get_tensor(f"s.{name}"),
                            "exp_avg": f.get_tensor(f"m.{name}"),
                            "exp_avg_sq": f.get_tensor(f"v.{name}"),
                        }

    def save(self) -> None:
        """Write the state beside the old one and swap them, so that a kill leaves one whole file."""
        from safetensors.torch import save_file

        tensors = {}
        for name, p in self.named.items():
            tensors[f"p.{name}"] = p.detach().contiguous()
            state = self.optimizer.state.get(p)
            if state:
                tensors |= {f"s.{name}": state["step"], f"m.{name}": state["exp_avg"], f"v.{name}": state["exp_avg_sq"]}
        meta = {"step": str(self.step), "seconds": f"{self.seconds:.1f}", "recipe": json.dumps(asdict(self.recipe))}
        fresh = self.path.with_suffix(".tmp")
        save_file(tensors, fresh, metadata=meta)
        os.replace(fresh, self.path)

    def update(self, loss: Any, lr: float, vision_lr: float) -> None:
        import torch

        for group in self.optimizer.param_groups:
            group["lr"] = vision_lr if group["sees"] else lr
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in self.named.values() if p.grad is not None], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def train(
    recipe: Recipe, work: Path, *, save_every: int = 100, evaluate_every: int = 500, until: int | None = None
) -> Run:
    """Train to the recipe's end (or to step ``until``), from the state in ``work`` where there is one."""
    import torch

    from leaml_plugin.worlds.evaluate import general_accuracy
    from leaml_plugin.worlds.packing import encode, logits, pack, patches, question_loss
    from leaml_plugin.worlds.processor import IMAGE

    run = Run(recipe, work)
    run.load()
    total = recipe.vision_steps + recipe.joint_steps
    end = min(total, until) if until is not None else total
    bar = Progress("pre-training", total, unit="step", start=run.step, every=20.0)
    log = (work / "log.jsonl").open("a")
    mark = time.monotonic()
    smooth: dict[str, float] = {}
    states: list[Any] = []  # what the first language layer put out, for the probe

    def keep(_module: Any, _inputs: Any, out: Any) -> None:
        states[:] = [out[0] if isinstance(out, tuple) else out]

    run.model.model.language_model.layers[0].register_forward_hook(keep)

    def note(**values: float) -> None:
        for k, v in values.items():
            if v == v:
                smooth[k] = 0.97 * smooth[k] + 0.03 * v if k in smooth else v

    while run.step < end:
        step = run.step
        if step < recipe.vision_steps:
            scenes = vision_scenes(recipe, step)
            cells, ground = cell_targets(scenes)
            with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bf16):
                features = encode(run.model.model.visual, patches([f for s in scenes for f in s.frames]))
            loss, accuracy = run.heads.loss(features.float(), cells, ground)
            rate = learning_rate(recipe, step, recipe.vision_steps)
            run.update(loss, rate, rate)
            note(cells=loss.item(), **dict(zip(("shape", "color", "size", "texture"), accuracy)))
        else:
            at = step - recipe.vision_steps
            rows = joint_scenes(recipe, at, run.encoder)
            cells, ground = cell_targets([scene for scene, _ in rows])
            batch = pack(run.encoder, [(scene.frames, turns) for scene, turns in rows])
            with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bf16):
                scores, features = logits(run.model, batch)
            answer = question_loss(scores, batch)
            image_states = states[0].float()[batch.ids == IMAGE].view(len(features), 9, -1)
            place, placed = run.heads.place_loss(image_states)
            cell, accuracy = run.heads.loss(features.float(), cells, ground)
            weight = recipe.cell_weight * max(0.2, 1 - at / recipe.joint_steps)
            rate = learning_rate(recipe, at, recipe.joint_steps)
            loss = answer + weight * cell + recipe.place_weight * place
            run.update(loss, rate, rate * recipe.vision_lr)
            note(
                answer=answer.item(), placed=placed, cells=cell.item(),
                **dict(zip(("shape", "color", "size", "texture"), accuracy)),
            )  # fmt: skip
        run.step += 1
        text = " ".join(f"{k} {v:.3f}" for k, v in smooth.items())
        bar.update(note=text)
        if run.step % save_every == 0 or run.step == end:
            now = time.monotonic()
            run.seconds += now - mark
            mark = now
            line: dict[str, Any] = {"step": run.step, "seconds": round(run.seconds, 1), **smooth}
            if run.step > recipe.vision_steps and (run.step % evaluate_every == 0 or run.step == end):
                line["held_out"] = general_accuracy(run.model, run.encoder, pictures=150)
            log.write(json.dumps(line) + "\n")
            log.flush()
            run.save()
    bar.close()
    log.close()
    return run


def write_checkpoint(run: Run, out: Path) -> None:
    """The model in bfloat16 with its processor, ready for ``from_pretrained``; replaces what was there."""
    import torch

    from leaml_plugin.worlds.processor import build_processor

    out.mkdir(parents=True, exist_ok=True)
    model = run.model.to(torch.bfloat16)
    model.generation_config.eos_token_id = model.config.text_config.eos_token_id
    model.generation_config.pad_token_id = model.config.text_config.pad_token_id
    model.save_pretrained(out)
    build_processor(run.tokenizer).save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # written through a private temporary file
    model.to(torch.float32)


def weights_hash(directory: Path) -> str:
    return hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()


def model_card(run: Run, figures: dict[str, Any], note: str = "") -> str:
    """The card of a checkpoint, from its run and the gate's figures."""
    import torch
    import transformers

    recipe, held_out = run.recipe, figures["general"]
    pictures = recipe.vision_steps * recipe.vision_batch + (run.step - recipe.vision_steps) * recipe.batch
    parameters = sum(p.numel() for p in run.model.parameters())
    rows = [
        " | ".join([f"| {world}", *(f"{f[k]:.3f}" for k in ("blind", "zero_shot", "all_labels")), f"{f['passed']} |"])
        for world, f in figures["worlds"].items()
    ]
    templates = ", ".join(f"{name} {value:.2f}" for name, value in held_out["templates"].items())
    return "\n".join([
        "# A tiny Qwen2.5-VL for the embedded worlds",
        "",
        f"{parameters / 1e6:.2f} million parameters ({recipe.layers} language layers of width {recipe.width}, "
        f"{recipe.vision_layers} vision layers of width {recipe.vision_width}), bfloat16, nine image tokens for a "
        "96x96 picture. It exists to compare adaptation methods in minutes on a laptop. It knows coloured shapes and "
        "nothing else; it is no medical or sports model.",
        "",
        f"- Data: {pictures:,} generated pictures and clips of the world `general` (seed {recipe.seed}); no picture, "
        "word or label of the other worlds.",
        f"- Recipe: `make pretrain` (`leaml_plugin/worlds/pretrain.py`): {recipe.vision_steps} steps of "
        f"{recipe.vision_batch} pictures for the vision tower, {run.step - recipe.vision_steps} steps of "
        f"{recipe.batch} pictures with questions for both. {note}".rstrip(),
        f"- Hardware and time: {hardware()}; {duration(run.seconds)}, shared with other work.",
        f"- torch {torch.__version__}, transformers {transformers.__version__}.",
        f"- SHA-256 of model.safetensors: `{figures['sha256']}`",
        "- Licence: Apache-2.0.",
        "",
        "## Held-out general world (exact match under greedy decoding)",
        "",
        f"Questions about single objects: {held_out['object']:.3f}; all questions: {held_out['overall']:.3f} "
        f"({held_out['questions']} questions). By template: {templates}.",
        "",
        "## The gate",
        "",
        "| world | image-blind majority (oracle) | zero-shot | all labels, full fine-tuning | passed |",
        "|---|---|---|---|---|",
        *rows,
        "",
        "`leaml gate` prints these figures again.",
        "",
    ])  # fmt: skip


def hardware() -> str:
    import torch

    name = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            name = line.split(":", 1)[1].strip()
            break
    return f"{name}, {torch.get_num_threads()} threads"


EXAMPLES = """examples:
  leaml pretrain --work runs/pretrain                  # begin, or go on where a kill left it
  leaml pretrain --work runs/pretrain --export-only    # the checkpoint of the state as it is
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--work", type=Path, default=Path("runs/pretrain"), help="state and log (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="where the checkpoint goes (default: WORK/checkpoint)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads; the last bits depend on it (default: 1)")
    parser.add_argument("--save-every", type=int, default=100, metavar="STEPS", help="default: 100")
    parser.add_argument("--until", type=int, metavar="STEP", help="stop early, to go on later")
    parser.add_argument("--export-only", action="store_true", help="write the checkpoint of the state as it is")
    parser.add_argument("--no-card", action="store_true", help="write no model card: the gate's figures take minutes")
    parser.add_argument("--note", default="", help="a sentence for the model card, on how the run came about")
    for name, value in asdict(Recipe()).items():
        kind: dict[str, Any] = {"type": type(value)}
        if isinstance(value, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        parser.add_argument(
            f"--{name.replace('_', '-')}", default=value, help=f"of the recipe (default: {value})", **kind
        )


def main(args: argparse.Namespace) -> int:
    # threads that wait for each other must sleep: on a shared machine spinning costs ten times the work itself
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    torch.set_num_threads(args.threads)
    recipe = Recipe(**{name: getattr(args, name) for name in asdict(Recipe())})
    if args.export_only:
        run = Run(recipe, args.work)
        run.load()
    else:
        run = train(recipe, args.work, save_every=args.save_every, until=args.until)
    out = args.out or args.work / "checkpoint"
    write_checkpoint(run, out)
    digest = weights_hash(out)
    if not args.no_card:
        from leaml_plugin.worlds.gate import measure, verdict

        figures = {**measure(out), "sha256": digest}
        (out / "MODEL_CARD.md").write_text(model_card(run, figures, args.note), encoding="utf-8")
        print("\n".join(verdict(figures)))
    print(f"{out}: {run.step} steps in {duration(run.seconds)}, sha256 {digest[:16]}")
    return 0


def command(
    prog: str,
    description: str,
    epilog: str,
    add_arguments: Callable[[argparse.ArgumentParser], None],
    main: Callable[[argparse.Namespace], int],
) -> int:
    """A recipe run as a module: its exit code, bad input told in one sentence."""
    parser = argparse.ArgumentParser(
        prog=prog, description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    try:
        return main(parser.parse_args())
    except LeamlError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    told = "Pre-train the embedded tiny Qwen2.5-VL on the general world. Kill it and start it again at will."
    raise SystemExit(command("python -m leaml_plugin.worlds.pretrain", told, EXAMPLES, add_arguments, main))
