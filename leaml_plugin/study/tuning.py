"""Learning rates: every trained method on the garden world, over the same grid, with the same seeds.

Covers the jobs of a tuning and its outcome from result files. No result of the garden world is ever reported.
Does not cover anything that is not a learning rate; the rest of the protocol is one for all methods.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from leaml_plugin.study.protocol import GRID, METHODS, TUNING, budget_of, tuned
from leaml_plugin.study.runner import Job


def first_jobs(methods: Sequence[str], labels: float, seeds: Sequence[int]) -> list[Job]:
    """The grid for every method whose VQA model is trained at one rate."""
    return [
        Job(TUNING, method, budget_of(method, labels), seed, rate)
        for method in methods
        if tuned(method) and METHODS[method].kind != "pseudo"
        for seed in seeds
        for rate in GRID
    ]


def second_jobs(methods: Sequence[str], labels: float, seeds: Sequence[int], finetune_rate: float) -> list[Job]:
    """The grid for the generators. Their VQA models are trained at ``finetune_rate``, the best of
    the method that trains the same on labels alone."""
    return [
        Job(TUNING, method, labels, seed, rate, finetune_rate)
        for method in methods
        if tuned(method) and METHODS[method].kind == "pseudo"
        for seed in seeds
        for rate in GRID
    ]


def rate_of(result: Mapping[str, Any]) -> float:
    """The learning rate that was tuned in a run: the generator's where it has one."""
    stages = result["config"]["stages"]
    name = next(name for name in ("generator", "joint", "finetune") if name in stages)
    return stages[name]["train"]["lr"]


def outcome(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[float, float]]:
    """Method -> learning rate -> mean accuracy over seeds."""
    groups: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for r in results:
        groups[r["method"]][rate_of(r)].append(r["accuracy"])
    return {
        method: {rate: sum(values) / len(values) for rate, values in sorted(rates.items())}
        for method, rates in groups.items()
    }


def best(found: Mapping[str, Mapping[float, float]]) -> dict[str, float]:
    """The best rate of each method; of equal ones the smaller."""
    return {method: max(rates, key=lambda rate: (rates[rate], -rate)) for method, rates in found.items()}
