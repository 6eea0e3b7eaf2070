"""The page of a run, read back without a browser: what it shows, that it is safe, self-contained and reproducible."""

import argparse
import dataclasses
import itertools
import json
import re
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_pages import Page, chunk, snapshot
from report_runs import MARKUP, MakeRun, paint, write_log

from leaml_plugin import report
from leaml_plugin.artifacts import RunDirectory, write_json, write_records
from leaml_plugin.cli import COMMANDS
from leaml_plugin.cli import main as cli
from leaml_plugin.errors import LeamlError
from leaml_plugin.records import ImageRef, Picture, PseudoQA
from leaml_plugin.report import gallery, words, write_report
from leaml_plugin.report.facts import Facts, choose
from leaml_plugin.stages import caption, filter, verify
from leaml_plugin.teachers import Caption
from leaml_plugin.teachers.client import ServerConfig

STAGES = ("inputs", "relevance", "train_generator", "generate", "filter", "finetune", "evaluate")


@pytest.fixture(scope="module")
def page(shared_run):
    return Page(shared_run.report)


def files(run: RunDirectory):
    return run.report.with_name("report_files")


# ------------------------------------------------------------------------------------------------------ what it shows


def test_counts_are_those_of_the_filter(shared_run, page):
    kept = (shared_run.stage("filter").path / "kept.jsonl").read_text().count("\n")
    lines = (shared_run.stage("filter").path / "dropped.jsonl").read_text().strip().split("\n")
    dropped = [json.loads(line) for line in lines]
    facts = Facts(shared_run)
    assert facts.kept == kept and facts.pairs == kept + len(dropped) == 160
    for reason in filter.REASONS:
        total = sum(counts[reason] for counts in facts.yields.values())
        assert total == sum(d["reason"] == reason for d in dropped)
    assert f"kept{kept} {words.percent(kept / 160)}" in page.text()
    for reason in facts.reasons:
        assert words.reason_text(reason) in page.text()


def test_every_picture_is_in_the_gallery_with_its_pairs(shared_run, page):
    index = page.index("pseudo")
    texts = [text for name in index["texts"] for text in chunk(files(shared_run) / name)]
    thumbs = [thumb for name in index["thumbs"] for thumb in chunk(files(shared_run) / name)]
    assert [t[0] for t in texts] == [f"img_{i:05d}" for i in range(40)]
    assert len(thumbs) == len(index["masks"]) == 40
    assert all(len(t[3]) == 4 for t in texts)
    assert sum(isinstance(t, str) for t in thumbs) == 1 and "no such picture" in thumbs[1]
    assert texts[2][2] == 3 and thumbs[2][1] > 2 * thumbs[2][2]  # three frames side by side
    for text, mask in zip(texts, index["masks"]):
        assert mask == sorted({row[0] * len(index["families"]) + row[1] for row in text[3]})
    written = [json.loads(x) for p in shared_run.stage("generate").shards() for x in p.read_text().strip().split("\n")]
    questions = [[w["question"] for w in written if w["picture_id"] == text[0]] for text in texts]
    assert [[row[2] for row in text[3]] for text in texts] == questions  # in the order in which they were drawn
    second = [note for text in texts for row in text[3] for note in row[4] if note[0] == "asked again:"]
    assert len(second) == sum("round_trip" in w["checks"] for w in written) > 0
    assert "without the picture:" in page.text()
    statuses = [key for key, _ in index["statuses"]]
    kept = sum(statuses[row[0]] == "" for t in texts for row in t[3])
    assert kept == Facts(shared_run).kept


def test_results_stand_against_the_image_blind_majority(shared_run, page):
    facts = Facts(shared_run)
    assert sum(r.n for r in facts.by_template) == 90
    hits = sum(r.exact.value * r.n for r in facts.by_template) / 90
    assert hits == pytest.approx(facts.metrics["exact_match"]["value"])
    blind = sum(r.blind.value * r.n for r in facts.by_template) / 90
    assert blind == pytest.approx(facts.metrics["blind_majority"]["value"])
    for r in facts.by_template:
        assert r.gain.value == pytest.approx(r.exact.value - r.blind.value)
        assert r.question in page.text() and words.percent(r.exact.value) in page.text()


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.02, 0.1, "it has learned from the pictures"),
        (-0.1, -0.02, "worse than not looking"),
        (-0.05, 0.1, "no difference from a model that never sees the picture"),
        (None, None, "too few pictures for an interval"),
    ],
)
def test_the_verdict_follows_the_interval(make_run, low, high, said):
    run = make_run(pictures=2, questions=6, stages=("inputs", "evaluate"))
    path = run.stage("evaluate").path / "metrics.json"
    metrics = json.loads(path.read_text())
    metrics["above_blind"] = {
        "value": 0.5 * ((low or 0) + (high or 0)),
        "low": low,
        "high": high,
        "n": 6,
        "clusters": 2,
    }
    write_json(path, metrics)
    assert said in Page(write_report(run)).text()


def test_answers_are_compared_with_the_labels(shared_run):
    facts = Facts(shared_run)
    assert sum(g.labels.total() for g in facts.answers_by_family) == len(facts.labels) == 60
    assert sum(g.kept.total() for g in facts.answers_by_family) == facts.kept
    assert all(0 <= g.distance <= 1 for g in facts.answers_by_family if g.distance is not None)
    for g in (*facts.answers_by_family, *facts.answers_by_template):
        rows = g.top(2)
        assert sum(x for _, x, _ in rows) == g.labels.total() and sum(y for _, _, y in rows) == g.kept.total()


def test_neurons_losses_and_settings(shared_run, page):
    maps = page.all("table", cls="heat")
    assert len(maps) == 4  # share, relevance, captured; overlap
    assert len(page.all("svg", cls="plot")) == 4  # two losses, two gradient norms
    assert {"0", "3"} <= {text for _, text in page.all("th", scope="col")}
    assert "model.language_model.layers" in page.text()
    assert "finetune.train.steps" in page.text()


def test_the_page_has_the_order_that_a_screen_reader_needs(page):
    ids = [a["id"] for _, a, _ in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    levels = [int(tag[1]) for tag, _, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
    assert all(a["href"][1:] in ids for a, _ in page.all("a") if a["href"].startswith("#"))
    assert all(a.get("alt") for a, _ in page.all("img"))
    assert all(a.get("aria-label") for a, _ in page.all("svg", role="img"))
    assert all(a.get("scope") for a, _ in page.all("th"))
    assert not page.all("div", onclick="") and all(a.get("type") for a, _ in page.all("button"))
    assert page.elements[0][0] == "html" and page.elements[0][1]["lang"] == "en"
    assert page.all("a", cls="skip")[0][0]["href"] == "#main"


def test_a_caption_tells_who_wrote_it_and_a_missing_one_why(make_run):
    run = make_run(pictures=5, markup=False, stages=("inputs", "generate"))
    asked = {"teacher": "http://gpu7:8000/v1", "model": "/home/me/models/big", "prompt": "teacher-1-62bd965c"}
    said = [
        Caption("img_00000", "A spot.", meta={**asked, "finish_reason": "length", "prompt_tokens": 70}),
        Caption("img_00002", None, "refused", MARKUP, {**asked, "model": "Qwen/Qwen2.5-VL-72B-Instruct"}),
        Caption("img_00003", None, "unreadable: /data/me/3.png: the picture is truncated", "", asked),
    ]
    stage = run.stage("caption")
    write_records(stage.shard(0), said)
    bare = {r.id: None for r in said if r.caption is None}
    pool = [dataclasses.replace(p, caption=bare.get(p.id, p.caption)) for p in Facts(run).pictures()]
    write_records(stage.file("pictures.jsonl"), pool)
    totals = caption.usage_of(stage.shards(), ServerConfig())
    write_json(stage.file("usage.json"), dataclasses.asdict(totals))
    page = Page(write_report(run))
    shown = [text for _, text in page.all("span", cls="source")]
    assert shown[:5] == [
        "big, prompt teacher-1-62bd965c, ended by the token limit",
        "",
        f"no caption (Qwen/Qwen2.5-VL-72B-Instruct, prompt teacher-1-62bd965c): refused; as written: {MARKUP}",
        "no caption (big, prompt teacher-1-62bd965c): unreadable: 3.png: the picture is truncated",
        "",
    ]
    assert [row[4] for row in chunk(files(run) / page.index("pseudo")["texts"][0])] == shown[:5]
    assert "The teacher: 1 captions of 3 pictures (1 refused, 1 unreadable); 1 ended by the token limit" in page.text()
    assert "/home/me" not in page.source and "/data/me" not in page.source and "gpu7" not in page.source


# --------------------------------------------------------------------------------------------------------- safety


def test_markup_shows_as_text(shared_run, page):
    assert MARKUP.split(" \u2028")[0] in page.text()
    scripts = page.all("script")
    assert len(scripts) == 3  # its own, and the index of each gallery
    assert [a.get("type") for a, _ in scripts].count("application/json") == 2
    assert not any(name.startswith("on") for _, attributes, _ in page.elements for name in attributes)
    assert "49" not in page.all("span", cls="caption")[0][1]  # no template is evaluated in data
    for attributes, text in scripts:
        if attributes.get("type"):
            assert "<" not in text and text.isascii()
    for path in files(shared_run).iterdir():
        source = path.read_bytes()
        assert b"<" not in source and source.isascii()
        chunk(path)


@given(st.recursive(st.text() | st.none() | st.integers(), lambda x: st.lists(x, max_size=3), max_leaves=8))
def test_script_json_is_json_that_cannot_break_out(data):
    text = gallery.script_json(data)
    assert json.loads(text) == data
    assert text.isascii() and not set("<>&") & set(text)


def test_a_lone_surrogate_does_not_end_the_report(make_run):
    run = make_run(pictures=3, questions=0, stages=("inputs", "generate"))
    pair = PseudoQA("img_00000", (), 0, "\ud800", "Is it \ud800?", "yes \udfff")
    lines = json.dumps(dataclasses.asdict(pair)) + "\n"  # JSON may escape what UTF-8 cannot hold
    run.stage("generate").shard(0).write_text(lines)
    assert "Is it ?" in Page(write_report(run)).text()


def test_nothing_is_loaded_from_elsewhere(page):
    for tag, attributes, _ in page.elements:
        for name in ("src", "href", "srcset", "poster", "action", "data", "xlink:href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), (tag, name, value)
    style = page.all("style")[0][1]
    assert "url(" not in style and "@import" not in style
    own = next(text for a, text in page.all("script") if not a)
    assert not re.search(r"https?:|fetch\(|XMLHttpRequest|innerHTML|insertAdjacentHTML|document\.write|eval\(", own)
    policy = page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0][0]["content"]
    assert "default-src 'none'" in policy and "'unsafe-eval'" not in policy
    assert "unsafe-inline" not in policy.split("script-src")[1]


def test_no_torch_is_imported():
    code = (
        "import sys, leaml_plugin.report.page, leaml_plugin.report.comparison, leaml_plugin.report.text;"
        "assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    code = "import sys, leaml_plugin.report; assert not {'jinja2', 'numpy', 'PIL'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# ------------------------------------------------------------------------------------------- bytes, kills, damage


def test_equal_runs_give_equal_bytes_wherever_they_lie(tmp_path):
    pages = [write_report(MakeRun(tmp_path / name)(pictures=30)) for name in ("here", "there")]
    assert snapshot(pages[0]) == snapshot(pages[1])
    for data in snapshot(pages[0]).values():
        assert str(tmp_path).encode() not in data and b"/home/" not in data


def test_writing_again_changes_nothing_and_leaves_what_is_not_ours(make_run):
    run = make_run(pictures=30)
    before = snapshot(write_report(run))
    (files(run) / "notes.txt").write_text("mine")
    (files(run) / "pseudo-text-0007.0123456789ab.js").write_text("of an older report")
    (files(run) / ".pseudo-text-0007.0123456789ab.js.4711.tmp").write_text("of a killed report")
    assert snapshot(write_report(run)) == {**before, "report_files/notes.txt": b"mine"}


@pytest.mark.parametrize("after", [0, 1, 2, 3, 4])
def test_a_killed_report_leaves_the_old_one_whole(make_run, monkeypatch, after):
    run = make_run(pictures=50, questions=9)
    before = snapshot(write_report(run))
    picture = PseudoQA("img_00049", (), 9, "", "Is it new?", "yes")
    write_records(run.stage("filter").path / "dropped.jsonl", [dataclasses.replace(picture, reason="unlikely")])
    paint(run.path.parent / "images" / "img_0000.png", seed=99)
    calls = 0
    real = gallery.write_text

    def dies(path, text):
        nonlocal calls
        calls += 1
        if calls > after:
            raise KeyboardInterrupt
        real(path, text)

    with monkeypatch.context() as m:
        m.setattr(gallery, "write_text", dies)
        m.setattr("leaml_plugin.report.page.write_text", dies)
        with pytest.raises(KeyboardInterrupt):
            write_report(run)
    now = snapshot(run.report)
    assert {name: now[name] for name in before} == before
    assert not [name for name in now if name.endswith(".tmp")]
    again = snapshot(write_report(run))
    assert set(again) == {"report.html"} | {f"report_files/{n}" for n in _named(Page(run.report))}
    assert again["report.html"] != before["report.html"]


def _named(page: Page) -> list[str]:
    return [name for g in ("pseudo", "answers") for kind in ("texts", "thumbs") for name in page.index(g)[kind]]


@pytest.mark.parametrize("upto", range(1, len(STAGES) + 1))
def test_a_run_that_is_under_way_has_a_page(make_run, upto):
    run = make_run(pictures=6, questions=6, stages=STAGES[:upto])
    text = Page(write_report(run)).text()
    assert "tiny-qwen, LEAML" in text and "not finished" not in text
    if upto < 5:
        assert "inconsistent" not in text
    if upto == 4:
        assert "the filter has not run yet" in text


def test_an_unfinished_stage_is_named_and_its_torn_log_read(make_run):
    run = make_run(pictures=2, questions=0, stages=("inputs",))
    stage = run.stage("finetune")
    write_log(stage, ["vqa"], steps=20)
    log = stage.path / "log.jsonl"
    log.write_text(log.read_text() + '{"step": 20, "vq')
    page = Page(write_report(run))
    assert "not finished (finetune)" in page.text() and "Loss over 20 steps" in page.text()
    log.write_text('{"step": 0, "vq\n' + log.read_text())
    with pytest.raises(LeamlError, match=r"log\.jsonl line 1 is damaged"):
        write_report(run)


def test_without_labels_there_is_no_comparison_but_a_page(make_run):
    run = make_run(pictures=4, questions=6, stages=STAGES[1:])
    page = Page(write_report(run))
    assert "does not hold the labels" in page.text()
    assert "no picture is recorded for it" in page.text()


def test_no_pictures_no_folder(make_run):
    run = make_run(pictures=2, questions=0, stages=("finetune",))
    write_report(run)
    assert not files(run).exists()


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(LeamlError, match="is no run directory of leaml"):
        write_report(tmp_path)


def test_a_page_that_is_not_of_a_run_is_not_replaced(tmp_path):
    demo = RunDirectory.open(tmp_path / "demo", {"pictures": 1000}, {})
    write_records(demo.stage("world").file("x.jsonl"), [])
    demo.report.write_text("the comparison")
    with pytest.raises(LeamlError, match="holds no stage of an adaptation"):
        write_report(demo)
    assert demo.report.read_text() == "the comparison"


def test_a_report_killed_at_any_moment_leaves_a_whole_page(make_run):
    run = make_run(pictures=50, questions=9)
    write_report(run)
    code = (
        "import itertools, sys; from leaml_plugin.report import write_report;"
        "[print(write_report(sys.argv[1], pictures=n), flush=True) for n in itertools.cycle([40, 50])]"
    )
    for pause in (0.01, 0.06, 0.13):
        child = subprocess.Popen([sys.executable, "-c", code, str(run.path)], stdout=subprocess.PIPE)
        child.stdout.readline()  # the first page is there, the next one under way
        time.sleep(pause)
        child.kill()
        child.wait()
        child.stdout.close()
        page = Page(run.report)
        for name in _named(page):
            chunk(files(run) / name)
    write_report(run)
    assert {p.name for p in files(run).iterdir()} == set(_named(Page(run.report)))


# ------------------------------------------------------------------------------------------------------- many pictures


def test_ten_thousand_pictures(tmp_path):
    """Thumbnails and texts lie in chunks; the page itself stays small."""
    run = MakeRun(tmp_path)(pictures=10_000, samples=1, distinct=20, stages=("inputs", "generate"))
    page = Page(write_report(run))
    index = page.index("pseudo")
    assert len(index["masks"]) == 10_000 and len(page.all("li", cls="card")) < 60
    assert len(index["texts"]) == 50 and len(index["thumbs"]) == 250
    assert len(page.source) < 1_000_000
    assert max(p.stat().st_size for p in files(run).iterdir()) < 300_000
    assert chunk(files(run) / index["texts"][-1])[-1][0] == "img_09999"


def test_a_sample_depends_on_ids_alone(make_run):
    run = make_run(pictures=40, questions=30)
    page = Page(write_report(run, pictures=10))
    index = page.index("pseudo")
    shown = [t[0] for name in index["texts"] for t in chunk(files(run) / name)]
    assert len(shown) == 10 and shown == sorted(shown)
    assert "10 of 40 pictures, drawn by a hash of their id" in page.text()
    assert Facts(run).pairs == 160  # counts stay those of the whole run
    ids = [f"img_{i:05d}" for i in range(40)]
    assert choose(ids, 10) == choose(reversed(ids), 10) == (set(shown), 40)
    assert choose(ids[:20], 10)[0] >= set(shown) & set(ids[:20])


def test_a_picture_listed_but_never_written_for_is_shown(tmp_path):
    run = RunDirectory.open(tmp_path / "run", {"model": "m"}, {})
    stage = run.stage("inputs")
    write_records(stage.file("pictures.jsonl"), [Picture("only", (ImageRef(str(tmp_path / "none.png")),), "a caption")])
    write_records(run.stage("generate").shard(0), [PseudoQA("other", (), 0, "x", "Is it?", "yes")])
    shown, total = Facts(run).gallery(10)
    assert [s.id for s in shown] == ["only"] and total == 1 and shown[0].rows == []


# ----------------------------------------------------------------------------------------------- words, command line


def test_every_reason_of_the_filter_has_words():
    assert set(filter.REASONS) == set(words.REASONS)
    assert {verify.ROUND_TRIP, verify.BLIND, verify.CAPTION} == set(words.CHECKS)
    assert "'brand new'" in words.reason_text("brand_new")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("/home/me/models/tiny", "tiny"),
        ("../../secret/train.jsonl", "train.jsonl"),
        ("C:\\Users\\me\\train.jsonl", "train.jsonl"),
        ("~/train.jsonl", "train.jsonl"),
        ("Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-VL-3B-Instruct"),
        ({"a": ["/x/y", 3]}, {"a": ["y", 3]}),
        ("", ""),
    ],
)
def test_settings_keep_no_folder_of_this_machine(value, shown):
    assert words.without_machine(value) == shown


def test_the_command_writes_the_page_and_prints_tables(make_run, capsys, monkeypatch):
    run = make_run(pictures=6, questions=6)
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    assert report.main(parser.parse_args([str(run.path), "--title", "A <b>title</b>", "--pictures", "3"])) == 0
    out = capsys.readouterr().out
    assert "exact match" in out and "image-blind majority" in out and out.rstrip().endswith(str(run.report))
    page = Page(run.report)
    assert page.all("h1")[0][1] == "A <b>title</b>" and not page.all("b", dir="auto")
    assert len(page.index("pseudo")["masks"]) == 3
    monkeypatch.setitem(COMMANDS, "report", ("leaml_plugin.report", "write the report page of a run"))
    assert cli(["report", str(run.path / "nothing")]) == 2
    assert "is no run directory" in capsys.readouterr().err


def test_yields_against_the_target_mix(make_run):
    run = make_run("steered", pictures=10, missing=False)
    assert Facts(run).steered == [] and "target" not in Page(write_report(run)).text()
    rows = [
        {"name": "is there", "labels": 0.4, "target": 0.75},
        {"name": MARKUP, "labels": 0.1, "target": 0.25},
        {"name": "", "labels": 0.5, "target": 0.0},
    ]
    write_json(run.stage("generate").path / "families.json", {"families": rows})
    steered = Facts(run).steered
    questions = [pair.question.casefold() for pair in Facts(run).pseudo() if pair.question]
    share = sum(q.startswith("is there") for q in questions) / len(questions)
    assert 0 < share < 1 and steered[0]["written"] == pytest.approx(share)
    assert sum(row["written"] for row in steered) == pytest.approx(1) == sum(row["kept"] for row in steered)
    text = Page(write_report(run)).text()
    assert f"is there{words.percent(0.4)}{words.percent(0.75)}{words.percent(share)}" in text.replace("\n", "")
    assert "anything else" in text and MARKUP in text
