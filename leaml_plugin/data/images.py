"""Opening pictures safely: every picture that a model sees comes through :func:`open_image`.

Covers: files and pictures embedded in Hugging Face datasets, EXIF orientation, grey and 16-bit pictures, and one clear
sentence for what cannot be opened (missing, truncated, no picture, a decompression bomb).
Does not cover: resizing and normalisation, which belong to the model's processor; decoding videos (a video is given as
its frames).
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
import struct
import threading
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar
from urllib.parse import parse_qs, unquote, urlencode

from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from leaml_plugin.errors import LeamlError
from leaml_plugin.progress import Progress
from leaml_plugin.records import ImageRef, Picture

T = TypeVar("T")

# Suffixes by which a directory of pictures is read, and the decoders that may run. Pillow knows more; some of those
# start other programs (EPS) or are rarely exercised parsers.
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
_DECODERS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")

# What Pillow's parsers are known to raise at bytes that are no picture after all.
_DAMAGE = (
    OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, ArithmeticError, LookupError, TypeError,
    AttributeError,
)  # fmt: skip

_STRICT = threading.Lock()  # held while Pillow's switch for truncated pictures is off

MAX_PIXELS = 150_000_000
"""A picture with more pixels than this is refused before it is decoded (RGB: 450 MB)."""


def hf_uri(dataset: str, split: str, row: int, column: str, index: int | None = None) -> str:
    """The uri of a picture embedded in a Hugging Face dataset; ``index`` counts inside a list column."""
    query = {"split": split, "row": row, "column": column}
    if index is not None:
        query["index"] = index
    return "hf:" + dataset.replace("%", "%25").replace("?", "%3F") + "?" + urlencode(query)


def open_image(ref: ImageRef) -> Image.Image:
    """The picture as RGB, upright by its EXIF orientation, fully decoded.

    Raises:
        LeamlError: it is missing, not a picture, truncated, or larger than :data:`MAX_PIXELS`.
    """
    return _read(ref, _decode)


def measure_image(ref: ImageRef) -> tuple[int, int]:
    """Width and height in pixels, as the file's header says; nothing is decoded.

    Raises:
        LeamlError: as :func:`open_image`, as far as the header shows it.
    """
    return _read(ref, lambda file, name: _opened(file, name).size)


def _read(ref: ImageRef, read: Callable[[Any, str], T]) -> T:
    if ref.uri.startswith("hf:"):
        return _guarded(*_embedded(ref.uri), read)
    try:
        # a named pipe in place of a picture would block for ever
        if not stat.S_ISREG(os.stat(ref.uri).st_mode):
            raise LeamlError(f"{ref.uri}: is not a regular file; give the path of a picture.")
        with open(ref.uri, "rb") as file:
            return _guarded(file, ref.uri, read)
    except FileNotFoundError as error:
        raise LeamlError(f"{ref.uri}: no such picture; correct the path or add the file.") from error
    except PermissionError as error:
        raise LeamlError(f"{ref.uri}: may not be read; change its permissions.") from error


def check_images(
    records: Iterable[Any], *, progress: bool = True, seen: Callable[[Any, Image.Image], None] | None = None
) -> int:
    """Decode every picture of ``records`` (anything with ``images``) once, before anything expensive starts.

    Args:
        seen: called with each different picture and the first record that has it.

    Returns:
        How many different pictures there are.

    Raises:
        LeamlError: names the first record and picture that cannot be opened, and how many more there are.
    """
    owner: dict[ImageRef, Any] = {}
    for record in records:
        for ref in record.images:
            owner.setdefault(ref, record)
    bad: list[str] = []
    bar = Progress("checking pictures", len(owner), unit="picture") if progress else None
    for ref, record in owner.items():
        try:
            picture = open_image(ref)
            if seen is not None:
                seen(record, picture)
        except LeamlError as error:
            where = getattr(record, "source", "")
            bad.append(f"{where}: {error}" if where else str(error))
        if bar:
            bar.update()
    if bar:
        bar.close()
    if bad:
        more = f" ({len(bad) - 1} more of {len(owner)} pictures cannot be opened either)" if len(bad) > 1 else ""
        raise LeamlError(bad[0] + more)
    return len(owner)


def sort_out(
    pictures: Iterable[Picture], *, decoded: int = 1000, total: int | None = None, progress: bool = True
) -> Iterator[tuple[Picture, str]]:
    """Each unlabelled picture with the reason why it cannot be used, or with ``""``; none is kept in memory.

    Args:
        decoded: so many of the pictures, evenly spread, are decoded to the last pixel; of the others the header is
            read, and damage behind it shows when a stage opens them.
        total: how many pictures there are, where ``pictures`` does not know.
    """
    total = len(pictures) if total is None and hasattr(pictures, "__len__") else total  # type: ignore[arg-type]
    bar = Progress("checking pictures", total, unit="picture") if progress else None
    for n, picture in enumerate(pictures):
        # true for every picture, or where the share of decoded ones passes a whole number
        whole = total is None or total <= decoded or n * decoded // total != (n - 1) * decoded // total
        try:
            for ref in picture.images:
                if whole:
                    open_image(ref)
                else:
                    measure_image(ref)
            yield picture, ""
        except LeamlError as error:
            yield picture, str(error)
        if bar:
            bar.update()
    if bar:
        bar.close()


def _decode(file: Any, name: str) -> Image.Image:
    picture = _opened(file, name)
    with _whole_files():
        picture.load()
    return _rgb(ImageOps.exif_transpose(picture))


@contextlib.contextmanager
def _whole_files() -> Iterator[None]:
    """Let truncated pictures be errors. lmms-eval tells Pillow, for the whole process, to fill them up with grey."""
    if not ImageFile.LOAD_TRUNCATED_IMAGES and not _STRICT.locked():
        yield
        return
    with _STRICT:
        before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
        try:
            yield
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = before


def _opened(file: Any, name: str) -> Image.Image:
    picture = Image.open(file, formats=_DECODERS)
    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise LeamlError(
            f"{name}: {width}x{height} pixels are more than the {MAX_PIXELS} that are opened; scale it down."
        )
    return picture


def _guarded(file: Any, name: str, read: Callable[[Any, str], T]) -> T:
    """What ``read`` makes of the file; what a decoder may raise becomes one sentence."""
    try:
        with warnings.catch_warnings():
            # our own limit on pixels is checked; what else a decoder grumbles about either can be read or cannot
            warnings.simplefilter("ignore")
            return read(file, name)
    except Image.DecompressionBombError as error:
        raise LeamlError(f"{name}: too many pixels to open safely ({error}); scale it down.") from error
    except UnidentifiedImageError as error:
        raise LeamlError(f"{name}: is not a picture in a known format ({', '.join(_DECODERS)}).") from error
    except _DAMAGE as error:
        if isinstance(error, FileNotFoundError | PermissionError):
            raise
        raise LeamlError(f"{name}: the picture is truncated or damaged ({error}); replace the file.") from error


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I;16"):
        # convert("RGB") would clip 16 bit to 255 and show nearly all of it white
        return picture.point(lambda v: v / 256).convert("L").convert("RGB")
    if picture.mode in ("I", "F"):
        low, high = picture.getextrema()
        scale = 255.0 / (high - low) if high > 255 or low < 0 else 1.0
        shift = -low * scale if scale != 1.0 else 0.0
        return picture.convert("F").point(lambda v: v * scale + shift).convert("L").convert("RGB")
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")
    return picture.convert("RGB")


def _embedded(uri: str) -> tuple[Any, str]:
    from leaml_plugin.data.hub import embedded_bytes

    dataset, _, query = uri[len("hf:") :].partition("?")
    try:
        fields = {key: values[0] for key, values in parse_qs(query, strict_parsing=True).items()}
        split, row, column = fields["split"], int(fields["row"]), fields["column"]
        index = int(fields["index"]) if "index" in fields else None
    except (KeyError, ValueError) as error:
        raise LeamlError(f"{uri}: is no picture of a dataset (wanted hf:<dataset>?split=…&row=…&column=…).") from error
    return io.BytesIO(embedded_bytes(unquote(dataset), split, row, column, index)), uri
