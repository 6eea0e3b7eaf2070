"""What a row contributes and what becomes of all rows, by hand; free text against the libraries' own corpus scores."""

from __future__ import annotations

import random

import numpy as np
import pytest

from leaml_plugin import metrics
from leaml_plugin.lmms import scoring, text

# picture, question, answer, blind answer, prediction
ROWS = [
    ("p1", "Is there text?", "no", "no", "No."),
    ("p1", "How many polyps are in the image?", "2", "0", "two"),
    ("p2", "Is there text?", "yes", "no", "no"),
    ("p2", "Where in the image is the abnormality?", "lower-rigth; center", "none", "center"),
]


@pytest.fixture
def values():
    out = []
    for picture, question, answer, blind, prediction in ROWS:
        doc = {"answer": answer, "family": metrics.family(question)}
        template = metrics.normalise_question(question)
        out.append(scoring.short_answer(prediction, doc, cluster=picture, template=template, blind=blind))
    return out


def column(values, name):
    return [value[name] for value in values]


def test_every_row_has_every_metric_of_the_task_file(values):
    import yaml

    from leaml_plugin.lmms import entry

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: node.value)
    with open(f"{entry.tasks_directory()}/endoscopy/_default_template_yaml") as file:
        names = [metric["metric"] for metric in yaml.load(file, Loader)["metric_list"]]
    assert all(set(value) == set(names) for value in values)


def test_means_by_hand(values):
    assert scoring.mean(column(values, "exact_match")) == 2 / 4
    assert scoring.mean(column(values, "blind_majority")) == 1 / 4
    assert scoring.mean(column(values, "above_blind")) == 1 / 4
    assert scoring.mean(column(values, "set_f1")) == pytest.approx((1 + 1 + 0 + 2 / 3) / 4)
    assert scoring.mean(column(values, "family_yesno")) == 1 / 2
    assert scoring.mean(column(values, "family_count")) == 1
    assert scoring.mean(column(values, "family_color")) is None


def test_macro_f1_by_hand(values):
    """text: F1(no) = 2/3, F1(yes) = 0; polyps: 1; abnormality: F1(center) = 1, F1(lower-right) = 0."""
    assert scoring.macro(column(values, "macro_f1")) == pytest.approx((1 / 3 + 1 + 1 / 2) / 3)


def test_intervals_are_those_of_the_metrics(values):
    got = scoring.interval(column(values, "interval_exact"))
    wanted = metrics.clustered_mean([1, 1, 0, 0], ["p1", "p1", "p2", "p2"])
    assert got == [round(wanted.low, 4), round(wanted.high, 4)] == [0.0, 1.0]
    assert scoring.interval(column(values[:2], "interval_exact")) is None, "one picture has no spread"
    assert len(scoring.macro_interval(column(values, "interval_macro"))) == 2


OPTIONS = {"A": "Trip", "B": "Push", "C": "None of the above"}


def choice(prediction, answer="B", blind="C", level="hard", sport="soccer"):
    doc = {"answer": answer, "blind": blind, "level": level, "sport": sport}
    return scoring.choice(
        prediction, doc, options=OPTIONS, cluster="s", levels=("easy", "hard"), sports=("soccer", "tennis")
    )


def test_choice_by_hand():
    values = [choice("B. Push"), choice("C"), choice("I do not know", answer="C", level="easy")]
    assert scoring.mean(column(values, "exact_match")) == pytest.approx(1 / 3)
    assert scoring.mean(column(values, "blind_options")) == pytest.approx(1 / 3)
    assert scoring.mean(column(values, "above_blind")) == pytest.approx(0)
    assert scoring.mean(column(values, "chance")) == pytest.approx(1 / 3)
    assert scoring.mean(column(values, "no_letter")) == pytest.approx(1 / 3)
    assert scoring.mean(column(values, "level_hard")) == 1 / 2
    assert scoring.mean(column(values, "level_easy")) == 0
    assert scoring.mean(column(values, "sport_tennis")) is None


def test_always_the_same_letter_shows():
    assert scoring.top_share(["D", "D", "D", "A"]) == 3 / 4
    assert scoring.top_share([]) is None


@pytest.mark.parametrize(
    ("text", "letters"),
    [
        ("A, C", "AC"),
        ("AC", "AC"),
        ("A and C", "AC"),
        ("Answer: (B)", "B"),
        ("B", "B"),
        ("The answers are A, C and D.", "ACD"),
        ("none", ""),
        ("", ""),
    ],
)
def test_letters_are_read_from_text(text, letters):
    assert scoring._letters(text) == set(letters)


def test_letters_score_by_hand():
    assert scoring.letters("A, C", "C, A", cluster="q")["exact_match"]["score"] == 1
    got = scoring.letters("A", "A, C", cluster="q")
    assert got["exact_match"]["score"] == 0
    assert got["set_f1"]["score"] == pytest.approx(2 / 3)


# ---------------------------------------------------------------------------------------------------- free text

PREDICTIONS = ["the player in white pushes the player in blue", "evidence of a polyp", "no text is visible at all"]
REFERENCES = [
    "player in white jersey pushes player in blue",
    "evidence of a small polyp is visible",
    "no text is visible",
]


def test_bleu_is_the_classic_definition():
    """Against nltk's implementation on the same tokens (none of the texts has anything 13a would split)."""
    from nltk.translate.bleu_score import corpus_bleu

    wanted = corpus_bleu([[r.split()] for r in REFERENCES], [p.split() for p in PREDICTIONS])
    assert text.bleu(PREDICTIONS, REFERENCES) == pytest.approx(wanted)


def test_bleu_of_a_perfect_and_of_a_foreign_answer():
    assert text.bleu(REFERENCES, REFERENCES) == pytest.approx(1)
    assert text.bleu(["nothing alike here either"] * 3, REFERENCES) == 0


def test_rouge_by_hand():
    """'a b c' against 'a c d': unigrams 2 of 3 both ways; no bigram; longest common subsequence 'a c'."""
    assert text.rouge(["a b c"], ["a c d"], "rouge1") == pytest.approx(2 / 3)
    assert text.rouge(["a b c"], ["a c d"], "rouge2") == 0
    assert text.rouge(["a b c"], ["a c d"], "rougeL") == pytest.approx(2 / 3)


def test_meteor_by_hand():
    """Three of four words match in one chunk: P = 3/3, R = 3/4, F = PR / (0.9 P + 0.1 R), penalty 0.5 (1/3)^3."""
    mean = (1 * 0.75) / (0.9 * 1 + 0.1 * 0.75)
    wanted = mean * (1 - 0.5 * (1 / 3) ** 3)
    assert text.meteor(["the red polyp"], ["the red polyp bleeds"], synonyms=False) == pytest.approx(wanted)


def test_rouge_is_what_other_libraries_count():
    """n-grams counted by scikit-learn, the longest common subsequence of pycocoevalcap; on texts with repetitions."""
    lcs = pytest.importorskip("pycocoevalcap.rouge.rouge", reason="pycocoevalcap comes with lmms-eval").my_lcs
    from sklearn.feature_extraction.text import CountVectorizer

    rng = random.Random(0)
    words = ["red", "polyp", "left", "of", "the", "2"]
    texts = [" ".join(rng.choices(words, k=rng.randint(2, 12))) for _ in range(60)]
    for prediction, reference in zip(texts[::2], texts[1::2]):
        for kind, n in (("rouge1", 1), ("rouge2", 2)):
            counter = CountVectorizer(ngram_range=(n, n), token_pattern=r"\S+")
            found, wanted = counter.fit_transform([prediction, reference]).toarray()
            f1 = 2 * np.minimum(found, wanted).sum() / (found.sum() + wanted.sum())
            assert text.rouge([prediction], [reference], kind) == pytest.approx(f1)
        found, wanted = prediction.split(), reference.split()
        f1 = 2 * lcs(found, wanted) / (len(found) + len(wanted))
        assert text.rouge([prediction], [reference], "rougeL") == pytest.approx(f1)


def test_meteor_is_that_of_its_authors():
    """Segment scores of meteor-1.5.jar (Denkowski and Lavie; in pycocoevalcap), OpenJDK 17, 2026-11-23, set to nltk's
    definition: ``java -jar meteor-1.5.jar predictions references -l en -m "exact stem" -w "1.0 1.0" -p "0.9 3.0 0.5
    0.5"`` (alpha, beta, gamma as in nltk, every match and every word of weight one)."""
    predictions = [*PREDICTIONS, "in the lower left there are two red polyps"]
    references = [*REFERENCES, "two red polyps are seen in the lower left"]
    theirs = [0.8301839254220206, 0.5597014925373134, 0.9449404761904762, 0.8654513888888887]
    ours = [text.meteor([p], [r], synonyms=False) for p, r in zip(predictions, references)]
    assert ours == pytest.approx(theirs, rel=1e-12)
    assert text.meteor(predictions, references, synonyms=False) == pytest.approx(sum(theirs) / 4, rel=1e-12)


def test_meteor_matches_stems():
    assert text.meteor(["pushed players"], ["push player"], synonyms=False) > 0.9


def test_meteor_with_synonyms_is_no_number_without_wordnet(monkeypatch):
    monkeypatch.setattr(text, "_wordnet", lambda: None)
    assert text.meteor(["a"], ["a"], synonyms=True) is None


def test_meteor_with_synonyms_uses_wordnet(monkeypatch):
    """A stand-in dictionary that knows one synonym."""

    class Lemma:
        def name(self):
            return "lesion"

    class Synset:
        def lemmas(self):
            return [Lemma()]

    class Dictionary:
        def synsets(self, word):
            return [Synset()] if word == "wound" else []

    monkeypatch.setattr(text, "_wordnet", lambda: Dictionary())
    with_synonym = text.meteor(["a small wound"], ["a small lesion"], synonyms=True)
    assert with_synonym > text.meteor(["a small wound"], ["a small lesion"], synonyms=False)


def test_aggregations_of_free_text_use_all_rows():
    rows = [scoring.free_text(p, r, cluster="c") for p, r in zip(PREDICTIONS, REFERENCES)]
    assert scoring.bleu(column(rows, "bleu")) == text.bleu(PREDICTIONS, REFERENCES)
    for name, aggregate in (("rouge1", scoring.rouge1), ("rouge2", scoring.rouge2), ("rougeL", scoring.rouge_l)):
        assert aggregate(column(rows, name)) == text.rouge(PREDICTIONS, REFERENCES, name)
    assert scoring.meteor_stem(column(rows, "meteor_stem")) == text.meteor(PREDICTIONS, REFERENCES, synonyms=False)
