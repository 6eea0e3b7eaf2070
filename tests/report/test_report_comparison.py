"""The page that compares methods."""

import pytest
from report_pages import Page, snapshot

from leaml_plugin.errors import LeamlError
from leaml_plugin.metrics import Estimate
from leaml_plugin.records import QA, ImageRef
from leaml_plugin.report import write_comparison, write_report

SCRIPT = "<script>alert(1)</script>"


def rows(**methods):
    def around(v):
        return Estimate(v, v - 0.03, v + 0.03, 90, 30)

    return [
        {"method": m, "exact match": around(v), "above blind": around(v - 0.36), "seeds": 3} for m, v in methods.items()
    ]


@pytest.fixture
def runs(make_run):
    common = {"pictures": 3, "questions": 60}
    return {name: make_run(name, skill=skill, **common) for name, skill in (("LoRA", 0.3), ("LEAML", 0.9))}


def test_table_plot_notes_links_and_samples(runs, tmp_path):
    write_report(runs["LoRA"])
    path = write_comparison(
        tmp_path / "pages" / "demo.html",
        rows(blind=0.36, LoRA=0.4, LEAML=0.437),
        runs,
        [f"Synthetic {SCRIPT}.", "One seed."],
        reference="blind",
        title=SCRIPT,
    )
    page = Page(path)
    text = page.text()
    assert "43.7\u202f%" in text and "+7.7" in text and "40.7 to 46.7" in text
    assert f"Synthetic {SCRIPT}." in text and page.all("h1")[0][1] == SCRIPT
    assert len(page.all("circle", cls="dot")) == 3 and len(page.all("path", cls="reference")) == 1
    # only the report that exists is linked, by a relative address
    links = [a["href"] for a, _ in page.all("a") if not a["href"].startswith("#")]
    assert links == ["../LoRA/report.html"] and (path.parent / links[0]).is_file()
    assert len(page.all("li", cls="card")) == 24
    assert len(page.all("script")) == 1 and not path.with_name("demo_files").exists()
    right = len(page.all("tr", cls="good")), len(page.all("tr", cls="bad"))
    assert sum(right) == 48 and right[0] > 0 and right[1] > 0


def test_samples_are_drawn_whatever_the_result(runs, make_run, tmp_path):
    def shown(answers_of):
        write_comparison(tmp_path / "c.html", rows(LEAML=0.4), answers_of, "")
        return [text for _, text in Page(tmp_path / "c.html").all("strong")]

    best, worst = (
        make_run("best", skill=1.0, pictures=3, questions=60),
        make_run("worst", skill=0.0, pictures=3, questions=60),
    )
    assert shown({"LEAML": best}) == shown({"LEAML": worst})


def test_equal_arguments_give_equal_bytes(runs, tmp_path):
    pages = [write_comparison(tmp_path / n / "c.html", rows(LEAML=0.4), runs, "") for n in ("a", "b")]
    assert snapshot(pages[0]) == snapshot(pages[1])
    assert str(tmp_path) not in pages[0].read_text()


def test_answers_may_be_given(tmp_path, pictures):
    questions = [QA(str(i), (ImageRef(str(p)),), f"Is it {i}?", "yes") for i, p in enumerate(pictures)]
    answers = {"a": {"0": "Yes.", "1": SCRIPT}, "b": {"1": "yes", "99": "of another test"}}
    page = Page(write_comparison(tmp_path / "c.html", rows(a=0.1), {}, "", questions=questions, answers=answers))
    assert "2 of 6 questions" in page.text() and SCRIPT in page.text()
    assert len(page.all("tr", cls="good")) == 2 and len(page.all("tr", cls="bad")) == 1
    assert len(page.all("img")) == 2


def test_answers_to_another_question_of_the_same_id_do_not_count(runs, tmp_path):
    qa = QA("test-0", (), "Not what the runs asked?", "yes")
    page = Page(write_comparison(tmp_path / "c.html", rows(a=0.1), runs, "", questions=[qa]))
    assert not page.all("li", cls="card")


def test_bad_arguments(tmp_path):
    with pytest.raises(LeamlError, match="no method to compare"):
        write_comparison(tmp_path / "c.html", [], {}, "")
    with pytest.raises(LeamlError, match=r"reference 'blond' is none of the methods \(blind\)"):
        write_comparison(tmp_path / "c.html", rows(blind=0.3), {}, "", reference="blond")
    with pytest.raises(LeamlError, match="is no run directory"):
        write_comparison(tmp_path / "c.html", rows(blind=0.3), {"blind": tmp_path}, "")
    assert not (tmp_path / "c.html").exists()
