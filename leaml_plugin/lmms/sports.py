"""SPORTU, for the tasks and for ``leaml data sports``: where it is, how it is split, how a row is asked.

Covers: the multiple-choice, open and text-only files of SPORTU with its clips beside them (``LEAML_SPORTS_DATA``), the
synthetic world of the same schema; the test rows by scene; options shuffled by a seed; the option prior learnt from
the labelled scenes; the controls without the clip and with another scene's clip. SPORTU has no Hub repository: its
questions come from GitHub (chili-lab/SPORTU), its clips separately.
Does not cover: SportR (:mod:`leaml_plugin.lmms.sportr`), Sports-QA.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from leaml_plugin import metrics, splits
from leaml_plugin.errors import LeamlError
from leaml_plugin.lmms import video
from leaml_plugin.lmms.cache import build_once
from leaml_plugin.lmms.endoscopy import label_fraction, prompts, synthetic_pictures, world_version
from leaml_plugin.records import QA

DATA_VARIABLE = "LEAML_SPORTS_DATA"
FRAMES_VARIABLE = "LEAML_SPORTS_FRAMES"
LICENCE = "no licence is stated by its authors; ask them before any use beyond research; cite arXiv 2410.08474"
FILES = {"mc": "sportu_video_mc.json", "open": "sportu_video_oe.json", "text": "sportu_text.json"}
LETTERS = "ABCDEFGHIJ"
LEVELS = ("easy", "medium", "hard")
SPORTS = ("american_football", "badminton", "baseball", "basketball", "ice_hockey", "soccer", "volleyball")
DEFAULT_FRAMES = 16
CHOOSE = "Answer with the option's letter from the given choices directly."

# ----------------------------------------------------------------------------------------------------- the source


def data_root(location: str | None = None) -> Path:
    """The directory with SPORTU's files: ``location``, else ``$LEAML_SPORTS_DATA``."""
    location = location or os.environ.get(DATA_VARIABLE)
    hint = (
        f"clone https://github.com/chili-lab/SPORTU, put its clips (<id>.mp4, or <id>/ with frames) anywhere below it, "
        f"and set {DATA_VARIABLE} to that directory; or use the task leaml_sports_synthetic."
    )
    if not location:
        raise LeamlError(f"{DATA_VARIABLE} is not set, and SPORTU cannot be downloaded from the Hub: {hint}")
    root = Path(location).expanduser().resolve()
    if not root.is_dir():
        raise LeamlError(f"{root}: no such directory ({DATA_VARIABLE}): {hint}")
    return root


def synthetic_root(clips: int | None = None, seed: int = 0) -> Path:
    """The embedded sports-like world in the SPORTU schema, made on first use, the same on every machine."""
    clips = clips or synthetic_pictures()

    def build(directory: Path) -> None:
        from leaml_plugin.worlds import export

        export("sports", directory, pictures=clips, seed=seed, schema="sportu")

    return build_once(f"{world_version()}/sports-{clips}-seed{seed}", build)


def source(kind: str, root: Path) -> tuple[str, dict[str, Any]]:
    """What ``datasets.load_dataset`` takes for one of the files (``mc``, ``open`` or ``text``) below ``root``.

    SPORTU's JSON mixes numbers with strings among the options, which no table format accepts, so the rows are
    converted once into the cache, under a name made from their content.
    """
    path = find_file(kind, root)
    rows = read_rows(kind, path)
    digest = hashlib.sha256(json.dumps([kind, str(root), rows]).encode()).hexdigest()[:16]

    def build(directory: Path) -> None:
        from datasets import Dataset, DatasetDict

        DatasetDict({kind: Dataset.from_list([{**row, "root": str(root)} for row in rows])}).save_to_disk(directory)

    return str(build_once(f"sportu-1/{digest}", build)), {"load_from_disk": True}


def find_file(kind: str, root: Path) -> Path:
    wanted = FILES[kind]
    found = sorted(path for path in root.rglob("*.json") if path.name.lower() == wanted)
    if not found:
        raise LeamlError(f"{root}: no {wanted} in it (in any case of letters); it comes with the SPORTU repository.")
    return found[0]


def read_rows(kind: str, path: Path) -> list[dict[str, Any]]:
    """The rows of one SPORTU file with every option and answer as text. Raises :class:`LeamlError` by row."""
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise LeamlError(f"{path}: cannot be read as JSON ({error}); fetch it again.") from error
    if not isinstance(data, list) or not data:
        raise LeamlError(f"{path}: should be a list of questions and is not, or is empty; fetch it again.")
    return [_row(kind, entry, f"{path} entry {i + 1}") for i, entry in enumerate(data)]


def _row(kind: str, entry: Any, where: str) -> dict[str, Any]:
    if not isinstance(entry, Mapping):
        raise LeamlError(f"{where}: should be an object and is {type(entry).__name__}.")
    fields = {str(key).strip().lower(): value for key, value in entry.items()}
    needed = ("question", "answer") if kind == "text" else ("id", "question", "answer")
    for name in needed:
        if fields.get(name) in (None, ""):
            raise LeamlError(f"{where}: has no {name!r}; every SPORTU entry of this file has {', '.join(needed)}.")
    clip = str(fields.get("id") or f"text_{hashlib.sha256(str(fields['question']).encode()).hexdigest()[:12]}").strip()
    scene = splits.scene(clip)
    options: list[str] = []
    answer = str(fields["answer"]).strip()
    if kind == "mc":
        given = fields.get("options")
        if not isinstance(given, Mapping) or not 2 <= len(given) <= len(LETTERS):
            raise LeamlError(f"{where}: 'options' should map 2 to {len(LETTERS)} letters to texts, got {given!r}.")
        letters = [str(letter).strip().upper() for letter in given]
        if letters != list(LETTERS[: len(letters)]) or answer.upper() not in letters:
            raise LeamlError(
                f"{where}: answer {answer!r} is none of the options {', '.join(letters)} (A, B, … in order)."
            )
        options, answer = [str(value).strip() for value in given.values()], answer.upper()
    return {
        "id": clip,
        "scene": scene,
        "sport": scene.rsplit("_", 1)[0],
        "level": str(fields.get("difficulty level", "")).strip().lower(),
        "question": str(fields["question"]).strip(),
        "options": options,
        "answer": answer,
    }


# -------------------------------------------------------------------------------------------------- rows and split


def evaluation_rows(dataset: Any, *, shuffle: bool = True, seed: int = 0, other_clip: bool = False) -> Any:
    """The rows of the test scenes: options shuffled, the option prior's letter in ``blind``, the clip in ``clip``.

    ``other_clip`` shows each question a clip of another test scene of the same sport where there is one.
    """
    from datasets import Dataset

    rows = [dict(row) for row in dataset]
    parts = splits.make_split((row["scene"] for row in rows), label_fraction=label_fraction())
    blind = option_prior(row for row in rows if row["scene"] in parts.labelled)
    kept = [row for row in rows if row["scene"] in parts.test]
    if not kept:
        raise LeamlError(f"the sports data have no test scene among {len(parts.pool)}; use more of them.")
    if shuffle:
        kept = [shuffle_options(row, seed) for row in kept]
    shown = _other_clips(kept) if other_clip else {row["id"]: row["id"] for row in kept}
    index = video.clip_index(Path(kept[0]["root"]))
    missing = sorted({shown[row["id"]] for row in kept if shown[row["id"]].lower() not in index})
    if missing:
        raise LeamlError(
            f"{kept[0]['root']}: {len(missing)} of {len(set(shown.values()))} clips are not there, the first is "
            f"{missing[0]}; put {missing[0]}.mp4 (or {missing[0]}/ with frames) anywhere below it."
        )
    for row in kept:
        row["clip"] = str(index[shown[row["id"]].lower()])
        row["blind"] = blind.answer(row["question"], choices(row)) if row["options"] else ""
    return Dataset.from_list(kept)


def text_rows(dataset: Any) -> Any:
    """All rows of the text-only file: it has no pictures to split by and is tested whole."""
    return dataset


def option_prior(rows: Any) -> metrics.BlindOptions:
    """What the labelled rows say about each option, pictures unseen."""
    return metrics.BlindOptions((row["question"], choices(row), row["answer"]) for row in rows if row["options"])


def choices(row: Mapping[str, Any]) -> dict[str, str]:
    return dict(zip(LETTERS, row["options"]))


def shuffle_options(row: Mapping[str, Any], seed: int = 0) -> dict[str, Any]:
    """The row with its options in an order that depends on seed, clip and question alone, the answer's letter moved.

    As given, 'None of the above' is nearly always D and right in 39 % of the hard questions: 'always D' scores 49 %.
    """
    if not row["options"]:
        return dict(row)
    order = list(range(len(row["options"])))
    random.Random(f"{seed}/{row['id']}/{row['question']}").shuffle(order)
    answer = LETTERS[order.index(LETTERS.index(row["answer"]))]
    return {**row, "options": [row["options"][i] for i in order], "answer": answer}


def _other_clips(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    clips = {row["id"]: (row["sport"], row["scene"]) for row in rows}
    if len({scene for _, scene in clips.values()}) < 2:
        raise LeamlError("showing other clips needs at least two test scenes; use more data.")
    ring = sorted(clips, key=lambda name: (splits.bucket(name, "shuffle"), name))
    other = {}
    for i, name in enumerate(ring):
        rest = [ring[(i + step) % len(ring)] for step in range(1, len(ring))]
        rest = [candidate for candidate in rest if clips[candidate][1] != clips[name][1]]
        same_sport = [candidate for candidate in rest if clips[candidate][0] == clips[name][0]]
        other[name] = (same_sport or rest)[0]
    return other


# ---------------------------------------------------------------------------------------------- asking and scoring


def choice_question(row: Mapping[str, Any]) -> str:
    """The question with its lettered options, as it stands in training files too."""
    if not row["options"]:
        return row["question"]
    return "\n".join([row["question"], *(f"{letter}. {text}" for letter, text in choices(row).items()), CHOOSE])


def question_text(row: Mapping[str, Any]) -> str:
    return prompts().vqa(QA("", (), choice_question(row), "")).prompt


def frame_count() -> int:
    """Frames shown of each clip: ``$LEAML_SPORTS_FRAMES``, 16 by default."""
    text = os.environ.get(FRAMES_VARIABLE, str(DEFAULT_FRAMES))
    if not text.isdecimal() or int(text) < 1:
        raise LeamlError(f"{FRAMES_VARIABLE} must be a number of frames, at least 1, got {text!r}.")
    return int(text)


def clip_frames(row: Mapping[str, Any]) -> list:
    return video.frames(Path(row["clip"]), frame_count())


def no_pictures(row: Mapping[str, Any]) -> list:
    return []
