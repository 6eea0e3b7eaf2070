"""Scores for free text: BLEU, ROUGE and METEOR as the Kvasir-VQA-x1 challenge computes them, over their libraries.

Covers: corpus BLEU (sacrebleu, 13a tokens, no smoothing, 0 to 1), ROUGE-1, -2 and -L (rouge_score, no stemming, mean
F-measure), METEOR (nltk). The challenge calls the same computations through ``evaluate``.
Does not cover: scores by a judge model.

METEOR matches synonyms in WordNet, which nltk downloads separately (``python -m nltk.downloader wordnet``). Without
it ``meteor`` is no number to compare, so it is ``None``; ``meteor_stem`` (words and stems only) is always there.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

from leaml_plugin.errors import LeamlError


def bleu(predictions: Sequence[str], references: Sequence[str]) -> float:
    sacrebleu = _library("sacrebleu")
    return sacrebleu.corpus_bleu(list(predictions), [list(references)], smooth_method="none").score / 100


def rouge(predictions: Sequence[str], references: Sequence[str], kind: str) -> float:
    """``kind`` is rouge1, rouge2 or rougeL."""
    scorer = _library("rouge_score.rouge_scorer").RougeScorer([kind], use_stemmer=False)
    scores = [
        scorer.score(reference, prediction)[kind].fmeasure for prediction, reference in zip(predictions, references)
    ]
    return math.fsum(scores) / len(scores)


def meteor(predictions: Sequence[str], references: Sequence[str], *, synonyms: bool) -> float | None:
    """Mean METEOR (alpha 0.9, beta 3, gamma 0.5); ``None`` where ``synonyms`` is asked for and WordNet is not there."""
    module = _library("nltk.translate.meteor_score")
    wordnet = _wordnet() if synonyms else _NoSynonyms()
    if wordnet is None:
        return None
    split = _library("nltk.tokenize").NLTKWordTokenizer().tokenize
    scores = [
        module.single_meteor_score(split(reference), split(prediction), wordnet=wordnet)
        for prediction, reference in zip(predictions, references)
    ]
    return math.fsum(scores) / len(scores)


class _NoSynonyms:
    """Stands in for WordNet in nltk's METEOR and knows no word."""

    def synsets(self, word: str) -> list[Any]:
        return []


@functools.lru_cache(maxsize=1)
def _wordnet() -> Any:
    wordnet = _library("nltk.corpus").wordnet
    try:
        wordnet.ensure_loaded()
    except LookupError:
        return None
    return wordnet


def _library(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = {"rouge_score": "rouge-score"}.get(name.split(".")[0], name.split(".")[0])
        raise LeamlError(f"the free-text tasks need {package}; pip install {package}.") from error
