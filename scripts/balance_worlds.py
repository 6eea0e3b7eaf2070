"""Make leaml_plugin/worlds/balance.json: how often each answer's question is kept. Run after changing a world."""

from __future__ import annotations

import json
from collections import Counter, defaultdict

from leaml_plugin.progress import track
from leaml_plugin.worlds import balance
from leaml_plugin.worlds.scenes import render

balance.choose.__globals__["_rates"] = lambda: {}  # count what the worlds offer before anything is thinned

table = {}
for world in ("endoscopy", "sports", "garden"):
    answers: dict[str, Counter] = defaultdict(Counter)
    for index in track(range(4000), world):
        for qa in render(world, index, seed=31337).qas:
            answers[qa.template][qa.reply] += 1
    table[world] = {template: balance.rates(count) for template, count in sorted(answers.items())}
balance.TABLE.write_text(json.dumps(table, indent=1) + "\n")
