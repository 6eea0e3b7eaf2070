"""Frames of a clip, evenly sampled: from a video file or from a directory of frames.

Covers: where the clips of a data set are, and their frames as pictures. A video is given to a model as its frames.
Does not cover: sound, and sampling by frame rate.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from leaml_plugin.errors import LeamlError

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif")
FRAME_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def clip_index(root: Path) -> dict[str, Path]:
    """Lower-case clip name to its video file or its directory of frames, anywhere under ``root``."""
    found: dict[str, Path] = {}
    for path in sorted(root.rglob("*")):
        suffix = path.suffix.lower()
        if suffix in VIDEO_SUFFIXES:
            found[path.stem.lower()] = path
        elif suffix in FRAME_SUFFIXES and path.parent != root:
            found.setdefault(path.parent.name.lower(), path.parent)
    return found


def frame_files(directory: Path) -> list[Path]:
    """The frames of a clip kept as a directory, in the order of their names."""
    return sorted(path for path in directory.iterdir() if path.suffix.lower() in FRAME_SUFFIXES)


def sample(total: int, wanted: int) -> list[int]:
    """``wanted`` indices of ``total`` frames, each from the middle of an equal part; all of them where there are fewer.

    >>> sample(10, 3)
    [1, 5, 8]
    """
    if wanted < 1:
        raise LeamlError(f"the number of frames must be at least 1, got {wanted}.")
    if total <= wanted:
        return list(range(total))
    return [int((i + 0.5) * total / wanted) for i in range(wanted)]


def frames(clip: Path, wanted: int) -> list[Image.Image]:
    """``wanted`` evenly spaced RGB frames of a video file or a directory of frames."""
    if clip.is_dir():
        files = frame_files(clip)
        if not files:
            raise LeamlError(f"{clip}: no frame in this directory; expected {', '.join(FRAME_SUFFIXES)} files.")
        return [_open(files[i]) for i in sample(len(files), wanted)]
    return _decode(clip, wanted)


def _open(path: Path) -> Image.Image:
    from leaml_plugin.data import open_image
    from leaml_plugin.records import ImageRef

    return open_image(ImageRef(str(path)))


def _decode(path: Path, wanted: int) -> list[Image.Image]:
    try:
        import av
    except ImportError as error:
        raise LeamlError(
            f"{path}: reading video files needs PyAV; pip install av, or give frame directories."
        ) from error
    try:
        with av.open(str(path)) as container:
            # the header's count is a claim: where it is missing or wrong, counting decides
            total = container.streams.video[0].frames
        if total:
            kept = _pick(_stream(av, path), set(sample(total, wanted)))
            if len(kept) == min(total, wanted):
                return kept
        total = sum(1 for _ in _stream(av, path))
        if not total:
            raise LeamlError(f"{path}: no frame can be decoded; the file is damaged or no video.")
        return _pick(_stream(av, path), set(sample(total, wanted)))
    except (av.FFmpegError, IndexError) as error:
        raise LeamlError(f"{path}: cannot be decoded as video ({error}); replace the file.") from error


def _stream(av: Any, path: Path) -> Iterable[Any]:
    with av.open(str(path)) as container:
        yield from container.decode(video=0)


def _pick(decoded: Iterable[Any], keep: set[int]) -> list[Image.Image]:
    return [frame.to_image().convert("RGB") for i, frame in enumerate(decoded) if i in keep]
