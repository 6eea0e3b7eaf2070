"""The teacher's prompt files, what counts as a refusal, and pictures on the wire."""

from __future__ import annotations

import base64
import io
import re

import pytest
from PIL import Image

from leaml_plugin.errors import LeamlError
from leaml_plugin.records import ImageRef
from leaml_plugin.teachers import Answer, Failure, judge
from leaml_plugin.teachers.pictures import data_url, messages
from leaml_plugin.teachers.prompt import TeacherPrompt

PROMPT = TeacherPrompt.load()


def test_the_default_asks_for_what_is_seen_and_forbids_a_diagnosis():
    assert "visible" in PROMPT.caption
    assert re.search(r"no diagnosis", PROMPT.caption)
    assert re.fullmatch(r"teacher-1-[0-9a-f]{8}", PROMPT.version)


def test_own_files_replace_single_texts_and_change_the_version(tmp_path):
    (tmp_path / "caption.txt").write_text("Was ist zu sehen?\r\n", encoding="utf-8-sig")
    own = TeacherPrompt.load(tmp_path)
    assert (own.caption, own.refusal, own.name) == ("Was ist zu sehen?", PROMPT.refusal, tmp_path.name)
    assert own.version != PROMPT.version
    assert TeacherPrompt.load(tmp_path / "caption.txt").caption == own.caption
    (tmp_path / "name.txt").write_text("mine-3")
    assert TeacherPrompt.load(tmp_path).version.startswith("mine-3-")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("captoin.txt", "x", "did you mean 'caption'"),
        ("caption.txt", " \n", "caption.txt is empty"),
        ("refusal.txt", "fine\n(open", "refusal.txt line 2 is no regular expression"),
        ("caption.txt", b"\xff", "is no UTF-8"),
    ],
)
def test_bad_prompt_files(tmp_path, name, text, words):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(LeamlError, match=re.escape(words)):
        TeacherPrompt.load(tmp_path)


def test_no_prompt_files(tmp_path):
    with pytest.raises(LeamlError, match="no teacher prompt in it"):
        TeacherPrompt.load(tmp_path)
    with pytest.raises(LeamlError, match="cannot be read"):
        TeacherPrompt.load(tmp_path / "nowhere")


REFUSALS = [
    "I'm sorry, but I can't assist with that.",
    "I’m sorry, I cannot help with medical pictures.",
    "Sorry, I am not able to do so.",
    "I cannot provide a description of this image.",
    "I can't see the image you mention.",
    "I don't see an image. Please upload one.",
    "  As an AI, I have no eyes.",
    "Unfortunately, I cannot.",
    "No image was provided.",
    "I'm not able to identify people.",
]
CAPTIONS = [
    "A red spot on a green ground. I cannot see its lower border.",
    "No instrument is visible; the wall is pink and smooth.",
    "The sorry state of the field shows in its brown patches.",
    "An image of a player in a red shirt.",
    "No polyp. The mucosa is pink.",
]


@pytest.mark.parametrize("text", REFUSALS)
def test_refusals(text):
    assert judge(Answer(text), PROMPT) == (None, "refused", text.strip())


@pytest.mark.parametrize("text", CAPTIONS)
def test_captions(text):
    assert judge(Answer(f"\n{text} "), PROMPT) == (text, "", "")


@pytest.mark.parametrize(
    ("answer", "want"),
    [
        (Answer(" \n"), (None, "empty", "")),
        (Answer("", refusal="I won't."), (None, "refused: by the server", "I won't.")),
        (Answer("A spot", finish="content_filter"), (None, "refused: by the server", "A spot")),
        (Answer("<think>red?</think>\nA spot."), ("A spot.", "", "<think>red?</think>\nA spot.")),
        (
            Answer("<think>red? or", finish="length"),
            (None, "empty: cut off while thinking; allow more tokens", "<think>red? or"),
        ),
        (Answer("A spot, and", finish="length"), ("A spot, and", "", "")),
        (Failure("rejected", "400"), (None, "rejected: 400", "")),
    ],
)
def test_what_becomes_of_an_answer(answer, want):
    assert judge(answer, PROMPT) == want


def decode(url: str) -> Image.Image:
    kind, _, data = url.partition(";base64,")
    picture = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
    assert kind == f"data:image/{picture.format.lower()}"
    return picture


def test_pictures_shrink_to_the_longest_side_and_never_grow():
    picture = Image.new("RGB", (300, 120), "red")
    assert decode(data_url(picture, longest_side=100)).size == (100, 40)
    assert decode(data_url(picture, longest_side=1000)).size == (300, 120)
    assert decode(data_url(picture)).size == (300, 120)
    assert picture.size == (300, 120)


def test_png_is_exact_and_jpeg_close():
    picture = Image.radial_gradient("L").convert("RGB")
    assert decode(data_url(picture, form="png")).tobytes() == picture.tobytes()
    jpeg = decode(data_url(picture, form="jpeg"))
    assert max(abs(a - b) for a, b in zip(jpeg.tobytes(), picture.tobytes())) < 12


def test_nothing_but_pixels_leaves_the_machine(tmp_path):
    exif = Image.Exif()
    exif[0x010E] = "patient Jane Doe"  # ImageDescription
    path = tmp_path / "jane-doe.jpg"
    Image.new("RGB", (40, 40), "red").save(path, exif=exif, comment=b"Jane Doe")
    for form in ("jpeg", "png"):
        sent = messages([ImageRef(str(path))], "What?", "Be short.", form=form)
        assert [m["role"] for m in sent] == ["system", "user"]
        image, text = sent[1]["content"]
        assert text == {"type": "text", "text": "What?"}
        data = base64.b64decode(image["image_url"]["url"].partition(",")[2])
        assert b"Jane" not in data and "jane" not in str(sent)
    assert [m["role"] for m in messages([ImageRef(str(path))] * 2, "What?")] == ["user"]
    assert len(messages([ImageRef(str(path))] * 2, "What?")[0]["content"]) == 3
