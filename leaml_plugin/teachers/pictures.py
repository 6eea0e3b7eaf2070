"""Pictures as parts of a chat message: scaled down, encoded anew, as data URLs.

Covers: what leaves this machine for a server. Every picture is decoded and encoded again, so neither metadata (EXIF
places, patient data in comments) nor file names are sent.
Does not cover: opening pictures (``leaml_plugin.data.open_image``).
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

from PIL import Image

from leaml_plugin.data import open_image
from leaml_plugin.records import ImageRef

FORMATS = ("jpeg", "png")


def data_url(picture: Image.Image, *, longest_side: int = 0, form: str = "jpeg") -> str:
    """``data:image/…;base64,…`` of an RGB picture.

    Args:
        longest_side: scale down, never up, until no side has more pixels; 0 leaves the size.
        form: "jpeg" (quality 92, no chroma subsampling) or "png" (exact).
    """
    picture = picture.copy()
    picture.info = {}  # comments and the like, which Pillow would write again
    if longest_side and max(picture.size) > longest_side:
        picture.thumbnail((longest_side, longest_side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, form.upper(), **({"quality": 92, "subsampling": 0} if form == "jpeg" else {}))
    return f"data:image/{form};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def messages(
    images: Sequence[ImageRef], prompt: str, system: str = "", *, longest_side: int = 0, form: str = "jpeg"
) -> list[dict[str, Any]]:
    """The messages of one request: pictures in order, then the text.

    Raises:
        LeamlError: a picture that cannot be opened.
    """
    urls = [data_url(open_image(ref), longest_side=longest_side, form=form) for ref in images]
    content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    content.append({"type": "text", "text": prompt})
    return [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": content}]
