"""SportR: pictures as its page names them, questions in every layout that is read, the same controls as elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import real_schema

from leaml_plugin import splits
from leaml_plugin.errors import LeamlError
from leaml_plugin.lmms import sportr


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return real_schema.write_sportr(tmp_path_factory.mktemp("sportr") / "SportR")


@pytest.fixture
def dataset(root):
    from datasets import load_from_disk

    path, kwargs = sportr.source(root)
    assert kwargs == {"load_from_disk": True}
    return load_from_disk(path)["pictures"]


def test_every_question_about_a_picture_is_read(root, dataset):
    wanted = real_schema.sportr_rows(40)
    assert [(Path(row["picture"]).name, row["question"], row["answer"]) for row in dataset] == [
        (row["image"], row["question"], row["answer"]) for row in wanted
    ]
    assert set(dataset["sport"]) == set(sportr.SPORTS)


def test_conversion_is_cached_by_content(root, tmp_path):
    assert sportr.source(root) == sportr.source(root)
    assert sportr.source(root) != sportr.source(real_schema.write_sportr(tmp_path / "other", pictures=3))


ENTRY = {"question": "Foul?", "answer": "Yes"}


@pytest.mark.parametrize(
    "data",
    [
        [{"image": "soccer_1.png", **ENTRY}],
        [{"image_path": "SportsImage/soccer_1.png", "Question": "Foul?", "Answer": "Yes"}],
        {"soccer_1": ENTRY},
        {"soccer_1.png": [ENTRY]},
        {"SportsImage\\soccer_1.png": {"Q1": "Foul?", "A1": "Yes"}},
        {"id": "soccer_1", "question_1": "Foul?", "answer_1": ["Yes"]},
        [{"image": "soccer_1.png", "question": "Foul?", "options": {"A": "No", "B": "Yes"}, "answer": "B"}],
        [{"image": "soccer_1.png", "question": "Foul?", "options": ["No", "Yes"], "answer": "Yes"}],
    ],
)
def test_layouts(tmp_path, data):
    real_schema.write_sportr(tmp_path, pictures=0)
    (tmp_path / "SportR_image_qa.json").write_text(json.dumps(data))
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "SportsImage" / "Soccer_1.PNG")
    (row,) = sportr.read_rows(tmp_path)
    assert (row["id"], row["sport"], row["question"], row["answer"]) == ("soccer_1", "soccer", "Foul?", "Yes")


def test_several_numbered_questions_of_one_picture(tmp_path):
    real_schema.write_sportr(tmp_path, pictures=2)
    entry = {"image": "soccer_2.png", "Q1": "Foul?", "A1": "Yes", "Q2": "Which?", "A2": "Hand ball", "Q3": "Why?"}
    (tmp_path / "SportR_image_qa.json").write_text(json.dumps([entry]))
    (tmp_path / "again.json").write_text(json.dumps([entry]))
    assert [(r["question"], r["answer"]) for r in sportr.read_rows(tmp_path)] == [
        ("Foul?", "Yes"),
        ("Which?", "Hand ball"),
    ]


def test_rows_are_split_by_picture_and_blind_answers_are_learnt_from_labels(dataset, monkeypatch):
    monkeypatch.setenv("LEAML_LABEL_FRACTION", "0.2")
    rows = sportr.evaluation_rows(dataset)
    assert {row["id"] for row in rows} == {row["id"] for row in dataset if splits.is_test(row["id"])}
    assert len(rows) == 2 * len({row["id"] for row in rows})
    labelled = splits.make_split(dataset["id"], label_fraction=0.2).labelled
    learnt = {row["answer"].lower() for row in dataset if row["id"] in labelled}
    assert {row["blind"] for row in rows} <= {text.replace(" ", "-") for text in learnt} | learnt


def test_other_pictures_are_never_the_own(dataset):
    for row in sportr.evaluation_rows(dataset, other_picture=True):
        assert row["shown"] != row["picture"]


def test_options_are_asked_and_read():
    row = {"question": "Foul?", "options": ["No", "Yes"], "answer": "Yes"}
    assert "Foul?\nA. No\nB. Yes\n" in sportr.question_text(row)
    assert [sportr.answer_text(text, row) for text in ("B", "B. Yes", "Yes", "perhaps")] == ["Yes"] * 3 + ["perhaps"]


def test_what_is_no_copy_of_it_is_said_so(tmp_path):
    with pytest.raises(LeamlError, match="no picture named <sport>_<number>"):
        sportr.read_rows(tmp_path)
    real_schema.write_sportr(tmp_path / "SportR", 1)
    questions = tmp_path / "SportR" / "SportR_image_qa.json"
    questions.write_text(json.dumps([{"image": "soccer_9.png", **ENTRY}]))
    with pytest.raises(LeamlError, match="no question about any of the 1 pictures"):
        sportr.read_rows(tmp_path)
    questions.write_text("{")
    with pytest.raises(LeamlError, match=r"SportR_image_qa\.json: cannot be read as JSON"):
        sportr.read_rows(tmp_path)


def test_without_data_the_way_to_them_is_one_sentence(tmp_path):
    with pytest.raises(LeamlError, match=r"LEAML_SPORTR_DATA is not set.*ask for access to haotianxia/SportR"):
        sportr.data_root()
    with pytest.raises(LeamlError, match="no such directory"):
        sportr.data_root(str(tmp_path / "none"))


def test_through_lmms_eval(root, tiny_models):
    pytest.importorskip("lmms_eval")
    from leaml_plugin import models
    from leaml_plugin.lmms import run

    loaded = models.load(tiny_models("qwen2_5_vl"), device="cpu")
    names = [f"leaml_sports_sportr{suffix}" for suffix in ("", "_nopicture", "_otherpicture")]
    done = run.evaluate(
        loaded, names, sportr_data=root, label_fraction=0.2, log_samples=True, gen_kwargs={"max_new_tokens": 4}
    )
    for name in names:
        values = done["results"][name]
        assert values["above_blind"] == pytest.approx(values["exact_match"] - values["blind_majority"])
        assert values["blind_majority"] > 0
        assert {f"sport_{sport}" for sport in sportr.SPORTS} <= set(values)


def test_what_each_task_shows(root, monkeypatch):
    pytest.importorskip("lmms_eval")
    from lmms_eval.tasks import get_task_dict
    from PIL import Image

    from leaml_plugin.lmms import run

    monkeypatch.setenv("LEAML_SPORTR_DATA", str(root))
    names = [f"leaml_sports_sportr{suffix}" for suffix in ("", "_nopicture", "_otherpicture")]
    shown = {}
    for name, task in get_task_dict(names, run._task_manager(names), "simple").items():
        task.build_all_requests(limit=1)
        _, _, to_pictures, number, _, split = task.instances[0].args
        doc = task.dataset[split][number]
        shown[name] = [picture.tobytes() for picture in to_pictures(doc)]
    own, none, other = (shown[name] for name in names)
    assert own == [Image.open(doc["picture"]).convert("RGB").tobytes()]
    assert none == [] and len(other) == 1 and other != own
