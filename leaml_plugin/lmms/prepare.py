"""``leaml data``: from Kvasir-VQA or SPORTU to the files that ``leaml adapt`` takes, under a label budget.

Covers: the split of the tasks (the test part is theirs, picture by picture); a labelled part that is a share of the
training pictures; the other training pictures without labels, with their captions to be filled or taken from a file;
pictures copied as they are, one row in memory at a time; taking up an interrupted run.
Does not cover: writing captions (any captioning model will do: ``captions.jsonl`` says for which pictures).

What lies in the output directory afterwards::

    train.jsonl        labelled questions                 test.jsonl   the questions of the test pictures
    unlabelled.jsonl   training pictures without labels   captions.jsonl   the teacher's captions of these
    pictures/          every picture once                 prepare.json     what was asked for, and how much came of it
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leaml_plugin import metrics, splits
from leaml_plugin.artifacts import atomic_path, read_json, write_json, write_text
from leaml_plugin.errors import LeamlError, unknown_name
from leaml_plugin.lmms import endoscopy, sports, video
from leaml_plugin.progress import Progress

EXAMPLES = """examples:
  leaml data endoscopy --output data/endo                              # Kvasir-VQA from the Hub, 1 % labels
  leaml data endoscopy --data kvasir-vqa --labels 0.05 --output data/endo
  leaml data sports --data SPORTU --captions captions.jsonl --output data/sports
  leaml data endoscopy --synthetic --labels 0.1 --output data/world    # the embedded world; nothing to download
"""

_SUFFIX = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "BMP": ".bmp", "GIF": ".gif", "TIFF": ".tif"}


@dataclass(frozen=True)
class Prepared:
    """What was written: paths, and how many pictures and questions each part has."""

    train: Path
    unlabelled: Path
    captions: Path
    test: Path
    counts: Mapping[str, int]


# ------------------------------------------------------------------------------------------------------- endoscopy


def endoscopy_files(
    output: str | os.PathLike[str],
    *,
    data: str | None = None,
    synthetic: bool = False,
    labels: float = splits.LABEL_FRACTION,
    captions: str | os.PathLike[str] | None = None,
    max_unlabelled: int | None = None,
) -> Prepared:
    """Files from Kvasir-VQA: the Hub's, a local copy (``data``), or the embedded world of its schema.

    Args:
        output: directory to write; an interrupted run of the same settings is taken up.
        labels: the share of the training pictures that keep their labels, in (0, 1].
        captions: JSONL with ``image`` (name or path of a picture) and ``caption``; ``captions.jsonl`` in the data
            directory is taken where there is one.
        max_unlabelled: keep at most so many unlabelled pictures, chosen by hash.

    Raises:
        LeamlError: data that cannot be had or lack a column, settings that differ from those in ``output``.
    """
    out = Path(output)
    source = endoscopy.synthetic_source() if synthetic else endoscopy.source(data)
    settings = {"dataset": "endoscopy", "source": _source_name(source, data), "labels": labels}
    if (done := _claim(out, settings | {"max_unlabelled": max_unlabelled})) and captions is None:
        return done
    ids = [str(row["img_id"]) for row in _kvasir_rows(source, ["img_id"])]
    split = splits.make_split(ids, label_fraction=labels)
    keep = _limit(split.unlabelled, max_unlabelled)
    writer = _Writer(out)
    train, test, sources = [], [], {}
    bar = Progress("endoscopy", len(ids), unit="row")
    for number, row in enumerate(_kvasir_rows(source, None)):
        name = str(row["img_id"])
        bar.update()
        if name in split.unlabelled and name not in keep:
            continue
        if name not in sources:
            sources[name] = writer.picture(name, row["image"], f"row {number + 1} (img_id {name})")
        if name in split.unlabelled:
            continue
        question, answer = str(row["question"]).strip(), str(row["answer"]).strip()
        line = {
            "id": f"{name}#{number}",
            "image": sources[name],
            "question": question,
            "answer": answer,
            "template": metrics.normalise_question(question),
            "family": metrics.family(question),
        }
        (test if name in split.test else train).append(line)
    bar.close()
    pictures = {"labelled": len(split.labelled), "test": len(split.test)}
    unlabelled = {name: sources[name] for name in keep}
    return writer.finish(train, unlabelled, test, captions or _beside(data, source), pictures)


def _source_name(source: tuple[str, dict[str, Any]], data: str | None) -> str:
    return str(Path(data).resolve()) if data else (source[0] if source[0] != "parquet" else "local")


def _kvasir_rows(source: tuple[str, dict[str, Any]], columns: Sequence[str] | None) -> Iterator[Mapping[str, Any]]:
    """The rows one by one, pictures as their encoded bytes; of parquet files only ``columns`` are read."""
    from datasets import Image, load_dataset, load_from_disk

    path, kwargs = source
    if kwargs.get("load_from_disk"):
        stored = load_from_disk(path)
        if endoscopy.SPLIT not in stored:
            raise LeamlError(f"{path}: has no split {endoscopy.SPLIT!r} but {', '.join(stored)}; save it as that.")
        rows = stored[endoscopy.SPLIT]
        rows = rows.select_columns(list(columns)) if columns else rows
        names = rows.column_names
    else:
        rows = load_dataset(
            path, split=endoscopy.SPLIT, streaming=True, **kwargs, **({"columns": list(columns)} if columns else {})
        )
        names = rows.column_names or list(next(iter(rows)))
    missing = [name for name in columns or endoscopy.COLUMNS if name not in names]
    if missing:
        raise LeamlError(
            f"{path}: has no column {', '.join(missing)} (it has {', '.join(names)}); it is no copy of Kvasir-VQA."
        )
    if "image" in names:
        rows = rows.cast_column("image", Image(decode=False))
    return iter(rows)


# ---------------------------------------------------------------------------------------------------------- sports


def sports_files(
    output: str | os.PathLike[str],
    *,
    data: str | None = None,
    synthetic: bool = False,
    labels: float = splits.LABEL_FRACTION,
    captions: str | os.PathLike[str] | None = None,
    max_unlabelled: int | None = None,
    frames: int | None = None,
) -> Prepared:
    """Files from SPORTU's multiple-choice questions; a clip becomes ``frames`` pictures in order (16 by default).

    Questions hold their options, shuffled and written exactly as the task ``leaml_sports`` asks them; answers are
    letters. Labels are budgeted by scene. Other arguments as for :func:`endoscopy_files`.
    """
    out = Path(output)
    frames = frames or sports.frame_count()
    root = sports.synthetic_root() if synthetic else sports.data_root(data)
    settings = {"dataset": "sports", "source": str(root), "labels": labels, "frames": frames}
    if (done := _claim(out, settings | {"max_unlabelled": max_unlabelled})) and captions is None:
        return done
    rows = [sports.shuffle_options(row) for row in sports.read_rows("mc", sports.find_file("mc", root))]
    split = splits.make_split((row["scene"] for row in rows), label_fraction=labels)
    clips = {row["id"]: row["scene"] for row in rows}
    keep = _limit(frozenset(clip for clip, scene in clips.items() if scene in split.unlabelled), max_unlabelled)
    wanted = [clip for clip, scene in clips.items() if scene not in split.unlabelled or clip in keep]
    index = video.clip_index(root)
    missing = [clip for clip in wanted if clip.lower() not in index]
    if missing:
        raise LeamlError(
            f"{root}: {len(missing)} of {len(wanted)} clips are not there, the first is {missing[0]}; put "
            f"{missing[0]}.mp4 (or {missing[0]}/ with frames) anywhere below it."
        )
    writer = _Writer(out)
    bar = Progress("sports", len(wanted), unit="clip")
    pictures = {}
    for clip in wanted:
        pictures[clip] = writer.clip(clip, index[clip.lower()], frames)
        bar.update()
    bar.close()
    train, test = [], []
    for number, row in enumerate(rows):
        if row["scene"] in split.unlabelled:
            continue
        line = {
            "id": f"{row['id']}#{number}",
            "images": pictures[row["id"]],
            "question": sports.choice_question(row),
            "answer": row["answer"],
            "template": metrics.normalise_question(row["question"]),
            "offered": row["options"],
            "level": row["level"],
            "sport": row["sport"],
        }
        (test if row["scene"] in split.test else train).append(line)
    parts = {"labelled": split.labelled, "test": split.test}
    counts = {part: sum(scene in scenes for scene in clips.values()) for part, scenes in parts.items()}
    unlabelled = {clip: pictures[clip] for clip in keep}
    return writer.finish(train, unlabelled, test, captions or _beside(str(root), ("", {})), counts)


# ------------------------------------------------------------------------------------------------- what both need


_PARTS = ("train", "unlabelled", "captions", "test")


def _claim(out: Path, settings: Mapping[str, Any]) -> Prepared | None:
    """What an earlier run of the same settings has completed, if any; an error where the directory holds other things.

    The settings are written down at once, so that an interrupted run is known again.
    """
    marker = out / "prepare.json"
    if marker.is_file():
        record = read_json(marker)
        before = record.get("settings", {})
        changed = [name for name in settings if before.get(name) != settings[name]]
        if changed:
            raise LeamlError(
                f"{out}: was prepared with another {', '.join(changed)} "
                f"({', '.join(str(before.get(name)) for name in changed)}); choose another --output."
            )
        paths = {name: out / f"{name}.jsonl" for name in _PARTS}
        if record.get("complete") and all(path.is_file() for path in paths.values()):
            # lines that have been filled in meanwhile
            filled = sum(bool(caption) for _, caption in _caption_lines(paths["captions"]))
            return Prepared(counts={**record["counts"], "captions": filled}, **paths)
    elif out.is_dir() and any(out.iterdir()):
        raise LeamlError(f"{out}: is not empty and was not written by 'leaml data'; choose another --output.")
    elif out.exists() and not out.is_dir():
        raise LeamlError(f"{out}: is a file; choose another --output.")
    write_json(marker, {"settings": dict(settings), "complete": False})
    return None


def _limit(names: frozenset[str], most: int | None) -> frozenset[str]:
    if most is None:
        return names
    if most < 0:
        raise LeamlError(f"--max-unlabelled must not be negative, got {most}.")
    return frozenset(sorted(names, key=lambda name: (splits.bucket(name, "unlabelled"), name))[:most])


def _beside(data: str | None, source: tuple[str, dict[str, Any]]) -> Path | None:
    """``captions.jsonl`` in the data directory, where there is one."""
    directories = [Path(data)] if data else []
    files = source[1].get("data_files", {}).get(endoscopy.SPLIT, [])
    directories += [Path(file).parent for file in files[:1]] + [Path(file).parent.parent for file in files[:1]]
    return next((d / "captions.jsonl" for d in directories if (d / "captions.jsonl").is_file()), None)


def _caption_lines(path: str | os.PathLike[str]) -> Iterator[tuple[list[str], str]]:
    """The names that each line's picture may go by (file stem, frame directory, id), and its caption."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise LeamlError(f"{path}: the captions cannot be read ({error}).") from error
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            caption = str(entry["caption"]).strip()
            names = [str(entry[key]) for key in ("id", "img_id") if key in entry]
            files = [Path(file) for file in ([entry["image"]] if "image" in entry else entry.get("images", []))]
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise LeamlError(f"{path} line {number}: wanted an object with image and caption ({error!r}).") from error
        names += [file.stem for file in files] + [file.parent.name for file in files]
        yield [name for name in names if name], caption


def _read_captions(path: str | os.PathLike[str] | None) -> dict[str, str]:
    """Captions by every name that a picture may go by; empty ones are left out."""
    found: dict[str, str] = {}
    for names, caption in _caption_lines(path) if path is not None else ():
        if caption:
            for name in names:
                found.setdefault(name, caption)
    return found


class _Writer:
    """Writes pictures and, when all are there, the files that name them."""

    def __init__(self, out: Path):
        self.out = out
        self._pictures = out / "pictures"
        self._pictures.mkdir(parents=True, exist_ok=True)

    def picture(self, name: str, image: Any, where: str) -> str:
        """Write an embedded picture byte for byte; its path relative to the output directory."""
        from PIL import Image, UnidentifiedImageError

        data = image.get("bytes") if isinstance(image, Mapping) else None
        if data is None and isinstance(image, Mapping) and image.get("path"):
            data = Path(image["path"]).read_bytes()
        try:
            with Image.open(io.BytesIO(data or b"")) as opened:
                suffix = _SUFFIX.get(opened.format or "")
                opened.verify()
        except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise LeamlError(f"{where}: its picture cannot be read ({error}); fetch the data again.") from error
        if suffix is None:
            raise LeamlError(f"{where}: its picture is of a format that is not read here; convert it to PNG.")
        target = self._pictures / (_file_name(name) + suffix)
        if not target.is_file() or target.stat().st_size != len(data):
            with atomic_path(target) as temporary:
                temporary.write_bytes(data)
        return target.relative_to(self.out).as_posix()

    def clip(self, name: str, source: Path, count: int) -> list[str]:
        """Write the sampled frames of a clip (files as they are, video frames as JPEG); their relative paths."""
        directory = self._pictures / _file_name(name)
        if not directory.is_dir():
            aside = directory.with_name(f".{directory.name}.tmp")
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            if source.is_dir():
                files = video.frame_files(source)
                for i, position in enumerate(video.sample(len(files), count)):
                    shutil.copyfile(files[position], aside / f"frame_{i:03d}{files[position].suffix.lower()}")
            else:
                for i, frame in enumerate(video.frames(source, count)):
                    frame.save(aside / f"frame_{i:03d}.jpg", quality=95)
            aside.rename(directory)
        return [path.relative_to(self.out).as_posix() for path in video.frame_files(directory)]

    def finish(
        self,
        train: list[dict],
        unlabelled: Mapping[str, str | list[str]],
        test: list[dict],
        captions_file: str | os.PathLike[str] | None,
        pictures: Mapping[str, int],
    ) -> Prepared:
        """Write the files. ``unlabelled``: a picture's path, or a clip's, by name; ``pictures``: how many by part."""
        # captions filled in by hand stay
        own = self.out / "captions.jsonl"
        captions = {**_read_captions(own if own.is_file() else None), **_read_captions(captions_file)}
        listed, taught = [], []
        for name in sorted(unlabelled):
            files = unlabelled[name]
            line = {"id": name, "image": files} if isinstance(files, str) else {"id": name, "images": files}
            listed.append(line)
            caption = captions.get(name) or captions.get(Path(files if isinstance(files, str) else files[0]).stem, "")
            # without a caption file every picture is listed with an empty caption, to be filled
            if caption or not captions:
                # a single picture goes by its path, a clip by its name
                known = {"image": files} if isinstance(files, str) else line
                taught.append({**known, "caption": caption})
        paths = {}
        for name, lines in zip(_PARTS, (train, listed, taught, test)):
            paths[name] = self.out / f"{name}.jsonl"
            write_text(paths[name], "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        counts = {
            "labelled_pictures": pictures["labelled"],
            "labelled_questions": len(train),
            "unlabelled_pictures": len(unlabelled),
            "captions": sum(bool(line["caption"]) for line in taught),
            "test_pictures": pictures["test"],
            "test_questions": len(test),
        }
        marker = self.out / "prepare.json"
        write_json(marker, {**read_json(marker), "counts": counts, "complete": True})
        return Prepared(counts=counts, **paths)


def _file_name(name: str) -> str:
    """A file name for a picture's id, which comes from the data and may be anything."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", name).lstrip(".")[:100]
    if plain and plain == name:
        return plain
    return f"{plain or 'picture'}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


# ---------------------------------------------------------------------------------------------------- command line

_LICENCES = {"endoscopy": f"Kvasir-VQA: {endoscopy.LICENCE}", "sports": f"SPORTU: {sports.LICENCE}"}
_FILES = {"endoscopy": endoscopy_files, "sports": sports_files}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("dataset", help="endoscopy (Kvasir-VQA) or sports (SPORTU)")
    add("--output", required=True, help="directory to write; the same command takes up an interrupted run")
    add("--data", help="local copy in the real schema (default: as the tasks find it)")
    add("--synthetic", action="store_true", help="the embedded world of the same schema instead")
    add("--labels", type=float, default=splits.LABEL_FRACTION, help="share of the training pictures with labels (0.01)")
    add("--captions", help="JSONL with image and caption, by a teacher model; matched by picture name")
    add("--max-unlabelled", type=int, help="at most so many unlabelled pictures")
    add("--frames", type=int, help="sports: frames taken of each clip (16)")


def main(args: argparse.Namespace) -> int:
    if args.dataset not in _FILES:
        raise unknown_name("dataset", args.dataset, _FILES)
    if args.synthetic and args.data:
        raise LeamlError("--synthetic and --data name two sources; give one of them.")
    # before anything is written
    print("licence: made by this package, Apache-2.0" if args.synthetic else f"licence: {_LICENCES[args.dataset]}")
    sys.stdout.flush()
    options: dict[str, Any] = {} if args.dataset == "endoscopy" else {"frames": args.frames}
    if args.dataset == "endoscopy" and args.frames is not None:
        raise LeamlError("--frames is for sports; endoscopy has single pictures.")
    done = _FILES[args.dataset](
        args.output,
        data=args.data,
        synthetic=args.synthetic,
        labels=args.labels,
        captions=args.captions,
        max_unlabelled=args.max_unlabelled,
        **options,
    )
    for name, count in done.counts.items():
        print(f"{name.replace('_', ' '):<20} {count}")
    if not done.counts["captions"]:
        print(f"fill in the captions:  {done.captions}")
    task = f"leaml_{args.dataset}" + ("_synthetic" if args.synthetic else "")
    print(
        f"then:  leaml adapt --model MODEL --labeled {done.train} --unlabeled {done.unlabelled} "
        f"--captions {done.captions} --output runs/{args.dataset}\n"
        f"       leaml eval --model MODEL --adapter runs/{args.dataset}/adapter --tasks {task}"
        + (f" --data {args.data}" if args.data else "")
        + f" --label-fraction {args.labels:g}"
    )
    return 0
