"""SPORTU in its real schema: mixed types, shuffled options, scenes kept together, frames of clips."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import real_schema

from leaml_plugin import metrics, splits
from leaml_plugin.errors import LeamlError
from leaml_plugin.lmms import sports, video


@pytest.fixture
def rows(sportu):
    return sports.read_rows("mc", sports.find_file("mc", sportu))


@pytest.fixture
def dataset(sportu):
    from datasets import load_from_disk

    path, kwargs = sports.source("mc", sportu)
    assert kwargs == {"load_from_disk": True}
    return load_from_disk(path)["mc"]


def test_numbers_among_the_options_become_text(rows):
    assert rows[0]["options"] == ["4", "6", "5", "2"]
    assert rows[0]["sport"] == "soccer"
    assert {row["sport"] for row in rows} == set(sports.SPORTS)
    assert {row["level"] for row in rows} == set(sports.LEVELS)


def test_conversion_is_cached_by_content(sportu, tmp_path):
    assert sports.source("mc", sportu) == sports.source("mc", sportu)
    real_schema.write_sportu(tmp_path / "other", clips=4, videos=False)
    assert sports.source("mc", sportu) != sports.source("mc", tmp_path / "other")


def test_views_of_a_scene_are_never_split(dataset, rows):
    tested = {row["scene"] for row in sports.evaluation_rows(dataset)}
    assert tested == {row["scene"] for row in rows if splits.is_test(row["scene"])}
    assert tested


def test_shuffling_moves_the_answer_with_its_option(rows):
    for row in rows:
        shuffled = sports.shuffle_options(row)
        assert sorted(shuffled["options"]) == sorted(row["options"])
        assert sports.choices(shuffled)[shuffled["answer"]] == sports.choices(row)[row["answer"]]
        assert sports.shuffle_options(row) == shuffled
    assert any(sports.shuffle_options(row, 1) != sports.shuffle_options(row, 0) for row in rows)


def test_always_d_gains_as_given_and_not_shuffled():
    row = {"id": "", "question": "q", "options": ["Trip", "Push", "Hold", "None of the above"], "answer": "D"}
    letters = Counter(sports.shuffle_options({**row, "id": f"soccer_{i}"})["answer"] for i in range(400))
    assert set(letters) == set("ABCD")
    assert max(letters.values()) < 140, "a hundred each, give or take four standard deviations"


def test_question_lists_the_options(rows):
    assert sports.choice_question(rows[1]) == (
        "Is there a rule violation in the video?\nA. No\nB. Yes\n"
        "Answer with the option's letter from the given choices directly."
    )


def test_other_clips_are_of_another_scene_and_the_same_sport_where_possible():
    rows = [
        {"id": f"{sport}_{scene}_{view}", "sport": sport, "scene": f"{sport}_{scene}"}
        for sport, scene, view in [("soccer", 1, 0), ("soccer", 1, 1), ("soccer", 2, 0), ("tennis", 3, 0)]
    ]
    other = sports._other_clips(rows)
    assert other["soccer_1_0"] == other["soccer_1_1"] == "soccer_2_0"
    assert other["soccer_2_0"] in ("soccer_1_0", "soccer_1_1")
    assert other["tennis_3_0"].startswith("soccer")


def test_clip_of_every_row_is_found_as_video_or_frames(dataset):
    for row in sports.evaluation_rows(dataset):
        assert Path(row["clip"]).exists()
        assert len(sports.clip_frames(row)) in (5, 7)


def test_missing_clips_are_counted_and_named_before_anything_runs(tmp_path):
    from datasets import load_from_disk

    root = real_schema.write_sportu(tmp_path / "SPORTU", clips=60, videos=False)
    dataset = load_from_disk(sports.source("mc", root)[0])["mc"]
    with pytest.raises(LeamlError, match=r"clips are not there, the first is .*\.mp4 \(or .*/ with frames\)"):
        sports.evaluation_rows(dataset)


def test_blind_letters_do_not_depend_on_the_shuffle(dataset):
    def texts(rows):
        return [sports.choices(row)[row["blind"]] for row in rows]

    shuffled, given = sports.evaluation_rows(dataset), sports.evaluation_rows(dataset, shuffle=False)
    assert texts(shuffled) == texts(given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"options": None}, "'options' should map"),
        ({"options": {"A": "x"}}, "'options' should map"),
        ({"answer": "E"}, "answer 'E' is none of the options A, B, C, D"),
        ({"question": ""}, "has no 'question'"),
        ({"id": None}, "has no 'id'"),
    ],
)
def test_a_broken_entry_is_named(tmp_path, change, message):
    entries = real_schema.sportu_rows(2)
    entries[3].update(change)
    path = tmp_path / "SportU_Video_mc.json"
    path.write_text(json.dumps(entries))
    with pytest.raises(LeamlError, match=f"entry 4: .*{message}"):
        sports.read_rows("mc", path)


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_broken_file_is_named(tmp_path, text):
    path = tmp_path / "SportU_Video_mc.json"
    path.write_text(text)
    with pytest.raises(LeamlError, match=r"SportU_Video_mc\.json"):
        sports.read_rows("mc", path)


def test_without_data_the_way_to_them_is_one_sentence():
    with pytest.raises(LeamlError) as error:
        sports.data_root()
    for part in ("LEAML_SPORTS_DATA", "chili-lab/SPORTU", "leaml_sports_synthetic"):
        assert part in str(error.value)


def test_a_repository_without_the_file(tmp_path):
    with pytest.raises(LeamlError, match=r"no sportu_text\.json"):
        sports.find_file("text", tmp_path)


# ------------------------------------------------------------------------------------------------------- video


def greys(pictures) -> list[int]:
    return [round((picture.getpixel((16, 16))[0] - 20) / 20) for picture in pictures]


@pytest.mark.parametrize(
    ("total", "wanted", "expected"), [(10, 3, [1, 5, 8]), (3, 5, [0, 1, 2]), (4, 1, [2]), (7, 7, [*range(7)])]
)
def test_samples_are_even(total, wanted, expected):
    assert video.sample(total, wanted) == expected


def test_frames_of_an_mp4_are_the_sampled_ones(tmp_path):
    real_schema.write_mp4(tmp_path / "clip.mp4", 10, 0)
    assert greys(video.frames(tmp_path / "clip.mp4", 3)) == [1, 5, 8]
    assert greys(video.frames(tmp_path / "clip.mp4", 50)) == list(range(10))


def test_frames_of_a_directory_are_the_sampled_ones(tmp_path):
    real_schema.write_frames(tmp_path / "clip", 10, 0)
    assert greys(video.frames(tmp_path / "clip", 3)) == [1, 5, 8]


def test_what_is_no_video_is_named(tmp_path):
    (tmp_path / "clip.mp4").write_bytes(b"no video")
    with pytest.raises(LeamlError, match=r"clip\.mp4: cannot be decoded as video"):
        video.frames(tmp_path / "clip.mp4", 3)


def test_a_truncated_video_gives_what_it_has_or_an_error(tmp_path):
    whole = tmp_path / "whole.mp4"
    real_schema.write_mp4(whole, 10, 0)
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(LeamlError, match=r"cut\.mp4"):
        video.frames(cut, 3)


def test_clips_are_found_in_any_folder_and_case(tmp_path):
    real_schema.write_frames(tmp_path / "a" / "Soccer_1", 2, 0)
    real_schema.write_mp4(tmp_path / "b" / "c" / "Basketball_2.MP4", 2, 0)
    assert set(video.clip_index(tmp_path)) == {"soccer_1", "basketball_2"}


def test_blind_letters_come_from_the_labelled_scenes_alone(dataset, rows, monkeypatch):
    monkeypatch.setenv("LEAML_LABEL_FRACTION", "0.3")
    split = splits.make_split((row["scene"] for row in rows), label_fraction=0.3)
    labels = [(r["question"], sports.choices(r), r["answer"]) for r in rows if r["scene"] in split.labelled]
    prior = metrics.BlindOptions(labels)
    for row in sports.evaluation_rows(dataset):
        assert row["blind"] == prior.answer(row["question"], sports.choices(row))
