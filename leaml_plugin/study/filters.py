"""What each filter removes and what it saves, against the truth that the embedded worlds know.

One run's generated pairs, with every second answer, are taken once; every filter is applied to them alone, and all of
them one after the other. With ``accuracy`` the VQA model learns from what each filter alone leaves. Covers running,
result files, and the tables. Does not cover choosing thresholds: those are the filters' defaults and two values that
were fixed beforehand.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from leaml_plugin.artifacts import fingerprint, read_json, write_json
from leaml_plugin.records import QA, PseudoQA
from leaml_plugin.report.markdown import markdown_table
from leaml_plugin.stages import filter, verify
from leaml_plugin.stages.filter import FilterConfig
from leaml_plugin.study.runner import FORMAT, Study, Written, code_version, identity, recorded, resolve
from leaml_plugin.study.statistics import pack_bits, t_interval

#: Drops malformed pairs alone: what no filter can leave in.
OFF = FilterConfig(
    length_slack=1e9, unanswerable=False, round_trip=False, agreement=0.0, duplicate=False, near_duplicate=2.0
)
#: Reason -> the setting that turns this filter on, in the order in which they apply.
FILTERS: Mapping[str, Mapping[str, Any]] = {
    "too_long": {"length_slack": FilterConfig.length_slack},
    "unanswerable": {"unanswerable": True},
    "unknown_question": {"known_questions": True},
    "round_trip": {"round_trip": True},
    "blind": {"blind": True},
    "contradicts_caption": {"caption": True},
    "inconsistent": {"agreement": FilterConfig.agreement},
    "duplicate": {"duplicate": True},
    "near_duplicate": {"near_duplicate": FilterConfig.near_duplicate},
    "overrepresented": {"answer_share": 0.5},
    "unlikely": {"keep_share": 0.5},
}
#: Measured alone only. Not part of what names a result: added later, so that older results go on counting.
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "overrepresented, by family": {"answer_share": 0.5, "balance": "family"},
}
NONE, DEFAULT = "none", "default"
DEFAULTS = FilterConfig()

Result = Mapping[str, Any]


def measure(
    pairs: Sequence[PseudoQA], labels: Sequence[QA], right: Callable[[PseudoQA], bool | None]
) -> dict[str, list[dict[str, Any]]]:
    """Counts before and after each filter, ``alone`` on the well-formed pairs and in ``sequence``.

    Args:
        right: whether a pair's answer is right; ``None`` where that cannot be told.
    """
    truth = {pair.id: right(pair) for pair in pairs}

    def counts(some: Iterable[PseudoQA]) -> dict[str, int]:
        marks = [truth[pair.id] for pair in some]
        return {"pairs": len(marks), "checked": len(marks) - marks.count(None), "right": marks.count(True)}

    def row(name: str, before: Sequence[PseudoQA], config: FilterConfig) -> tuple[dict[str, Any], list[PseudoQA]]:
        kept, _ = filter.apply(config, pairs, labels)
        return {"filter": name, "before": counts(before), "after": counts(kept), "kept": _name(kept)}, kept

    first, formed = row(NONE, pairs, OFF)
    settings = {**FILTERS, **VARIANTS}.items()
    alone = [first] + [row(name, formed, dataclasses.replace(OFF, **setting))[0] for name, setting in settings]
    alone.append(row(DEFAULT, formed, DEFAULTS)[0])
    sequence, config, left = [first], OFF, formed
    for name, setting in FILTERS.items():
        config = dataclasses.replace(config, **setting)
        entry, left = row(name, left, config)
        sequence.append(entry)
    return {"alone": alone, "sequence": sequence}


def kept_by(name: str, written: Written) -> list[PseudoQA]:
    """The pairs that one filter alone leaves."""
    config = {NONE: OFF, DEFAULT: DEFAULTS}.get(name) or dataclasses.replace(OFF, **{**FILTERS, **VARIANTS}[name])
    return filter.apply(config, written.pairs, written.budget.qas)[0]


def _name(kept: Sequence[PseudoQA]) -> str:
    """Equal sets of pairs teach the same: their name."""
    return fingerprint([pair.id for pair in kept])[:10]


# -- running ---------------------------------------------------------------------------------------------------------


def names(study: Study, world: str, labels: float, seed: int) -> dict[str, Any]:
    """What names the measurement of one budget and seed."""
    settings: dict[str, Any] = {"caption_confidence": verify.VerifyConfig.caption_confidence}
    settings |= {"filters": {k: dict(v) for k, v in FILTERS.items()}, "defaults": recorded("filter", DEFAULTS)}
    config = {**resolve(study.protocol, "leaml", seed, None, None), **settings}
    return identity(study.checkpoint, world, "filters", labels, seed, config)


def path_of(directory: Path, name: Mapping[str, Any], kept: str = "") -> Path:
    """``<checkpoint>/<world>/filters-<labels>-<seed>-<setting>[-<pairs>].json``: counts, or what the pairs taught."""
    file = f"filters-{name['labels']:g}-{name['seed']}-{name['setting']}{'-' + kept if kept else ''}.json"
    return directory / name["checkpoint"][:8] / name["world"] / file


def run(
    study: Study,
    world: str,
    labels: float,
    seed: int,
    directory: Path,
    *,
    accuracy: bool = False,
    stop_after: float = math.inf,
) -> bool:
    """Measure one budget and seed where that is not done yet; returns whether all is there now.

    Args:
        accuracy: also train a VQA model on what each filter alone leaves.
        stop_after: begin no training after so many seconds.
    """
    start = time.monotonic()
    name = names(study, world, labels, seed)
    path = path_of(directory, name)
    head = {
        **name,
        "format": FORMAT,
        "code": code_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }
    written: Written | None = None
    if not path.exists() or not _complete(read_json(path)):
        written = study.write(world, labels, seed)
        found = measure(written.pairs, written.budget.qas, written.world.right)
        config = resolve(study.protocol, "leaml", seed, None, None)
        write_json(path, {**head, "config": config, "written": len(written.pairs), **found})
    if not accuracy:
        return True
    # what answers the main question first: with the defaults, and with none
    for entry in sorted(read_json(path)["alone"], key=lambda entry: entry["filter"] not in (NONE, DEFAULT)):
        target = path_of(directory, name, entry["kept"])
        if target.exists():
            continue
        if time.monotonic() - start > stop_after:
            return False
        written = written or study.write(world, labels, seed)
        predictions = study.taught(written, kept_by(entry["filter"], written))
        marks = [p.correct for p in predictions]
        write_json(
            target,
            {
                **head,
                "kept": entry["kept"],
                "pairs": entry["after"]["pairs"],
                "accuracy": sum(marks) / len(marks),
                "questions": {"hash": written.world.test_hash, "count": len(marks), "correct": pack_bits(marks)},
            },
        )
        print(
            f"{world} labels {labels:g} seed {seed} filter {entry['filter']}: {entry['after']['pairs']} pairs, "
            f"accuracy {100 * sum(marks) / len(marks):.1f}",
            file=sys.stderr,
            flush=True,
        )
    return True


def _complete(result: Result) -> bool:
    """Whether a measurement has every filter that is known today."""
    return {entry["filter"] for entry in result["alone"]} >= {NONE, DEFAULT, *FILTERS, *VARIANTS}


def load(study: Study, world: str, labels: float, seeds: Iterable[int], directory: Path) -> list[dict[str, Any]]:
    """The measurements that are there, each with ``accuracy``: filter -> final accuracy, as far as it is known."""
    out = []
    for seed in seeds:
        name = names(study, world, labels, seed)
        path = path_of(directory, name)
        if path.exists():
            result = read_json(path)
            taught = {e["filter"]: path_of(directory, name, e["kept"]) for e in result["alone"]}
            accuracies = {f: read_json(p)["accuracy"] for f, p in taught.items() if p.exists()}
            out.append({**result, "accuracy": accuracies})
    return out


# -- tables ----------------------------------------------------------------------------------------------------------

TITLES = {NONE: "none (well-formed pairs)", DEFAULT: "the defaults together"}
ALONE = (
    "filter", "pairs", "kept", "right before", "right after", "right pairs lost", "wrong pairs removed", "accuracy",
    "against none",
)  # fmt: skip
SEQUENCE = ("after", "pairs", "checked", "right", "right pairs left", "wrong pairs left")


def _add(results: Sequence[Result], table: str, position: int, when: str) -> dict[str, int]:
    """Counts of one filter, pooled over seeds."""
    return {key: sum(result[table][position][when][key] for result in results) for key in ("pairs", "checked", "right")}


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}" if whole else ""


def alone_cells(results: Sequence[Result]) -> list[list[str]]:
    """Each filter by itself, pairs pooled over seeds; accuracy is the mean over the seeds that have it."""
    lines = []
    # a seed whose measurement is older than a filter would make its row another sum than the others
    results = [r for r in results if _complete(r)] or results
    for position, entry in enumerate(results[0]["alone"]):
        name = entry["filter"]
        # malformed pairs have no answer that could be right: every filter starts from the well-formed
        before = _add(results, "alone", position, "after" if name == NONE else "before")
        after = _add(results, "alone", position, "after")
        wrong = before["checked"] - before["right"]
        lost, removed = before["right"] - after["right"], wrong - (after["checked"] - after["right"])
        scores = [r["accuracy"][name] for r in results if name in r["accuracy"]]
        against = [r["accuracy"][name] - r["accuracy"][NONE] for r in results if {name, NONE} <= set(r["accuracy"])]
        lines.append(
            [
                TITLES.get(name, f"`{name}`"), str(before["pairs"]), str(after["pairs"]),
                _share(before["right"], before["checked"]), _share(after["right"], after["checked"]),
                _share(lost, before["right"]), _share(removed, wrong),
                f"{100 * sum(scores) / len(scores):.1f}" if scores else "",
                "" if name == NONE else _difference(against),
            ]
        )  # fmt: skip
    return lines


def _difference(values: Sequence[float]) -> str:
    if not values:
        return ""
    text = f"{100 * sum(values) / len(values):+.1f}"
    interval = t_interval(values)
    return f"{text} ({100 * interval[0]:+.1f} to {100 * interval[1]:+.1f})" if interval else text


def sequence_cells(results: Sequence[Result]) -> list[list[str]]:
    """What is left after each filter, all before it applied, pooled over seeds."""
    lines = []
    start = _add(results, "sequence", 0, "after")
    for position, entry in enumerate(results[0]["sequence"]):
        left = _add(results, "sequence", position, "after")
        wrong = left["checked"] - left["right"]
        lines.append(
            [
                TITLES.get(entry["filter"], f"`{entry['filter']}`"), str(left["pairs"]), str(left["checked"]),
                _share(left["right"], left["checked"]), _share(left["right"], start["right"]),
                _share(wrong, start["checked"] - start["right"]),
            ]
        )  # fmt: skip
    return lines


def page(worlds: Mapping[str, Sequence[Result]]) -> str:
    """The tables as Markdown, from nothing but the result files."""
    parts = []
    for world, results in worlds.items():
        if not results:
            continue
        some = results[0]
        trained = [len(r["accuracy"]) for r in results if r["accuracy"]]
        parts.append(
            f"### {world}\n\nCheckpoint `{some['checkpoint'][:12]}`, {100 * some['labels']:g} % of the labels, seeds "
            f"{', '.join(str(r['seed']) for r in results)}; {sum(r['written'] for r in results)} texts were written. "
            "Per cent, pairs pooled over the seeds; right and wrong among the pairs whose question the world asks of "
            "that picture. Accuracy: on the test questions, of the VQA model that learns from what the filter alone "
            f"leaves, {f'mean over {len(trained)} seed' + 's' * (len(trained) > 1) if trained else 'not run'}; against "
            "none: difference from using every well-formed pair, with Student's t interval where there are several "
            "seeds.\n"
        )
        parts.append(markdown_table(ALONE, alone_cells(results)) + "\n")
        parts.append("One after the other, in the order in which they apply:\n")
        parts.append(markdown_table(SEQUENCE, sequence_cells(results)) + "\n")
    return "\n".join(parts)
