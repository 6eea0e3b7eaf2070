"""Records in files: random access, views, and order, whatever the number."""

import json
import threading

import pytest

from leaml_plugin import records, tables
from leaml_plugin.artifacts import write_records
from leaml_plugin.data import formats, load_unlabeled
from leaml_plugin.errors import LeamlError
from leaml_plugin.records import ImageRef, Picture
from leaml_plugin.sequences import Chosen, Mapped, RecordFile, Spool


def some(n):
    return [Picture(f"p{i}", (ImageRef(f"/{i}.png"),), None if i % 3 else f"ü {i}\n  ") for i in range(n)]


def spooled(pictures):
    spool = Spool(Picture)
    for picture in pictures:
        spool.append(picture)
    return spool.finish()


def test_a_record_file_is_a_sequence(tmp_path):
    pictures = some(10)
    write_records(tmp_path / "a.jsonl", pictures)
    for sequence in (RecordFile(tmp_path / "a.jsonl", Picture), spooled(pictures)):
        assert len(sequence) == 10 and list(sequence) == pictures
        assert sequence[3] == pictures[3] and sequence[-1] == pictures[-1]
        assert sequence[2:7:2] == pictures[2:7:2] and sequence[8:20] == pictures[8:]
        for index in (10, -11):
            with pytest.raises(IndexError):
                sequence[index]
        few = sequence.without([int(i % 2) for i in range(10)])
        assert list(few) == pictures[::2]
        del sequence  # the view keeps the file
        assert few.without([1, 0, 0, 0, 0])[0] == pictures[2]
    assert list(spooled([])) == []


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 40])
def test_lines_are_found_from_the_place_of_every_sixteenth(tmp_path, count):
    pictures = some(count)
    write_records(tmp_path / "a.jsonl", pictures)
    for sequence in (RecordFile(tmp_path / "a.jsonl", Picture), spooled(pictures)):
        assert [sequence[n] for n in range(count)] == list(sequence) == pictures
        odd = [n % 2 for n in range(count)]
        assert list(sequence.without(odd)) == pictures[::2]


def test_a_damaged_line_is_named(tmp_path):
    write_records(tmp_path / "a.jsonl", some(2))
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write('{"id": "half')
    sequence = RecordFile(tmp_path / "a.jsonl", Picture)
    assert sequence[1] == some(2)[1]
    with pytest.raises(LeamlError, match=r"a\.jsonl line 3 is damaged"):
        sequence[2]


def test_threads_read_the_same_file():
    pictures = some(200)
    sequence, seen = spooled(pictures), []
    threads = [threading.Thread(target=lambda: seen.append(list(sequence))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [pictures] * 4


def test_views_make_items_when_asked():
    made = []
    view = Mapped(Chosen(range(100), [5, 3, 99]), lambda n: made.append(n) or n * 2)
    assert len(view) == 3 and not made
    assert view[1] == 6 and made == [3]
    assert list(view) == [10, 6, 198] and view[1:] == [6, 198]


def test_a_line_round_trips():
    picture = some(1)[0]
    assert records.from_line(Picture, records.to_line(picture), "x") == picture
    assert records.to_line(picture).count("\n") == 1


@pytest.mark.parametrize("limit", [2, 20_000])
def test_a_directory_is_sorted_as_a_list_of_its_paths(tmp_path, monkeypatch, limit):
    """Also where a folder's names are sorted in parts, and a folder's name continues another's."""
    monkeypatch.setattr(formats, "_SORTED_NAMES", limit)
    names = [
        "b.png",
        "a.png",
        "a/z.png",
        "a-b/x.png",
        "a b/x.png",
        "a/b/c.png",
        "ab.png",
        "ü/1.png",
        "a\nb.png",
        "zz.PNG",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "x.png").write_bytes(b"")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    out = load_unlabeled(tmp_path)
    assert [p.id for p in out] == sorted(names)
    assert all(p.images[0].uri == str(tmp_path / p.id) for p in out)


def test_equal_hashes_are_not_equal_ids(tmp_path, monkeypatch):
    """Ids and paths are told apart by their text; the hash only finds candidates."""
    for module in (formats, tables):
        monkeypatch.setattr(module, "text_key", lambda text: 7)
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(b"")
    rows = [{"id": i, "image": f"{i}.png"} for i in "abc"]
    path = tmp_path / "list.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "captions.jsonl").write_text(
        '{"image": "c.png", "caption": "third"}\n{"id": "a", "caption": "first"}\n'
    )
    out = load_unlabeled(path, captions=tmp_path / "captions.jsonl")
    assert [(p.id, p.caption) for p in out] == [("a", "first"), ("b", None), ("c", "third")]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[1]]))
    with pytest.raises(LeamlError, match="line 4: the id 'b' occurs twice"):
        load_unlabeled(path)
    shared = [{"img_id": i, "image": f"{i}.png"} for i in "abca"]
    path.write_text("".join(json.dumps(row) + "\n" for row in shared))
    assert [p.id for p in load_unlabeled(path)] == ["a", "b", "c"]
