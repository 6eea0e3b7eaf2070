"""Every score against values computed by hand and against scikit-learn; every interval against its definition."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score
from sklearn.preprocessing import MultiLabelBinarizer

from leaml_plugin import metrics

# a busy machine is no failure
patient = settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])

# ------------------------------------------------------------------------------------------------ normalisation


@pytest.mark.parametrize(
    ("noisy", "clean"),
    [
        ("Yes.", "yes"),
        ("  YES\n", "yes"),
        ("lower-rigth", "lower-right"),
        ("lower-right; center", "center; lower-right"),
        ("pink;red", "red; pink"),
        ("Pink, and red", "pink; red"),
        ("pink\nred", "red; pink"),
        ("pink; pink", "pink"),
        (">20", ">20mm"),
        ("> 20 mm", ">20mm"),
        ("5 - 10 mm", "5-10mm"),
        ("5–10mm", "5-10mm"),
        ("11 to 20 millimeters", "11-20mm"),
        ("two", "2"),
        (2, "2"),
        ("a polyp", "polyp"),
        ("Esophagitis", "oesophagitis"),
        ("instrumnets", "instruments"),
        ("centre-left", "center-left"),
        ("z line", "Z-line"),
        ("Barrett's", "barretts"),
        ("**none**", "none"),
    ],
)
def test_spelling_does_not_count(noisy, clean):
    assert metrics.normalise(noisy) == metrics.normalise(clean)
    assert metrics.exact_match(noisy, clean)
    assert metrics.set_f1(noisy, clean) == 1.0


@pytest.mark.parametrize(
    ("one", "other"),
    [("yes", "no"), ("5-10mm", ">20mm"), ("<5mm", ">5mm"), ("1", "16"), ("paris ip", "paris is"), ("red; pink", "red")],
)
def test_different_answers_stay_different(one, other):
    assert not metrics.exact_match(one, other)


@pytest.mark.parametrize("empty", ["", "  ", "...", ";;", "\n"])
def test_an_empty_answer_is_never_right(empty):
    assert not metrics.exact_match(empty, "yes")
    assert not metrics.exact_match(empty, empty)
    assert metrics.set_f1(empty, "yes") == 0.0


WORDS = ("polyp", "a Tube", "Z line", ">20", "two", "lower-rigth", "5 - 10 mm")


@patient
@given(st.permutations(WORDS), st.integers(1, len(WORDS)), st.sampled_from([str.upper, str.title, str.lower]))
def test_order_case_and_repetition_do_not_count(words, count, case):
    chosen = words[:count]
    noisy = [case(word) for word in reversed(chosen)] + chosen
    once = metrics.normalise(" ; ".join(noisy))
    assert once == metrics.normalise(";".join(chosen))
    assert once.count(";") == count - 1
    assert metrics.normalise(once) == once


def test_set_f1_by_hand():
    assert metrics.set_f1("polyp; tube", "polyp") == pytest.approx(2 / 3)
    assert metrics.set_f1("polyp", "polyp; tube; text") == pytest.approx(2 * 1 / (1 + 3))
    assert metrics.set_f1("clip", "polyp") == 0.0


ITEM_SETS = st.lists(st.sets(st.sampled_from("abcde"), min_size=1), min_size=1, max_size=12)


@patient
@given(ITEM_SETS, ITEM_SETS)
def test_set_f1_is_scikit_learns_samples_average(references, predictions):
    n = min(len(references), len(predictions))
    coder = MultiLabelBinarizer(classes=list("vwxyz")).fit([])
    letters = dict(zip("abcde", "vwxyz"))
    references = [{letters[x] for x in s} for s in references[:n]]
    predictions = [{letters[x] for x in s} for s in predictions[:n]]
    ours = np.mean([metrics.set_f1(";".join(p), ";".join(r)) for p, r in zip(predictions, references)])
    theirs = f1_score(coder.transform(references), coder.transform(predictions), average="samples", zero_division=0)
    assert ours == pytest.approx(theirs)


# ----------------------------------------------------------------------------------------------------- macro F1


def test_macro_f1_by_hand():
    """Template q: no 3 of 4 rows, 'always no' has F1(no) = 2*3/(4+3) and F1(yes) = 0; template r is perfect."""
    templates = ["q"] * 4 + ["r"]
    references = ["no", "no", "no", "yes", "1"]
    predictions = ["no"] * 4 + ["one"]
    assert metrics.macro_f1(templates, references, predictions) == pytest.approx(((6 / 7 + 0) / 2 + 1) / 2)


def test_an_answer_outside_the_template_costs_recall_only():
    assert metrics.macro_f1(["q", "q"], ["no", "yes"], ["no", "banana"]) == pytest.approx((1 + 0) / 2)


@patient
@given(
    st.lists(
        st.tuples(st.sampled_from("qr"), st.sampled_from(["no", "yes", "2"]), st.sampled_from(["no", "yes", "2", "x"])),
        min_size=1,
        max_size=40,
    )
)
def test_macro_f1_is_scikit_learns(rows):
    templates, references, predictions = zip(*rows)
    per_template = []
    for template in dict.fromkeys(templates):
        pairs = [(r, p) for t, r, p in rows if t == template]
        labels = sorted({r for r, _ in pairs})
        per_template.append(
            f1_score(*zip(*pairs), labels=labels, average="macro", zero_division=0),
        )
    assert metrics.macro_f1(templates, references, predictions) == pytest.approx(np.mean(per_template))


def test_macro_f1_of_sets_is_scikit_learns_on_indicators():
    rng = random.Random(3)
    draw = [["v", "w", "x", "y"][: rng.randint(1, 4)] for _ in range(30)]
    guess = [rng.sample(["v", "w", "x", "y"], rng.randint(1, 4)) for _ in range(30)]
    coder = MultiLabelBinarizer().fit(draw)
    theirs = f1_score(coder.transform(draw), coder.transform(guess), average="macro")
    ours = metrics.macro_f1(["q"] * 30, [";".join(s) for s in draw], [";".join(s) for s in guess])
    assert ours == pytest.approx(theirs)


# ---------------------------------------------------------------------------------------------------- intervals


def test_interval_of_one_question_a_picture_is_the_binomial_one():
    scores = [1.0] * 60 + [0.0] * 40
    got = metrics.clustered_mean(scores, range(100), resamples=4000)
    half = 1.96 * math.sqrt(0.6 * 0.4 / 100)
    assert got.value == pytest.approx(0.6)
    assert (got.low, got.high) == pytest.approx((0.6 - half, 0.6 + half), abs=0.02)
    assert (got.n, got.clusters) == (100, 100)


def test_clustering_widens_the_interval():
    """Ten equal answers on each of 20 pictures carry the information of 20 answers, not of 200."""
    scores = [float(i % 2) for i in range(20) for _ in range(10)]
    pictures = [i for i in range(20) for _ in range(10)]
    clustered = metrics.clustered_mean(scores, pictures)
    naive = metrics.clustered_mean(scores, range(200))
    ratio = (clustered.high - clustered.low) / (naive.high - naive.low)
    assert ratio == pytest.approx(math.sqrt(10), rel=0.2)


def test_interval_matches_the_analytic_clustered_error():
    """The bootstrap against the clustered standard error that lmms-eval prints beside it (arXiv 2411.00640)."""
    rng = np.random.default_rng(0)
    pictures = np.repeat(np.arange(200), 9)
    scores = (rng.random(1800) < np.repeat(rng.beta(2, 1, 200), 9)).astype(float)
    deviations = np.bincount(pictures, weights=scores - scores.mean())
    error = math.sqrt((deviations**2).sum()) / len(scores)
    got = metrics.clustered_mean(scores.tolist(), pictures.tolist(), resamples=4000)
    assert (got.high - got.low) / 2 == pytest.approx(1.96 * error, rel=0.06)


def test_intervals_are_reproducible_and_seeded():
    rng = random.Random(0)
    scores, pictures = [rng.random() for _ in range(50)], [i // 5 for i in range(50)]
    assert metrics.clustered_mean(scores, pictures) == metrics.clustered_mean(scores, pictures)
    assert metrics.clustered_mean(scores, pictures) != metrics.clustered_mean(scores, pictures, seed=1)


def test_the_order_of_the_rows_changes_no_bit():
    """Two processes hand over even and odd rows; their scores must be those of one process."""
    rng = random.Random(1)
    rows = [
        (rng.choice("qr"), rng.choice(["no", "yes", "2"]), rng.choice(["no", "yes", "2"]), i // 4) for i in range(80)
    ]
    scores = {(t, r, p, c): rng.random() for t, r, p, c in rows}
    swapped = rows[::2] + rows[1::2]

    def both(rows):
        templates, references, predictions, pictures = zip(*rows)
        return (
            metrics.clustered_macro_f1(templates, references, predictions, pictures),
            metrics.clustered_mean([float(r == p) for _, r, p, _ in rows], pictures),
            metrics.clustered_mean([scores[row] for row in rows], pictures).value,
        )

    assert both(rows) == both(swapped)


def test_one_picture_gives_no_interval():
    got = metrics.clustered_mean([1.0, 0.0], ["p", "p"])
    assert got.value == 0.5
    assert math.isnan(got.low)
    assert math.isnan(got.high)
    assert math.isnan(metrics.clustered_mean([], []).value)
    assert math.isnan(metrics.clustered_macro_f1([], [], [], []).value)


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="2 scores but 1 cluster"):
        metrics.clustered_mean([1.0, 0.0], ["p"])


def test_macro_f1_interval_resamples_pictures():
    """Against the definition: draw pictures, score the rows of the drawn ones."""
    rng = random.Random(5)
    n = 60
    templates = [rng.choice("qr") for _ in range(n)]
    references = [rng.choice(["no", "yes", "2"]) for _ in range(n)]
    predictions = [r if rng.random() < 0.6 else rng.choice(["no", "yes", "2"]) for r in references]
    pictures = [i // 3 for i in range(n)]
    names = [f"picture {picture:02d}" for picture in pictures]
    got = metrics.clustered_macro_f1(templates, references, predictions, names, resamples=300)
    draws = np.random.default_rng(0).multinomial(20, np.full(20, 1 / 20), size=300)
    values = []
    for draw in draws:
        rows = [i for i in range(n) for _ in range(draw[pictures[i]])]
        values.append(metrics.macro_f1(*([column[i] for i in rows] for column in (templates, references, predictions))))
    assert (got.low, got.high) == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])))
    assert got.value == pytest.approx(metrics.macro_f1(templates, references, predictions))


# ------------------------------------------------------------------------------------------ image-blind baselines


def test_majority_by_hand():
    blind = metrics.BlindMajority(
        [("Is there text?", "no"), ("Is there text?", "No."), ("Is there  TEXT?", "yes"), ("How many?", 3)]
    )
    assert blind.answer("is there text?") == "no"
    assert blind.answer("How many?") == "3"
    assert blind.answer("Never asked?") == "no"


def test_majority_breaks_ties_alphabetically_whatever_the_order():
    rows = [("q", "b"), ("q", "a")]
    assert metrics.BlindMajority(rows).answer("q") == metrics.BlindMajority(rows[::-1]).answer("q") == "a"


def test_majority_without_labels_answers_nothing():
    assert metrics.BlindMajority([]).answer("q") == ""


def test_option_prior_finds_none_of_the_above_and_ignores_letters():
    labels = [("Which foul?", {"A": "Trip", "B": "None of the above"}, "B")] * 5
    labels += [("Which foul?", {"A": "Push", "B": "None of the above"}, "A")] * 2
    blind = metrics.BlindOptions(labels)
    options = {"A": "Hold", "B": "Trip", "C": "None of the above"}
    assert blind.answer("Which foul?", options) == "C"
    assert blind.answer("Which foul?", {"A": "None of the above", "B": "Hold", "C": "Trip"}) == "A"
    assert blind.answer("Another question?", options) == "C"


def test_option_prior_never_depends_on_the_letters():
    rng = random.Random(0)
    names = ["Trip", "Push", "Hold", "None of the above"]
    labels = []
    for _ in range(30):
        rng.shuffle(names)
        labels.append(("Which foul?", dict(zip("ABCD", names)), rng.choice("ABCD")))
    blind = metrics.BlindOptions(labels)
    chosen = set()
    for _ in range(10):
        rng.shuffle(names)
        options = dict(zip("ABCD", names))
        chosen.add(options[blind.answer("Which foul?", options)])
    assert len(chosen) == 1


# -------------------------------------------------------------------------------------------------- choice letters

OPTIONS = {"A": "Trip", "B": "Holding", "C": "None of the above"}


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(B)", "B"),
        ("B.", "B"),
        ("**B**", "B"),
        ("B) Holding", "B"),
        ("B: Holding, because", "B"),
        ("B Holding", "B"),
        ("The answer is B", "B"),
        ("Answer: (c)", "C"),
        ("holding.", "B"),
        ("none of the above", "C"),
        ("D", None),
        ("", None),
        ("A trip or a hold", None),
        ("answer is A, or answer is B", None),
        ("no idea", None),
    ],
)
def test_choice_letter(text, letter):
    assert metrics.choice_letter(text, OPTIONS) == letter


# -------------------------------------------------------------------------------------------------------- families


@pytest.mark.parametrize(
    ("question", "family"),
    [
        ("Have all polyps been removed?", "yesno"),
        ("Is there a green/black box artefact?", "yesno"),
        ("Does this image contain any finding?", "yesno"),
        ("How many instrumnets are in the image?", "count"),
        ("What type of procedure is the image taken from?", "choice"),
        ("What is the size of the polyp?", "choice"),
        ("Are there any instruments in the image? Check all that are present.", "multilabel"),
        ("What color is the abnormality? If more than one separate with ;", "color"),
        ("Where in the image is the anatomical landmark?", "location"),
    ],
)
def test_family(question, family):
    assert metrics.family(question) == family
    assert family in metrics.FAMILIES


def test_blind_text_gives_the_most_typical_labelled_answer():
    """Of three answers to one question the two that share most words agree best; other kinds fall back in order."""
    labels = [
        ("What is seen?", "1 text", "a red polyp"),
        ("What is seen?", "1 text", "a red polyp is seen"),
        ("What is seen?", "1 text", "nothing"),
        ("And here?", "2 size", "small"),
    ]
    blind = metrics.BlindText(labels)
    assert blind.answer("what is seen?", "anything") == "a red polyp"
    assert blind.answer("New?", "2 size") == "small"
    assert blind.answer("New?", "3 new") == "a red polyp"
    assert metrics.BlindText([("q", "k", a) for a in ("b", "a", "b")]).answer("q", "k") == "b", "repeats: the majority"
    assert metrics.BlindText([]).answer("q", "k") is None
