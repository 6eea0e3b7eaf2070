"""What a predictor reaches that never sees the picture: the bar that every accuracy in these worlds stands beside.

Covers the oracle majority, which knows the answers of the very pictures it is scored on: per question the most
frequent answer; for multiple choice the better of the most frequent letter per question and the most frequent answer
text among the options offered.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

from leaml_plugin.worlds.scenes import NONE_OF_THE_ABOVE, Scene, render


def blind_majority(world: str, *, pictures: int = 1000, seed: int = 0, start: int = 0) -> dict[str, Any]:
    """The oracle image-blind majority of a world: ``{"overall", "templates": {...}, "questions"}``."""
    return blind_scores([render(world, start + i, seed) for i in range(pictures)])


def blind_scores(scenes: list[Scene]) -> dict[str, Any]:
    """As :func:`blind_majority`, for scenes at hand."""
    qas = [qa for scene in scenes for qa in scene.qas]
    answers: dict[str, Counter] = defaultdict(Counter)
    texts: dict[str, Counter] = defaultdict(Counter)
    for qa in qas:
        answers[qa.question + "/".join(qa.options)][qa.answer] += 1
        texts[qa.template][qa.reply] += 1
    right: dict[str, list[tuple[bool, bool]]] = defaultdict(list)
    for qa in qas:
        by_letter = answers[qa.question + "/".join(qa.options)].most_common(1)[0][0]
        by_text = by_letter
        if qa.options:
            by_text = max(qa.options, key=lambda k: (texts[qa.template][qa.options[k]], k))
        right[qa.template].append((by_letter == qa.answer, by_text == qa.answer))
    best = {t: max(sum(a for a, _ in v), sum(b for _, b in v)) for t, v in sorted(right.items())}
    return {
        "overall": sum(best.values()) / max(len(qas), 1),
        "templates": {t: n / len(right[t]) for t, n in best.items()},
        "questions": len(qas),
    }


def none_share(scenes: list[Scene]) -> float:
    """How often 'None of the above' is right among the four-option questions."""
    four = [qa for s in scenes for qa in s.qas if len(qa.options) == 4]
    return sum(qa.reply == NONE_OF_THE_ABOVE for qa in four) / max(len(four), 1)
