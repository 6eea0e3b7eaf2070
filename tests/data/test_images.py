"""Opening pictures: orientation, modes, and one sentence for what is no picture."""

from __future__ import annotations

import io
import os
import random
import struct
import zlib

import pytest
from PIL import Image

from leaml_plugin.data import images
from leaml_plugin.data.images import check_images, measure_image, open_image, sort_out
from leaml_plugin.errors import LeamlError
from leaml_plugin.records import QA, ImageRef, Picture


def ref(path):
    return ImageRef(str(path))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "I;16", "I", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("x.tiff" if mode in ("CMYK", "I") else "x.png")
    Image.new("RGB", (9, 5), (200, 30, 30)).convert("L" if mode.startswith("I") else mode).convert(mode).save(path)
    picture = open_image(ref(path))
    assert picture.mode == "RGB" and picture.size == (9, 5)


def test_sixteen_bit_grey_keeps_its_contrast(tmp_path):
    picture = Image.new("I;16", (2, 1))
    picture.putpixel((0, 0), 0x4000)
    picture.putpixel((1, 0), 0xC000)
    picture.save(tmp_path / "x.png")
    got = open_image(ref(tmp_path / "x.png"))
    assert [got.getpixel((x, 0))[0] for x in range(2)] == [0x40, 0xC0]


def test_orientation_is_applied(tmp_path):
    picture = Image.new("RGB", (8, 4), "black")
    exif = picture.getexif()
    exif[0x0112] = 6  # shown rotated by 90 degrees
    picture.save(tmp_path / "x.jpg", exif=exif)
    assert open_image(ref(tmp_path / "x.jpg")).size == (4, 8)


def test_what_is_no_picture_is_one_sentence(tmp_path, pictures):
    data = pictures[0].read_bytes()
    jpeg = tmp_path / "whole.jpg"
    Image.effect_noise((64, 64), 50).convert("RGB").save(jpeg)
    cases = {
        "empty.png": (b"", "is not a picture"),
        "text.png": (b"hello", "is not a picture"),
        "half.png": (data[: len(data) // 2], "truncated or damaged"),
        "half.jpg": (jpeg.read_bytes()[: jpeg.stat().st_size // 2], "truncated or damaged"),
        "x.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "is not a picture"),
    }
    for name, (content, words) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(LeamlError, match=words) as error:
            open_image(ref(tmp_path / name))
        assert str(error.value).startswith(str(tmp_path / name))
    with pytest.raises(LeamlError, match="no such picture"):
        open_image(ref(tmp_path / "none.png"))
    with pytest.raises(LeamlError, match="not a regular file"):
        open_image(ref(tmp_path))
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(LeamlError, match="not a regular file"):
        open_image(ref(tmp_path / "pipe.png"))


def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    Image.new("L", (4, 4)).save(tmp_path / "bomb.png")
    data = bytearray((tmp_path / "bomb.png").read_bytes())
    for side in (13_000, 60_000):  # our limit, and Pillow's own
        data[16:24] = struct.pack(">II", side, side)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
        (tmp_path / "bomb.png").write_bytes(data)
        with pytest.raises(LeamlError, match=rf"bomb.png: ({side}x{side} pixels|too many pixels)"):
            open_image(ref(tmp_path / "bomb.png"))
    monkeypatch.setattr(images, "MAX_PIXELS", 10)
    Image.new("RGB", (4, 4)).save(tmp_path / "small.png")
    with pytest.raises(LeamlError, match="4x4 pixels are more than the 10"):
        open_image(ref(tmp_path / "small.png"))


def test_check_images_opens_each_once_and_names_the_record(tmp_path, pictures, monkeypatch):
    good = [QA(str(i), (ref(pictures[0]), ref(pictures[1])), "q", "a", source=f"x.jsonl line {i}") for i in range(3)]
    opened = []
    real = images.open_image
    monkeypatch.setattr(images, "open_image", lambda r: opened.append(r) or real(r))
    assert check_images(good, progress=False) == 2 and len(opened) == 2
    bad = [*good, QA("9", (ref(tmp_path / "no.png"),), "q", "a", source="x.jsonl line 9"), Picture("p", (ref("/no"),))]
    with pytest.raises(LeamlError, match=r"x.jsonl line 9: .*no.png: no such picture.*\(1 more of 4 pictures"):
        check_images(bad, progress=False)


@pytest.mark.parametrize("kind", ["jpeg", "png", "tiff", "gif", "webp", "bmp", "ppm"])
def test_whatever_bytes_are_in_a_file_only_our_error_comes_out(tmp_path, kind):
    file = io.BytesIO()
    picture = Image.effect_noise((24, 20), 50).convert("P" if kind == "gif" else "RGB")
    picture.save(file, kind, **({"exif": Image.Exif()} if kind in ("jpeg", "webp", "tiff") else {}))
    whole, draw = file.getvalue(), random.Random(kind)
    path, refused = tmp_path / "fuzz", 0
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(draw.choice([1, 3, 20])):
            data[draw.randrange(min(len(data), draw.choice([60, len(data)])))] = draw.randrange(256)
        path.write_bytes(data[: draw.choice([len(data), draw.randrange(len(data))])])
        try:
            open_image(ref(path))
        except LeamlError as error:
            refused += 1
            assert str(error).startswith(str(path))
    assert refused > 5


def test_the_header_tells_the_size_and_what_it_can_of_the_damage(tmp_path, pictures, monkeypatch):
    assert measure_image(ref(pictures[1])) == (84, 40)
    Image.effect_noise((64, 64), 50).convert("RGB").save(tmp_path / "half.jpg")
    data = (tmp_path / "half.jpg").read_bytes()
    (tmp_path / "half.jpg").write_bytes(data[: len(data) // 2])
    assert measure_image(ref(tmp_path / "half.jpg")) == (64, 64)
    with pytest.raises(LeamlError, match="no such picture"):
        measure_image(ref(tmp_path / "none.png"))
    monkeypatch.setattr(images, "MAX_PIXELS", 10)
    with pytest.raises(LeamlError, match="84x40 pixels are more than the 10"):
        measure_image(ref(pictures[1]))


def test_unlabelled_pictures_are_sorted_out_and_few_of_many_are_decoded(tmp_path, pictures, monkeypatch):
    opened = []
    real = images.open_image
    monkeypatch.setattr(images, "open_image", lambda r: opened.append(r) or real(r))
    (tmp_path / "text.png").write_bytes(b"hello")
    refs = [ref(pictures[i % 6]) for i in range(100)]
    refs[7] = ref(tmp_path / "text.png")
    pool = [Picture(str(i), (r,)) for i, r in enumerate(refs)]
    out = list(sort_out(pool, decoded=10, progress=False))
    assert [picture for picture, _ in out] == pool
    assert [picture.id for picture, why in out if why] == ["7"] and "text.png: is not a picture" in out[7][1]
    assert len(opened) == 10
    opened.clear()
    assert sum(bool(why) for _, why in sort_out(iter(pool), progress=False)) == 1  # of unknown length: all are decoded
    assert len(opened) == 100


def test_a_truncated_picture_is_refused_whatever_another_library_told_pillow(tmp_path, monkeypatch):
    from PIL import ImageFile

    noise = Image.effect_noise((64, 64), 80)
    noise.save(tmp_path / "whole.jpg")
    data = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "half.jpg").write_bytes(data[: len(data) // 2])
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as lmms-eval does when it is imported
    with pytest.raises(LeamlError, match="truncated or damaged"):
        open_image(ImageRef(str(tmp_path / "half.jpg")))
    assert open_image(ImageRef(str(tmp_path / "whole.jpg"))).size == (64, 64)
    assert ImageFile.LOAD_TRUNCATED_IMAGES  # theirs again
