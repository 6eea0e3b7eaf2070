"""``leaml eval``: lmms-eval in this process, with a result to work with and an exit code that tells of failure.

Covers: the same tasks, model and numbers as the command ``lmms-eval``, without its fifteen seconds of start-up for
every model after the first; results and answers as files; exit code 1 where an evaluation fails or yields nothing,
which lmms-eval itself reports as success.
Does not cover: lmms-eval's own command-line options (loggers, the Hub, few-shot); use ``lmms-eval`` for those.

    from leaml_plugin.lmms.run import evaluate
    report = evaluate("runs/base", ["leaml_endoscopy"], adapter="runs/endo/adapter", batch_size=32)
    print(report["results"]["leaml_endoscopy"]["exact_match"], report["results"]["leaml_endoscopy"]["interval_exact"])
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leaml_plugin.artifacts import write_json, write_text
from leaml_plugin.errors import LeamlError, unknown_name
from leaml_plugin.lmms import entry

if TYPE_CHECKING:
    from leaml_plugin.models import Loaded

EXAMPLES = """examples:
  leaml eval --model Qwen/Qwen2.5-VL-3B-Instruct --adapter runs/endo/adapter --tasks leaml_endoscopy
  leaml eval --model runs/base --tasks leaml_endoscopy,leaml_endoscopy_nopicture --data kvasir-vqa --output runs/eval
  leaml eval --model runs/base --tasks leaml_endoscopy_synthetic --limit 100 --batch-size 32
  leaml tasks
"""

#: The metrics that the printed table shows, in order, with the metric that holds their interval.
SHOWN = {
    "exact_match": "interval_exact",
    "above_blind": "interval_above",
    "blind_majority": None,
    "blind_options": None,
    "set_f1": "interval_set",
    "macro_f1": "interval_macro",
    "bleu": None,
    "rougeL": "interval_longest",
    "meteor": None,
    "blind_bleu": None,
    "blind_rougeL": None,
}


class EvaluationFailed(Exception):
    """lmms-eval ran and gave no score; the message says for which task."""


def evaluate(
    model: str | os.PathLike[str] | Loaded,
    tasks: Sequence[str] | str,
    *,
    adapter: str | os.PathLike[str] | None = None,
    limit: int | float | None = None,
    batch_size: int | str = 16,
    output: str | os.PathLike[str] | None = None,
    dtype: str = "auto",
    device: str | None = None,
    prompts: str | os.PathLike[str] | None = None,
    endoscopy_data: str | os.PathLike[str] | None = None,
    sports_data: str | os.PathLike[str] | None = None,
    x1_data: str | os.PathLike[str] | None = None,
    sportr_data: str | os.PathLike[str] | None = None,
    label_fraction: float | None = None,
    log_samples: bool = False,
    gen_kwargs: Mapping[str, Any] | None = None,
    model_args: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Evaluate a model on lmms-eval tasks, ours or any other that is scored by generation.

    Args:
        model: directory or Hub id, or a :class:`~leaml_plugin.models.Loaded` model, which stays loaded.
        tasks: task or group names.
        limit: questions of each task, or a share of them below 1.
        output: a directory for ``results.json`` and, with ``log_samples``, ``samples_<task>.jsonl``.
        prompts: the prompt directory that the model was adapted with (``$LEAML_PROMPTS``).
        endoscopy_data, sports_data, x1_data, sportr_data: local data (``$LEAML_ENDOSCOPY_DATA``,
            ``$LEAML_SPORTS_DATA``, ``$LEAML_ENDOSCOPY_X1_DATA``, ``$LEAML_SPORTR_DATA``).
        label_fraction: share of the training pictures that the image-blind baseline learns from (0.01).
        log_samples: keep every question, answer and score.
        gen_kwargs: generation options that replace the tasks' own (``max_new_tokens``, ``temperature``, ...).
        model_args: further arguments of :class:`leaml_plugin.lmms.model.Leaml`.

    Returns:
        ``{"results": {task: {metric: value}}, "n": {task: questions}, "tasks": {...}, "config": {...}}`` and, with
        ``log_samples``, ``"samples": {task: [...]}``. Groups stand among the tasks. Values are floats, or
        ``[low, high]`` for intervals, or ``None`` where a metric concerns no question.

    Raises:
        LeamlError: a task that does not exist, data that cannot be had, a model that cannot be loaded.
        EvaluationFailed: the evaluation ran but a task has no score.
    """
    names = _names(tasks)
    settings = {
        "LEAML_ENDOSCOPY_DATA": endoscopy_data,
        "LEAML_SPORTS_DATA": sports_data,
        "LEAML_ENDOSCOPY_X1_DATA": x1_data,
        "LEAML_SPORTR_DATA": sportr_data,
        "LEAML_PROMPTS": prompts,
        "LEAML_LABEL_FRACTION": label_fraction,
    }
    _need_lmms_eval()
    with _environment(settings), _plain_errors():
        import lmms_eval.evaluator as evaluator

        from leaml_plugin.lmms.model import Leaml

        manager = _task_manager(names)
        # lmms-eval passes over --limit 0 as over None; it would score everything
        if limit is not None and limit <= 0:
            raise LeamlError(f"limit must be positive: a number of questions, or a share below 1; got {limit}.")
        lm = Leaml(model, adapter=adapter, dtype=dtype, device=device, batch_size=batch_size, **(model_args or {}))
        raw = evaluator.simple_evaluate(
            model=lm,
            tasks=names,
            limit=limit,
            task_manager=manager,
            log_samples=True,
            bootstrap_iters=0,
            gen_kwargs=",".join(f"{name}={value}" for name, value in (gen_kwargs or {}).items()) or None,
        )
    if raw is None:  # not the first of several processes
        return {}
    report = _report(raw)
    report["config"] = {
        "model": str(getattr(model, "path", model)),
        "adapter": None if adapter is None else str(adapter),
        "limit": limit,
        "batch_size": batch_size,
        "dtype": dtype,
        "gen_kwargs": dict(gen_kwargs or {}),
        **{name: str(value) for name, value in settings.items() if value is not None},
    }
    if output is not None:
        _write(report, Path(output), log_samples)
    if not log_samples:
        del report["samples"]
    return report


def _names(tasks: Sequence[str] | str) -> list[str]:
    names = [name.strip() for name in (tasks.split(",") if isinstance(tasks, str) else tasks) if name.strip()]
    if not names:
        raise LeamlError("no task was named; 'leaml tasks' lists those of this package.")
    return names


def _task_manager(names: Sequence[str]) -> Any:
    """A fresh task manager (it counts what it loads) that knows ``names``.

    Indexing lmms-eval's thousand tasks takes seconds, so it is left out where all names are ours.
    """
    from lmms_eval.tasks import TaskManager

    own = TaskManager("WARNING", entry.tasks_directory(), include_defaults=False, model_name="leaml")
    if all(name in own.all_tasks for name in names):
        return own
    entry.add_tasks()  # another plugin's failure may have kept lmms-eval from calling our entry point
    manager = TaskManager("WARNING", model_name="leaml")
    for name in names:
        if name not in manager.all_tasks:
            raise unknown_name("task", name, manager.all_tasks)
    return manager


def _need_lmms_eval() -> None:
    import importlib.util

    if importlib.util.find_spec("lmms_eval") is None:
        raise LeamlError("lmms-eval is not installed; pip install 'leaml_plugin[eval]'.")


@contextlib.contextmanager
def _environment(settings: Mapping[str, Any]) -> Iterator[None]:
    """Set the given variables for the duration. Local data need no Hub, whose look-ups would hang offline."""
    wanted = {name: str(value) for name, value in settings.items() if value is not None}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """lmms-eval retries what fails and wraps it: show what went wrong instead."""
    from tenacity import RetryError

    try:
        yield
    except RetryError as error:
        raise (error.last_attempt.exception() or error) from None
    except ImportError as error:
        if isinstance(error.__cause__, LeamlError):
            raise error.__cause__ from None
        raise


def _report(raw: Mapping[str, Any]) -> dict[str, Any]:
    results: dict[str, dict[str, Any]] = {}
    for task, values in raw["results"].items():
        kept = {}
        for key, value in values.items():
            name, comma, _ = key.partition(",")
            # "exact_match,none" are metrics; "alias", " " and the like are not
            if comma and "_stderr" not in name and not (isinstance(value, list) and not value):
                kept[name] = _plain(value)
        results[task] = kept
    counts = {task: sizes["effective"] for task, sizes in raw["n-samples"].items()}
    for task in counts:
        scores = [value for value in results.get(task, {}).values() if isinstance(value, (int, float))]
        if not scores or any(math.isnan(score) for score in scores):
            raise EvaluationFailed(f"{task}: lmms-eval ended without a score; the log above says why.")
    return {
        "results": results,
        "n": counts,
        "tasks": {task: members for task, members in raw["group_subtasks"].items() if members},
        "samples": {task: [_sample(sample) for sample in rows] for task, rows in raw["samples"].items()},
    }


def _plain(value: Any) -> Any:
    """numpy's numbers as Python's."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.item() if hasattr(value, "item") else value


def _sample(sample: Mapping[str, Any]) -> dict[str, Any]:
    scores = {name: value["score"] for name, value in sample.items() if isinstance(value, Mapping) and "score" in value}
    return {
        "doc_id": sample["doc_id"],
        "doc": sample["doc"],
        "target": sample["target"],
        "answer": sample["filtered_resps"][0],
        "scores": scores,
    }


def _write(report: Mapping[str, Any], directory: Path, log_samples: bool) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "results.json", {name: value for name, value in report.items() if name != "samples"})
    if log_samples:
        for task, rows in report["samples"].items():
            lines = (json.dumps(row, ensure_ascii=False, sort_keys=True, default=str) + "\n" for row in rows)
            write_text(directory / f"samples_{task}.jsonl", "".join(lines))


# ---------------------------------------------------------------------------------------------------- command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, help="directory or Hub id of an image-text-to-text model")
    add("--adapter", help="directory or Hub id of a PEFT adapter: LEAML's own or any other")
    add("--tasks", required=True, help="task names, separated by commas ('leaml tasks' lists them)")
    add("--data", help="local endoscopy or sports data, for tasks of one kind")
    add("--endoscopy-data", help="local copy of Kvasir-VQA (default: $LEAML_ENDOSCOPY_DATA, else the Hub)")
    add("--sports-data", help="local copy of SPORTU with its clips (default: $LEAML_SPORTS_DATA)")
    add("--x1-data", help="local copy of Kvasir-VQA-x1 (default: $LEAML_ENDOSCOPY_X1_DATA, else the Hub)")
    add("--sportr-data", help="local copy of SportR with its pictures (default: $LEAML_SPORTR_DATA)")
    add("--label-fraction", type=float, help="labels that the image-blind baseline learns from (default 0.01)")
    add("--prompts", help="prompt directory that the model was adapted with")
    add("--limit", type=float, help="questions of each task, or a share of them below 1")
    add("--batch-size", default="16", help="questions generated at once, or auto (default 16)")
    add("--output", help="directory for results.json and the answers")
    add("--log-samples", action="store_true", help="write every question, answer and score (needs --output)")
    add("--dtype", default="auto", help='weights: "auto" (default), float32, bfloat16 or float16')
    add("--device", help="auto (default), cpu, cuda, cuda:1, ...")
    add("--model-args", default="", help="further model arguments, name=value separated by commas")


def main(args: argparse.Namespace) -> int:
    if args.log_samples and not args.output:
        raise LeamlError("--log-samples needs --output, the directory to write the answers to.")
    names = _names(args.tasks)
    endoscopy, sports = args.endoscopy_data, args.sports_data
    if args.data:
        if any("sports" in name for name in names):
            sports = sports or args.data
        if any("endoscopy" in name for name in names):
            endoscopy = endoscopy or args.data
    limit = int(args.limit) if args.limit is not None and args.limit >= 1 else args.limit
    _need_lmms_eval()
    _quiet()
    try:
        report = evaluate(
            args.model,
            names,
            adapter=args.adapter,
            limit=limit,
            batch_size=args.batch_size,
            output=args.output,
            dtype=args.dtype,
            device=args.device,
            prompts=args.prompts,
            endoscopy_data=endoscopy,
            sports_data=sports,
            x1_data=args.x1_data,
            sportr_data=args.sportr_data,
            label_fraction=args.label_fraction,
            log_samples=args.log_samples,
            model_args=_model_args(args.model_args),
        )
    except EvaluationFailed as error:
        print(f"leaml: {error}", file=sys.stderr)
        return 1
    if report:
        print(table(report))
        if args.output:
            print(f"results: {Path(args.output) / 'results.json'}")
    return 0


def _quiet() -> None:
    """No progress bars of libraries on standard error, which has our own."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


def _model_args(text: str) -> dict[str, Any]:
    if not text:
        return {}
    from lmms_eval.utils import simple_parse_args_string

    try:
        return simple_parse_args_string(text)
    except ValueError as error:
        raise LeamlError(f"--model-args {text!r}: wanted name=value, separated by commas ({error}).") from error


def table(report: Mapping[str, Any]) -> str:
    """The main metrics of every task, one a line, with their 95 % intervals clustered by picture."""
    lines = []
    for task, values in report["results"].items():
        count = report["n"].get(task)
        lines.append(f"{task}" + (f"  ({count} questions)" if count is not None else ""))
        for metric, interval in SHOWN.items():
            value = values.get(metric)
            if value is None:
                continue
            bounds = values.get(interval) if interval else None
            spread = f"   95 % interval {bounds[0]:.3f} to {bounds[1]:.3f}" if bounds else ""
            lines.append(f"  {metric:<15} {value:6.3f}{spread}")
    return "\n".join(lines)
