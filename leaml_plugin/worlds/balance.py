"""Flat answers: which questions of a picture are asked, so that no template has a guessable answer.

Covers the table of keeping rates per world, template and answer (``balance.json``, made by
``scripts/balance_worlds.py`` from 4,000 pictures that no split uses) and its application.
"""

from __future__ import annotations

import json
from collections import Counter
from functools import lru_cache
from pathlib import Path

from leaml_plugin.worlds.rng import Rng
from leaml_plugin.worlds.scenes import WorldQA

TABLE = Path(__file__).with_name("balance.json")


@lru_cache(maxsize=1)
def _rates() -> dict[str, dict[str, dict[str, int]]]:
    return json.loads(TABLE.read_text()) if TABLE.exists() else {}


def choose(rng: Rng, world: str, qas: list[WorldQA], count: int) -> list[WorldQA]:
    """Up to ``count`` of the questions, each kept at its answer's rate (percent), in random order.

    An answer that the table does not know is rare, and kept. Without a table every question is kept.
    """
    table = _rates().get(world)
    if table is None:
        return qas
    kept = [qa for qa in qas if rng.below(1000) < table.get(qa.template, {}).get(qa.reply, 1000)]
    return rng.shuffled(kept)[:count]


def rates(answers: Counter[str]) -> dict[str, int]:
    """Keeping rates per mille that bring the frequent answers of one template down to the level of the others."""
    ordered = sorted(answers.values(), reverse=True)
    if len(ordered) == 1:
        return {}
    level = max(ordered[-1], ordered[min(len(ordered) - 1, 2)] * 6 // 10 if len(ordered) > 3 else ordered[1] // 2)
    return {answer: 1000 * level // n for answer, n in sorted(answers.items()) if n > level}
