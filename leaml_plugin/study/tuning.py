"""Learning rates: every trained method on the garden world, over the same grid, with the same seeds.

Covers the jobs of a tuning and its outcome from result files. No result of the garden world is ever reported.
Does not cover anything that is not a learning rate; the rest of the protocol is one for all methods.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from leaml_plugin.study.protocol import GRID, METHODS, TUNING, Protocol, budget_of, learning_rate, tuned, vqa_rate
from leaml_plugin.study.runner import Job


def jobs(methods: Sequence[str], labels: float, seeds: Sequence[int], protocol: Protocol) -> list[Job]:
    """The grid for every method. With pseudo-QA generator and VQA model have it, the other at its tuned rate."""
    out = []
    for method in filter(tuned, methods):
        budget, pseudo = budget_of(method, labels), METHODS[method].kind == "pseudo"
        other = vqa_rate(protocol, method) if pseudo else None
        for seed in seeds:
            out += [Job(TUNING, method, budget, seed, rate, other) for rate in GRID]
            if pseudo:
                own = learning_rate(method)
                out += [Job(TUNING, method, budget, seed, own, rate) for rate in GRID if rate != other]
    return out


def rate_of(result: Mapping[str, Any]) -> float:
    """The learning rate that was tuned in a run: the generator's where it has one."""
    stages = result["config"]["stages"]
    name = next(name for name in ("generator", "joint", "finetune") if name in stages)
    return stages[name]["train"]["lr"]


VQA = "'s VQA model"


def outcome(results: Sequence[Mapping[str, Any]], protocol: Protocol) -> dict[str, dict[float, float]]:
    """Method, or method and :data:`VQA` -> learning rate -> mean accuracy over seeds."""
    groups: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for r in results:
        method, rate, score = r["method"], rate_of(r), r["accuracy"]
        if METHODS[method].kind != "pseudo":
            groups[method][rate].append(score)
            continue
        other = r["config"]["stages"]["finetune"]["train"]["lr"]
        if other == vqa_rate(protocol, method):
            groups[method][rate].append(score)
        if rate == learning_rate(method):
            groups[method + VQA][other].append(score)
    return {
        name: {rate: sum(values) / len(values) for rate, values in sorted(rates.items())}
        for name, rates in groups.items()
    }


def best(found: Mapping[str, Mapping[float, float]]) -> dict[str, float]:
    """The best rate of each method; of equal ones the smaller."""
    return {method: max(rates, key=lambda rate: (rates[rate], -rate)) for method, rates in found.items()}
