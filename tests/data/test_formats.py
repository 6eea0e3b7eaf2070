"""Every format reads, and every mistake is one sentence with file, line and field."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from leaml_plugin.data.formats import load_labeled, load_unlabeled
from leaml_plugin.data.images import check_images, open_image
from leaml_plugin.errors import LeamlError


@pytest.fixture
def folder(tmp_path, pictures):
    """A directory with images/a.png … images/f.png, and images/clip/ with frames 1, 2 and 10."""
    clip = tmp_path / "images" / "clip"
    clip.mkdir(parents=True)
    for name, source in zip("abcdef", pictures):
        shutil.copy(source, tmp_path / "images" / f"{name}.png")
    for n, source in zip((1, 2, 10), pictures):
        shutil.copy(source, clip / f"frame_{n}.png")
    return tmp_path


def write(folder, rows, name="train.jsonl"):
    path = folder / name
    if name.endswith("jsonl"):
        path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    else:
        path.write_text(json.dumps(rows))
    return path


def names(qa):
    return [os.path.basename(ref.uri) for ref in qa.images]


ROW = {"image": "images/a.png", "question": "Is there a polyp?", "answer": "Yes"}


def test_jsonl(folder):
    rows = [
        ROW,
        {"images": ["images/a.png", "images/b.png"], "question": "Which?", "answer": 2, "template": "count", "id": "x"},
        {"frames": "images/clip", "question": "Who scored?", "answer": 0.5, "img_id": "i3"},
        {"image": None, "question": "What is a polyp?", "answer": " A growth. "},
    ]
    out = load_labeled(write(folder, rows))
    assert [qa.id for qa in out] == ["train:1", "x", "train:3", "train:4"]
    assert [names(qa) for qa in out] == [
        ["a.png"],
        ["a.png", "b.png"],
        ["frame_1.png", "frame_2.png", "frame_10.png"],
        [],
    ]
    assert [qa.answer for qa in out] == ["Yes", "2", "0.5", "A growth."]
    assert out[1].meta == {"template": "count"} and out[2].meta == {"img_id": "i3"}
    assert out[0].source == f"{folder / 'train.jsonl'} line 1"
    assert check_images(out, progress=False) == 5


def test_bom_crlf_and_blank_lines_do_not_matter(folder):
    path = folder / "train.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(ROW).encode() + b"\r\n\r\n" + json.dumps(ROW).encode() + b"\r\n")
    out = load_labeled(path)
    assert [qa.source[-6:] for qa in out] == ["line 1", "line 3"] and out[0].answer == "Yes"


def test_json_and_csv(folder):
    assert [qa.id for qa in load_labeled(write(folder, [ROW, ROW], "train.json"))] == ["train:1", "train:2"]
    assert len(load_labeled(write(folder, {"data": [ROW]}, "other.json"))) == 1
    (folder / "train.csv").write_text('image,question,answer\nimages/a.png,"What, here?",polyp\n')
    [qa] = load_labeled(folder / "train.csv")
    assert qa.question == "What, here?" and names(qa) == ["a.png"] and qa.source.endswith("line 2")


def test_a_directory_in_the_manner_of_imagefolder(folder):
    write(folder / "images", [{"file_name": "a.png", "question": "What?", "answer": "x"}], "metadata.jsonl")
    [qa] = load_labeled(folder / "images")
    assert names(qa) == ["a.png"] and qa.source.endswith("metadata.jsonl line 1")
    captions = write(folder / "images", [{"file_name": "b.png", "text": "green"}], "captions.jsonl")
    assert [p.caption for p in load_unlabeled(folder / "images", captions=captions)][1] == "green"


def test_options_are_shown(folder):
    row = {**ROW, "options": {"A": "goal", "B": 3, "C": None}}
    assert load_labeled(write(folder, [row]))[0].question == "Is there a polyp?\nA. goal\nB. 3"
    row = {**ROW, "choices": ["yes", "no"]}
    assert load_labeled(write(folder, [row]))[0].question == "Is there a polyp?\nA. yes\nB. no"


def test_conversations(folder):
    row = {
        "id": "c1",
        "image": "images/a.png",
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "<image>\nWhat is it?"},
            {"from": "gpt", "value": "A polyp."},
            {"from": "human", "value": "How large?"},
            {"from": "gpt", "value": "5 mm"},
        ],
    }
    out = load_labeled(write(folder, [row]))
    assert [(qa.id, qa.question, qa.answer) for qa in out] == [
        ("c1.0", "What is it?", "A polyp."),
        ("c1.1", "How large?", "5 mm"),
    ]
    assert all(names(qa) == ["a.png"] for qa in out)


def test_messages(folder):
    rows = [
        {
            "messages": [
                {"role": "user", "content": "<image><image>Which is larger?"},
                {"role": "assistant", "content": "the first"},
            ],
            "images": ["images/a.png", "images/b.png"],
        },
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image", "path": "images/c.png"}, {"type": "text", "text": "What?"}],
                },
                {"role": "assistant", "content": [{"type": "text", "text": "a tube"}]},
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": "images/d.png"}},
                        {"type": "text", "text": "And now?"},
                    ],
                },
                {"role": "assistant", "content": "a ball"},
            ]
        },
        {
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
                {"role": "assistant", "content": "x"},
            ],
            "images": [{"path": "images/e.png"}],
        },
        {"messages": [{"role": "user", "content": "Text?"}, {"role": "assistant", "content": "only"}]},
    ]
    out = load_labeled(write(folder, rows))
    assert [names(qa) for qa in out] == [["a.png", "b.png"], ["c.png"], ["c.png", "d.png"], ["e.png"], []]
    assert [qa.question for qa in out] == ["Which is larger?", "What?", "And now?", "What?", "Text?"]


def test_image_root_comes_first_and_admits_absolute_paths(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("elsewhere")
    path = write(other, [{**ROW, "image": "a.png"}, {**ROW, "image": str(folder / "images" / "b.png")}])
    out = load_labeled(path, image_root=folder / "images")
    assert [names(qa) for qa in out] == [["a.png"], ["b.png"]]
    with pytest.raises(LeamlError, match="line 2: field 'image' leads outside"):
        shutil.copy(folder / "images" / "a.png", other)
        load_labeled(path)


def test_links_may_only_lead_under_the_roots(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("linking")
    (other / "images").symlink_to(folder / "images")
    path = write(other, [ROW])
    with pytest.raises(LeamlError, match=r"leads outside .*image root"):
        load_labeled(path)
    assert names(load_labeled(path, image_root=folder)[0]) == ["a.png"]


BAD = [
    ("{", "line 1: is no valid JSON"),
    ("[1, 2]", "line 1: is [1, 2], not an object"),
    ('{"image": NaN}', "line 1: is no valid JSON (NaN is no JSON number)"),
    ("[" * 100_000, "line 1: is no valid JSON"),
    ({**ROW, "image": "images/none.png"}, "line 1: field 'image': no file"),
    ({**ROW, "image": "../../etc/passwd"}, "line 1: field 'image' leads outside"),
    ({**ROW, "image": "/etc/passwd"}, "line 1: field 'image' leads outside"),
    ({**ROW, "image": "/etc/no-such-file"}, "line 1: field 'image' leads outside"),
    ({**ROW, "image": "https://example.org/a.png"}, "is an address"),
    ({**ROW, "image": "data:image/png;base64,AAAA"}, "is inline data"),
    ({**ROW, "image": "a\0b"}, "NUL"),
    ({**ROW, "image": "a" * 5000}, "is no path"),
    ({**ROW, "image": 5}, "field 'image' is 5; give the path"),
    ({**ROW, "image": ["images/a.png", ""]}, "field 'image' is \"\"; give the path"),
    ({**ROW, "images": ["images"], "image": ["images"]}, "is a directory; give the path of a picture"),
    ({**ROW, "image": "images"}, None),  # a directory of frames
    ({**ROW, "answer": ""}, "line 1: field 'answer' is empty"),
    ({**ROW, "answer": " \n"}, "line 1: field 'answer' is empty"),
    ({**ROW, "answer": None}, "field 'answer' is null"),
    ({**ROW, "answer": ["a"]}, "field 'answer' is [\"a\"]; give the answer as text"),
    ({**ROW, "answer": True}, "field 'answer' is true"),
    ('{"image": "images/a.png", "question": "\\ud800", "answer": "x"}', "lone surrogate"),
    ({**ROW, "question": ""}, "line 1: field 'question' is empty"),
    ({"image": "images/a.png", "question": "x"}, "field 'answer' is missing (it has 'image', 'question')"),
    ({"image": "images/a.png", "answer": "x"}, "field 'question' is missing"),
    ({"question": "x", "answer": "x"}, "field 'image' is missing"),
    ({**ROW, "id": [1]}, "field 'id' is [1]"),
    ({**ROW, "options": "A or B"}, "field 'options' is"),
    ({"conversations": []}, "field 'conversations' is []"),
    ({"conversations": [{"from": "human", "value": "x"}]}, "ends with a question"),
    ({"conversations": [{"from": "gpt", "value": "x"}]}, "conversations[0]': an answer without a question"),
    ({"conversations": [{"from": "human", "value": "x"}] * 2}, "a question follows a question"),
    ({"conversations": [{"role": "user"}]}, "give an object with 'from' and 'value'"),
    ({"conversations": [{"from": "robot", "value": "x"}]}, "known are system, user, human"),
    ({"conversations": [{"from": "human", "value": "<image>x"}, {"from": "gpt", "value": "y"}]}, "'image' is missing"),
    (
        {
            "image": "images/a.png",
            "conversations": [{"from": "human", "value": "<image><image>x"}, {"from": "gpt", "value": "y"}],
        },
        "2 <image> placeholder(s), but 1 picture(s)",
    ),
    ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "known types are text and image"),
    ({"messages": [{"role": "user", "content": 5}]}, "give text or a list of parts"),
]


@pytest.mark.parametrize(("row", "words"), BAD, ids=range(len(BAD)))
def test_a_bad_record_is_one_sentence(folder, row, words):
    path = write(folder, [row])
    if words is None:
        assert load_labeled(path)
        return
    with pytest.raises(LeamlError) as error:
        load_labeled(path)
    message = str(error.value)
    assert words in message and message.startswith(f"{path} line 1") and "\n" not in message and len(message) < 700


def test_line_numbers_count_all_lines(folder):
    path = write(folder, [ROW, "", {**ROW, "answer": ""}])
    with pytest.raises(LeamlError, match=r"train.jsonl line 3: field 'answer' is empty"):
        load_labeled(path)


def test_a_byte_that_is_no_utf8_names_its_line(folder):
    path = folder / "train.jsonl"
    path.write_bytes(json.dumps(ROW).encode() + b"\n\xff\n")
    with pytest.raises(LeamlError, match="line 2: byte 0 is no UTF-8"):
        load_labeled(path)


def test_duplicate_ids_name_both_lines(folder):
    path = write(folder, [{**ROW, "id": 7}, ROW, {**ROW, "id": "7"}])
    with pytest.raises(LeamlError, match=r"line 3: the id '7' is also that of .*line 1"):
        load_labeled(path)


def test_files_that_are_no_data(folder):
    for name, text, words in [
        ("a.jsonl", "", "has no samples"),
        ("a.json", "{}", "must hold a list"),
        ("a.json", '[{"a": 1}', "a.json line 1: is no valid JSON"),
        ("a.json", '{"a": 1}\n{"a": 2}', "is it JSONL? then name it .jsonl"),
        ("a.json", "5", "holds 5"),
        ("a.csv", "image,question,answer\nx,y\n", "line 2: has not as many cells"),
        ("a.txt", "x", ".txt is no known format"),
    ]:
        (folder / name).write_text(text)
        with pytest.raises(LeamlError) as error:
            load_labeled(folder / name)
        assert words in str(error.value)
    with pytest.raises(LeamlError, match=r"no such file"):
        load_labeled(folder / "none.jsonl")
    with pytest.raises(LeamlError, match=r"no such file"):
        load_labeled("data/train.jsonl")
    with pytest.raises(LeamlError, match=r"is a directory, but no Hugging Face dataset; give one of its files \(a.csv"):
        load_labeled(folder)
    with pytest.raises(LeamlError, match="correct the image root"):
        load_labeled(write(folder, [ROW]), image_root=folder / "none")
    with pytest.raises(LeamlError, match="fetched from the Hub"):
        load_labeled("nobody/nothing")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.sampled_from(["", "images/a.png", "user", "x"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "text", "role", "content", "from", "value", "image", "url", "path", "A"]), inner
        )
    ),
    max_leaves=8,
)
json_rows = st.dictionaries(
    st.sampled_from(["image", "images", "question", "answer", "id", "options", "messages", "conversations", "frames"]),
    json_values,
)


@given(rows=st.lists(json_rows | json_values, max_size=3), raw=st.binary(max_size=40))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_a_file_holds_only_our_error_comes_out(folder, rows, raw):
    for content in (json.dumps(rows).encode(), "\n".join(map(json.dumps, rows)).encode(), raw):
        for name in ("fuzz.jsonl", "fuzz.json", "fuzz.csv"):
            path = folder / name
            path.write_bytes(content)
            for load in (load_labeled, load_unlabeled, lambda p: load_unlabeled(folder / "images", captions=p)):
                try:
                    records = load(path)
                except LeamlError as error:
                    assert "\n" not in str(error)
                else:
                    for record in records:
                        for ref in record.images:
                            assert ref.uri.startswith(str(folder))


# -- unlabelled pictures ---------------------------------------------------------------------------------------------


def test_a_directory_of_pictures(folder):
    (folder / "images" / ".hidden.png").write_bytes(b"")
    (folder / "images" / "notes.txt").write_text("x")
    (folder / "images" / "z.JPG").write_bytes(b"")
    out = load_unlabeled(folder / "images")
    frames = ["clip/frame_1.png", "clip/frame_10.png", "clip/frame_2.png"]
    assert [p.id for p in out] == sorted([*(f"{c}.png" for c in "abcdef"), *frames, "z.JPG"])
    assert all(p.caption is None and len(p.images) == 1 for p in out)
    assert open_image(out[0].images[0]).mode == "RGB"


def test_captions_by_path_or_id(folder):
    for rows in (
        [{"image": "a.png", "caption": "red"}, {"image": "images/b.png", "caption": "green"}],
        [{"id": "a.png", "caption": "red"}, {"image": str(folder / "images/b.png"), "text": "green"}],
    ):
        out = load_unlabeled(folder / "images", captions=write(folder, rows, "captions.jsonl"))
        assert [p.caption for p in out[:3]] == ["red", "green", None]
    out = load_unlabeled(folder / "images", captions=write(folder, {"c.png": "blue"}, "captions.json"))
    assert [p.caption for p in out[:3]] == [None, None, "blue"]


def test_captions_may_cover_more_pictures_than_are_used(folder):
    rows = [{"image": "images/a.png", "caption": "red"}, {"image": "images/clip/frame_1.png", "caption": "x"}]
    chosen = write(folder, [{"image": "images/a.png"}], "pictures.jsonl")
    [picture] = load_unlabeled(chosen, captions=write(folder, rows, "captions.jsonl"))
    assert picture.caption == "red"


def test_a_file_of_pictures_and_clips(folder):
    rows = [{"image": "images/a.png", "caption": "red"}, {"id": "clip", "frames": "images/clip"}]
    out = load_unlabeled(write(folder, rows, "pictures.jsonl"))
    assert [(p.id, len(p.images), p.caption) for p in out] == [("pictures:1", 1, "red"), ("clip", 3, None)]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"image": "a.png", "caption": ""}], "line 1: field 'caption' is empty"),
        ([{"image": "a.png"}], "line 1: field 'caption' is missing"),
        ([{"caption": "x"}], "line 1: field 'image' is missing"),
        ([{"image": "no.png", "caption": "x"}], "line 1: field 'image': \"no.png\" is none of the 9 pictures"),
        (
            [{"image": "a.png", "caption": "x"}, {"image": "images/a.png", "caption": "y"}],
            'line 2: another caption for "images/a.png" stands at',
        ),
        ([], "has no caption for any of the 9 pictures"),
        (["{"], "line 1: is no valid JSON"),
    ],
)
def test_bad_captions_are_one_sentence(folder, rows, words):
    path = write(folder, rows, "captions.jsonl")
    with pytest.raises(LeamlError) as error:
        load_unlabeled(folder / "images", captions=path)
    assert words in str(error.value) and str(error.value).startswith(str(path))


def test_directories_without_pictures_and_other_mistakes(folder):
    empty = folder / "empty"
    empty.mkdir()
    with pytest.raises(LeamlError, match=r"empty: has no pictures; give a directory"):
        load_unlabeled(empty)
    (empty / "a.mp4").write_bytes(b"")
    with pytest.raises(LeamlError, match=r"has no pictures \(it has 1 .mp4 files\)"):
        load_unlabeled(empty)
    with pytest.raises(LeamlError, match="no such file"):
        load_unlabeled(folder / "none")
    with pytest.raises(LeamlError, match="give the file with the captions"):
        load_unlabeled(folder / "images", captions=folder / "none.jsonl")
    rows = [{"id": 1, "image": "images/a.png"}, {"id": 1, "image": "images/b.png"}]
    with pytest.raises(LeamlError, match="line 2: the id '1' occurs twice"):
        load_unlabeled(write(folder, rows))
    with pytest.raises(LeamlError, match="has no picture"):
        load_unlabeled(write(folder, [{"image": []}]))


def test_half_characters_are_told_or_left_out(tmp_path, pictures):
    row = f'{{"image": "{pictures[0].name}", "question": "q", "answer": "a"'
    shutil.copy(pictures[0], tmp_path)
    file = tmp_path / "train.jsonl"
    file.write_text(row + ', "note": "\\ud800", "\\udfff": 1, "list": ["\\ud800"], "kept": "x"}\n')
    assert load_labeled(file)[0].meta == {"kept": "x"}
    file.write_text(row + ', "id": "\\ud800"}\n')
    with pytest.raises(LeamlError, match="line 1: field 'id' holds half a character"):
        load_labeled(file)
    file.write_text(row.replace(pictures[0].name, "\\ud800.png") + "}\n")
    with pytest.raises(LeamlError, match="line 1: field 'image' holds half a character"):
        load_labeled(file)
    (tmp_path / "images").mkdir()
    shutil.copy(pictures[0], os.fsencode(tmp_path / "images") + b"/a\xff.png")
    with pytest.raises(LeamlError, match="the name is no UTF-8; rename the file"):
        load_unlabeled(tmp_path / "images")
