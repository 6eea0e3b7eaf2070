"""The larger teacher: a captioner of ours, grown from the shipped checkpoint, and the captions that it writes.

Covers the recipe (``python -m leaml_plugin.worlds.teacher --work runs/teacher``): the shipped model gets twice the
language and vision layers, every new one beginning as the identity, and all of it then learns to describe pictures of
all four worlds in the general world's words. It is to the shipped model what a large multimodal model is to a small
one: it sees better, writes longer texts rightly, and knows no term of any domain, because its only targets are
``Scene.true_caption``. Its pictures are drawn under a seed of its own, which no pool, test set or gate uses.

Covers also captioning the pictures that a study draws from, what the captions get wrong, measured against the true
ones beside the noisy generator's, and reading them back (:func:`load_captions`).
Does not cover teachers for real pictures (``leaml_plugin.teachers``, ``leaml caption``).
"""

from __future__ import annotations

import argparse
import datetime
import gzip
import hashlib
import itertools
import json
import os
import re
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leaml_plugin.artifacts import atomic_path, write_json, write_text
from leaml_plugin.errors import LeamlError
from leaml_plugin.progress import Progress, duration, track
from leaml_plugin.worlds import WORLDS
from leaml_plugin.worlds.raster import COLORS, SHAPES, SIZES, TEXTURES
from leaml_plugin.worlds.scenes import POSITIONS, Scene, render

if TYPE_CHECKING:
    from leaml_plugin.worlds import pretrain

SEED = 60_221  # of the teacher's training pictures: no pool, test set, gate, balance or held-out set has it
HELD_OUT = SEED + 1  # of the pictures that its progress is measured on
PROMPT = "Describe the image."
CAPTIONED = ("endoscopy", "sports", "garden")
POOL = (0, 100_000)  # seed and first index of the pictures that a study draws from


@dataclass(frozen=True)
class Recipe:
    """What decides the bytes of the teacher (with the versions of torch and transformers)."""

    base: str = ""  # SHA-256 of the weights that it is grown from
    seed: int = SEED
    width: int = 160
    layers: int = 8
    vision_width: int = 128
    vision_layers: int = 6
    steps: int = 3000
    batch: int = 16
    general: int = 2  # weights of the worlds among a step's pictures
    endoscopy: int = 5
    sports: int = 5
    garden: int = 4
    lr: float = 7e-4
    vision_lr: float = 0.5  # of the language side's rate
    cell_weight: float = 0.5  # of the cell objective of pre-training; falls to a fifth
    weight_decay: float = 0.02


# -- growth ----------------------------------------------------------------------------------------------------------


def grow(small: Any, large: Any) -> None:
    """Copy ``small``'s weights into ``large``, which has the same width and a multiple of its layers, in place.

    Behind each layer of ``small`` stand its copies, whose last projections (of attention and MLP) are zero, so that
    they add nothing: the logits stay bit for bit what they were (block expansion, after LLaMA Pro, arXiv 2401.02415).

    Raises:
        LeamlError: the layers of ``large`` are no multiple of those of ``small``, or its width is another one.
    """
    import torch

    weights = small.state_dict()
    sides = {"model.language_model.layers": (small.model.language_model.layers, large.model.language_model.layers),
             "model.visual.blocks": (small.model.visual.blocks, large.model.visual.blocks)}  # fmt: skip
    times = {}
    for side, (old, new) in sides.items():
        if len(new) % len(old):
            raise LeamlError(f"{len(new)} layers cannot be grown from {len(old)} ({side}); give a multiple.")
        times[side] = len(new) // len(old)
    with torch.no_grad():
        for name, parameter in large.named_parameters():
            side = next((side for side in sides if name.startswith(side + ".")), "")
            source, copy = name, 0
            if side:
                number, rest = name[len(side) + 1 :].split(".", 1)
                layer, copy = divmod(int(number), times[side])
                source = f"{side}.{layer}.{rest}"
            value = weights[source]
            if value.shape != parameter.shape:
                raise LeamlError(f"{name} is {tuple(parameter.shape)} in the larger model and {tuple(value.shape)} in "
                                 "the smaller one; growing keeps the width.")  # fmt: skip
            parameter.copy_(value)
            if copy and re.search(r"\.(o_proj|attn\.proj|down_proj)\.(weight|bias)$", name):
                parameter.zero_()


# -- training --------------------------------------------------------------------------------------------------------


def training_scenes(recipe: Recipe, step: int) -> list[tuple[Scene, str]]:
    """The pictures of a step, each with the prompt that asks for its caption."""
    from leaml_plugin.worlds.general import CAPTION_PROMPTS
    from leaml_plugin.worlds.rng import Rng

    rng = Rng("teacher", recipe.seed, step)
    out = []
    for number in range(recipe.batch):
        world = rng.weighted(WORLDS, [getattr(recipe, world) for world in WORLDS])
        out.append((render(world, step * recipe.batch + number, recipe.seed), rng.choice(CAPTION_PROMPTS)))
    return out


def cell_targets(scenes: Sequence[Scene]) -> tuple[Any, Any]:
    """As ``pretrain.cell_targets``, for every world: the background is read off the caption, which ends with it."""
    import numpy as np
    import torch

    from leaml_plugin.worlds.general import GROUNDS, cell_labels
    from leaml_plugin.worlds.raster import COLORS

    cells = [cell_labels(things) for scene in scenes for things in scene.things]
    grounds = []
    for scene in scenes:
        pattern, color = scene.true_caption.lower().split()[-3:-1]
        grounds += [(list(COLORS).index(color), GROUNDS.index(pattern))] * len(scene.frames)
    return torch.from_numpy(np.stack(cells)), torch.tensor(grounds)


def begin(recipe: Recipe, base: Path, work: Path) -> pretrain.Run:
    """The grown model with its optimizer, at the step of the state in ``work``, or at the beginning."""
    from leaml_plugin.worlds import pretrain
    from leaml_plugin.worlds.gate import load

    run = pretrain.Run(recipe, work)  # type: ignore[arg-type]
    grow(load(base)[0], run.model)
    run.load()
    return run


def train(
    recipe: Recipe,
    base: Path,
    work: Path,
    *,
    save_every: int = 100,
    evaluate_every: int = 500,
    pictures: int = 40,
    until: int | None = None,
) -> pretrain.Run:
    """Train to the recipe's end (or to step ``until``), from the state in ``work`` where there is one.

    Every ``evaluate_every`` steps ``log.jsonl`` says how many captions of ``pictures`` held-out pictures of each world
    would come out right.
    """
    from leaml_plugin.worlds.packing import logits, pack, question_loss
    from leaml_plugin.worlds.pretrain import learning_rate

    run = begin(recipe, base, work)
    end = min(recipe.steps, until) if until is not None else recipe.steps
    bar = Progress("growing the teacher", recipe.steps, unit="step", start=run.step, every=20.0)
    smooth: dict[str, float] = {}
    mark = time.monotonic()
    with (work / "log.jsonl").open("a") as log:
        while run.step < end:
            asked = training_scenes(recipe, run.step)
            scenes = [scene for scene, _ in asked]
            batch = pack(run.encoder, [(scene.frames, [(prompt, scene.true_caption)]) for scene, prompt in asked])
            run.model.train()
            scores, features = logits(run.model, batch)
            caption = question_loss(scores, batch)
            cell, accuracy = run.heads.loss(features, *cell_targets(scenes))
            weight = recipe.cell_weight * max(0.2, 1 - run.step / recipe.steps)
            rate = learning_rate(recipe, run.step, recipe.steps)  # type: ignore[arg-type]
            run.update(caption + weight * cell, rate, rate * recipe.vision_lr)
            values = {"caption": caption.item(), **dict(zip(("shape", "color", "size", "texture"), accuracy))}
            for name, value in values.items():
                if value == value:
                    smooth[name] = 0.97 * smooth.get(name, value) + 0.03 * value
            run.step += 1
            bar.update(note=" ".join(f"{name} {value:.3f}" for name, value in smooth.items()))
            if run.step % save_every == 0 or run.step == end:
                now = time.monotonic()
                run.seconds, mark = run.seconds + now - mark, now
                line: dict[str, Any] = {"step": run.step, "seconds": round(run.seconds, 1), **smooth}
                if run.step % evaluate_every == 0 or run.step == end:
                    line["held_out"] = {world: exact(run.model, run.encoder, world, pictures) for world in WORLDS}
                log.write(json.dumps(line) + "\n")
                log.flush()
                run.save()
    bar.close()
    return run


def exact(model: Any, encoder: Any, world: str, pictures: int) -> float:
    """The share of held-out pictures that greedy decoding would describe exactly right."""
    import torch

    from leaml_plugin.worlds.packing import logits, pack, right

    model.eval()
    marks: list[bool] = []
    for start in range(0, pictures, 20):
        scenes = [render(world, index, HELD_OUT) for index in range(start, min(start + 20, pictures))]
        batch = pack(encoder, [(scene.frames, [(PROMPT, scene.true_caption)]) for scene in scenes])
        with torch.inference_mode():
            marks += right(logits(model, batch)[0], batch).tolist()
    return round(sum(marks) / len(marks), 3)


# -- captions --------------------------------------------------------------------------------------------------------


def describe(model: Any, encoder: Any, scenes: Sequence[Scene], *, batch: int = 100, longest: int = 160) -> list[str]:
    """What the model answers to ``PROMPT`` for each scene, decoded greedily, at most ``longest`` tokens.

    Scenes with equally many frames share their prompt's length, so that none is padded: the texts are those of
    ``model.generate`` picture by picture (tested).
    """
    import torch

    from leaml_plugin.worlds.processor import build_tokenizer

    tokenizer = build_tokenizer()
    groups: dict[int, list[int]] = {}
    for number, scene in enumerate(scenes):
        groups.setdefault(len(scene.frames), []).append(number)
    texts = [""] * len(scenes)
    model.eval()
    with torch.inference_mode():
        for numbers in groups.values():
            for start in range(0, len(numbers), batch):
                some = numbers[start : start + batch]
                for number, ids in zip(some, _greedy(model, encoder, [scenes[n].frames for n in some], longest)):
                    texts[number] = tokenizer.decode(ids, skip_special_tokens=True).strip()
    return texts


def _greedy(model: Any, encoder: Any, pictures: Sequence[Sequence[Any]], longest: int) -> list[list[int]]:
    """Token ids written for pictures of equally many frames, each up to its end token."""
    import numpy as np
    import torch
    from transformers import DynamicCache

    from leaml_plugin.worlds.packing import encode, patches, prefix
    from leaml_plugin.worlds.processor import ASSISTANT, END, IMAGE

    head, at, here = prefix(len(pictures[0]))
    tail = [*encoder(PROMPT), END, ASSISTANT]
    at = np.concatenate([at, np.stack([np.arange(here, here + len(tail))] * 3)], 1)
    ids = torch.tensor([[*head, *tail]] * len(pictures))
    positions = torch.from_numpy(at)[:, None].expand(-1, len(pictures), -1)
    features = encode(model.model.visual, patches([frame for frames in pictures for frame in frames]))
    embeds = model.get_input_embeddings()(ids)
    embeds = embeds.masked_scatter((ids == IMAGE)[:, :, None], features.flatten(0, 1).to(embeds.dtype))
    cache, written = DynamicCache(), []
    done = torch.zeros(len(pictures), dtype=torch.bool)
    while len(written) < longest and not bool(done.all()):
        hidden = model.model.language_model(
            inputs_embeds=embeds, position_ids=positions, past_key_values=cache, use_cache=True
        ).last_hidden_state[:, -1]
        chosen = model.lm_head(hidden).argmax(-1).masked_fill(done, END)
        written.append(chosen)
        done |= chosen == END
        embeds = model.get_input_embeddings()(chosen[:, None])
        positions = positions[:, :, -1:] + 1
    return [[token for token in row if token != END] for row in torch.stack(written, 1).tolist()]


def described(scenes: Iterable[Scene], checkpoint: Path, *, batch: int = 100) -> Iterator[Scene]:
    """The scenes with ``caption`` by the model in ``checkpoint`` in place of the noisy generator's."""
    from leaml_plugin.worlds.gate import load

    model, encoder = load(checkpoint)
    scenes = iter(scenes)
    while some := list(itertools.islice(scenes, batch)):
        for scene, text in zip(some, describe(model, encoder, some, batch=batch)):
            yield replace(scene, caption=text)


# -- what captions get wrong -----------------------------------------------------------------------------------------

_THING = re.compile(
    rf"an? ({'|'.join(SIZES)}) (?:({'|'.join(TEXTURES[1:])}) )?({'|'.join(COLORS)}) ({'|'.join(SHAPES)}) "
    rf"(?:at the ({'|'.join(sorted(POSITIONS, key=len, reverse=True))})|((?:moving|that) \w+))",
    re.IGNORECASE,
)
_ASPECTS = ("size", "texture", "color", "shape", "position", "motion")
KINDS = ("overlooked", "invented", "shape", "color", "size", "texture", "position", "motion")
_ALIKE = 3  # things that differ in more of the six aspects than this are two different things


def read(caption: str) -> tuple[list[tuple[str, ...]], int, str]:
    """The things that a caption names (their six aspects), how many parts it has that name none, and the background."""
    body, _, ground = caption.strip().rstrip(".").rpartition(". ")
    parts = body.split(", ") if body else []
    found = [_THING.fullmatch(part) for part in parts]
    things = [tuple((text or "").lower() for text in match.groups()) for match in found if match]
    return things, sum(match is None for match in found), ground.lower()


def errors(said: str, true: str) -> Counter[str]:
    """What ``said`` gets wrong: counts by :data:`KINDS`, ``ground``, and ``things``, the number of true things.

    Said and true things are paired, the most alike first (of equally alike ones the nearest in order); what differs in
    more than three of six aspects is no pair, but one thing overlooked and one invented.
    """
    told, unreadable, ground = read(said)
    things, _, true_ground = read(true)
    pairs = sorted(
        (sum(a != b for a, b in zip(one, other)), abs(i - j), i, j)
        for i, one in enumerate(told)
        for j, other in enumerate(things)
    )
    counts: Counter[str] = Counter(things=len(things), ground=int(ground != true_ground))
    left, open_ = set(range(len(told))), set(range(len(things)))
    for differing, _, i, j in pairs:
        if differing <= _ALIKE and i in left and j in open_:
            left.remove(i)
            open_.remove(j)
            counts.update(name for name, a, b in zip(_ASPECTS, told[i], things[j]) if a != b)
    counts["overlooked"] += len(open_)
    counts["invented"] += len(left) + unreadable
    return counts


def quality(captions: Iterable[str], scenes: Iterable[Scene]) -> dict[str, float]:
    """The share of captions that are exactly right, and errors of each kind per thing that is there.

    ``ground`` is a share of the captions.
    """
    total: Counter[str] = Counter()
    number = right = 0
    for caption, scene in zip(captions, scenes, strict=True):
        total += errors(caption, scene.true_caption)
        right += caption == scene.true_caption
        number += 1
    rates = {kind: round(total[kind] / max(total["things"], 1), 4) for kind in KINDS}
    ground = round(total["ground"] / number, 4)
    return {"captions": number, "right": round(right / number, 4), **rates, "ground": ground}


# -- files -----------------------------------------------------------------------------------------------------------


def picture_digest(frames: Sequence[Any]) -> str:
    """Names the pixels of a picture or clip: a caption belongs to these and no others."""
    digest = hashlib.sha256()
    for frame in frames:
        digest.update(frame.tobytes())
    return digest.hexdigest()[:6]


def captions_file(directory: Path, teacher: str, world: str) -> Path:
    """Where the captions by a teacher lie, which is named by the first eight digits of its weights' SHA-256."""
    return Path(directory) / teacher / f"{world}.jsonl.gz"


def save_captions(path: Path, scenes: Sequence[Scene], captions: Sequence[str]) -> None:
    """Write captions with their pictures' names and digests, sorted, the same bytes for the same captions."""
    pairs = sorted(zip(scenes, captions, strict=True), key=lambda pair: pair[0].id)
    rows = [{"id": s.id, "picture": picture_digest(s.frames), "caption": caption} for s, caption in pairs]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    with atomic_path(path) as fresh:
        fresh.write_bytes(gzip.compress(text.encode(), 9, mtime=0))


_MAKE = "make it with 'python -m leaml_plugin.worlds.teacher --captions DIR'"


def require_captions(path: Path) -> None:
    """Raise :class:`LeamlError` where a file of captions is missing."""
    if not Path(path).is_file():
        raise LeamlError(f"{path}: captions by the larger teacher are not there; take them from the repository, or "
                         f"{_MAKE}.")  # fmt: skip


def load_captions(path: Path, scenes: Iterable[Scene]) -> dict[str, str]:
    """The caption of each scene, by its name.

    Raises:
        LeamlError: the file is missing or damaged, or was made for other pictures than these.
    """
    path = Path(path)
    require_captions(path)
    rows: dict[str, dict[str, str]] = {}
    try:
        for line in gzip.decompress(path.read_bytes()).decode().splitlines():
            row = json.loads(line)
            rows[row["id"]] = {"picture": row["picture"], "caption": row["caption"]}
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
        where = f"{path}, line {len(rows) + 1}" if rows else path
        raise LeamlError(f"{where}: is damaged ({error}); take it from the repository again, or {_MAKE}.") from error
    out = {}
    for scene in scenes:
        row = rows.get(scene.id)
        if row is None:
            raise LeamlError(f"{path}: has no caption of {scene.id}; it was made for other pictures: {_MAKE}.")
        if row["picture"] != picture_digest(scene.frames):
            raise LeamlError(f"{path}: {scene.id} looks otherwise now than when it was captioned: {_MAKE}.")
        out[scene.id] = row["caption"]
    return out


# -- the command -----------------------------------------------------------------------------------------------------


def caption_pool(checkpoint: Path, out: Path, world: str, *, start: int, pictures: int, seed: int) -> dict[str, Any]:
    """Write the captions of one world's pictures, unless they are there; returns what they and the others get wrong.

    ``world`` (the noisy generator) and ``larger`` are measured on all pictures, ``shipped`` on the first 300.
    """
    from leaml_plugin.worlds.files import checkpoint_path
    from leaml_plugin.worlds.gate import load

    numbers = track(range(start, start + pictures), f"drawing {world}", unit="picture")
    scenes = [render(world, index, seed) for index in numbers]
    path = captions_file(out, teacher_name(checkpoint), world)
    if not path.exists():
        shown = track(described(scenes, checkpoint), f"captioning {world}", pictures, unit="picture")
        save_captions(path, scenes, [scene.caption for scene in shown])
    written = load_captions(path, scenes)
    some = scenes[:300]
    return {
        "larger": quality([written[scene.id] for scene in scenes], scenes),
        "world": quality([scene.caption for scene in scenes], scenes),
        "shipped": quality(describe(*load(checkpoint_path()), some), some),
        "pictures": {"seed": seed, "start": start, "count": pictures},
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }


def teacher_name(checkpoint: Path) -> str:
    """The first eight digits of the SHA-256 of a checkpoint's weights: the teacher's name."""
    from leaml_plugin.worlds.pretrain import weights_hash

    return weights_hash(checkpoint)[:8]


def card(figures: Mapping[str, Any]) -> str:
    """The teacher's card, from the figures that ``card.json`` holds."""
    recipe = figures["recipe"]
    share = {world: recipe[world] / sum(recipe[w] for w in WORLDS) for world in WORLDS}
    parts = [
        "# The larger teacher and its captions",
        "",
        f"{figures['parameters'] / 1e6:.2f} million parameters ({recipe['layers']} language layers of width "
        f"{recipe['width']}, {recipe['vision_layers']} vision layers of width {recipe['vision_width']}), grown from "
        f"the shipped checkpoint (SHA-256 `{recipe['base'][:16]}`) by identity layers, then trained whole. The weights "
        "are not in the repository; `make teacher` makes them again.",
        "",
        f"- Recipe: `make teacher` (`leaml_plugin/worlds/teacher.py`), {figures['steps']} steps "
        f"of {recipe['batch']} pictures ({', '.join(f'{world} {100 * part:.0f} %' for world, part in share.items())}), "
        f"drawn under seed {recipe['seed']}, which no pool or test set has.",
        "- Targets: the true captions in the general world's words, never a domain term, no question, no answer.",
        f"- Hardware and time: {figures['hardware']}; {duration(figures['seconds'])}, shared with other work.",
        f"- torch {figures['torch']}, transformers {figures['transformers']}; {figures['date']}.",
        f"- SHA-256 of model.safetensors: `{figures['sha256']}`",
        f'- Captions: the answers to "{PROMPT}", decoded greedily. Each line has the caption\'s picture with a digest '
        "of its pixels.",
        "- Licence: Apache-2.0.",
        "",
        "## What the captions get wrong",
        "",
        "In per cent: captions exactly right; per thing that is there, how many are overlooked or invented, or have a "
        "wrong shape, colour, size, texture, position or motion; captions with a wrong background. `world` is the "
        "noisy generator on the same pictures, `shipped` the checkpoint as it is (first 300 pictures).",
        "",
    ]
    columns = ("right", *KINDS, "ground")
    parts += [f"| world | captions by | {' | '.join(columns)} |", f"|{'---|' * (len(columns) + 2)}"]
    for world in CAPTIONED:
        found = figures["worlds"][world]
        for by in ("larger", "world", "shipped"):
            cells = " | ".join(f"{100 * found[by][name]:.1f}" for name in columns)
            parts.append(f"| {world} | {by} | {cells} |")
    return "\n".join([*parts, ""])


def card_figures(run: pretrain.Run, checkpoint: Path, worlds: Mapping[str, Any]) -> dict[str, Any]:
    import torch
    import transformers

    from leaml_plugin.worlds.pretrain import hardware, weights_hash

    return {
        "recipe": asdict(run.recipe),
        "steps": run.step,
        "seconds": round(run.seconds),
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "hardware": hardware(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": datetime.date.today().isoformat(),
        "prompt": PROMPT,
        "sha256": weights_hash(checkpoint),
        "worlds": dict(worlds),
    }


EXAMPLES = """examples:
  python -m leaml_plugin.worlds.teacher --work runs/teacher         # begin, or go on where a kill left it
  python -m leaml_plugin.worlds.teacher --captions results/teacher  # where leaml study looks for the captions
  leaml world endoscopy --teacher runs/teacher/checkpoint --output data/endoscopy    # captions of any pictures
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--work", type=Path, default=Path("runs/teacher"),
                        help="state, log and checkpoint (default: %(default)s)")  # fmt: skip
    parser.add_argument("--base", type=Path, help="the checkpoint to grow (default: the shipped one)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads; the last bits depend on it (default: 1)")
    parser.add_argument("--save-every", type=int, default=100, metavar="STEPS", help="default: 100")
    parser.add_argument("--until", type=int, metavar="STEP", help="stop early and write no captions, to go on later")
    parser.add_argument("--captions", type=Path, metavar="DIR", help="where the captions go (default: WORK/captions)")
    parser.add_argument("--pictures", type=int, default=2000, help="pictures of each world to caption (default: 2000)")
    parser.add_argument("--start", type=int, default=POOL[1], help="index of the first of them (default: %(default)s)")
    parser.add_argument("--world-seed", type=int, default=POOL[0], help="of these pictures (default: %(default)s)")
    for name, value in asdict(Recipe()).items():
        if name != "base":
            option = f"--{name.replace('_', '-')}"
            parser.add_argument(option, default=value, type=type(value), help=f"of the recipe (default: {value})")


def main(args: argparse.Namespace) -> int:
    # as in pre-training: threads that wait for each other must sleep
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    from leaml_plugin.worlds import pretrain
    from leaml_plugin.worlds.files import checkpoint_path

    torch.set_num_threads(args.threads)
    base = args.base or checkpoint_path()
    if not (base / "model.safetensors").is_file():
        raise LeamlError(f"{base}: has no model.safetensors; give the directory of the tiny base model.")
    options = {name: getattr(args, name) for name in asdict(Recipe()) if name != "base"}
    recipe = Recipe(base=pretrain.weights_hash(base), **options)
    run = train(recipe, base, args.work, save_every=args.save_every, until=args.until)
    if run.step < recipe.steps:
        print(f"{args.work}: {run.step} of {recipe.steps} steps; the same command without --until goes on.")
        return 0
    checkpoint, out = args.work / "checkpoint", args.captions or args.work / "captions"
    pretrain.write_checkpoint(run, checkpoint)
    worlds = {
        world: caption_pool(checkpoint, out, world, start=args.start, pictures=args.pictures, seed=args.world_seed)
        for world in CAPTIONED
    }
    figures = card_figures(run, checkpoint, worlds)
    directory = captions_file(out, teacher_name(checkpoint), "").parent
    write_json(directory / "card.json", figures)
    write_text(directory / "CARD.md", card(figures))
    for world, found in worlds.items():
        print(f"{world}: {100 * found['larger']['right']:.1f} % of the captions right, generator "
              f"{100 * found['world']['right']:.1f} %")  # fmt: skip
    print(f"{directory}: captions of {args.pictures} pictures a world by a teacher of {duration(run.seconds)}")
    return 0


if __name__ == "__main__":
    from leaml_plugin.worlds.pretrain import command

    told = (
        "Grow the larger teacher from the shipped checkpoint and caption the study's pictures with it. "
        "Kill it and start it again at will."
    )
    raise SystemExit(command("python -m leaml_plugin.worlds.teacher", told, EXAMPLES, add_arguments, main))
