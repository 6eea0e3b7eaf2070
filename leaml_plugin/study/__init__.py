"""``leaml study``: methods, label budgets and seeds on the embedded worlds, compared with equal effort.

Covers the command; the protocol is ``protocol``, a run ``runner``, tables and tests ``summary``, the figure ``plot``,
learning rates ``tuning``. Does not cover real data sets (``leaml adapt`` and ``leaml eval``).
"""

from __future__ import annotations

import argparse
import sys

EXAMPLES = """examples:
  leaml study                                            # both worlds, 1 % of the labels, 5 seeds, every method
  leaml study --world endoscopy --methods leaml joint full --seeds 3 --json summary.json
  leaml study --labels 0.01 0.05 0.2                     # the curve over label budgets
  leaml study --summary --page docs/study.md --plot docs/study.svg    # nothing is run: tables from the results
  leaml study --tune                                     # learning rates, on the garden world
  leaml study --filters --world endoscopy --seeds 3      # what each filter of pseudo-QA removes, against the truth
  leaml study --filters --accuracy --page docs/pseudo-labels.md       # and what it does to the final accuracy
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--world", nargs="+", metavar="WORLD", help="endoscopy, sports (default: both)")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="default: all; an unknown name lists them")
    parser.add_argument("--labels", nargs="+", type=float, default=[0.01], metavar="SHARE",
                        help="shares of the pool's pictures that are labelled (default: 0.01)")  # fmt: skip
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="seeds 0 to N-1 (default: 5)")
    parser.add_argument("--results", default="results/study", metavar="DIR",
                        help="where the results lie, one JSON file a run (default: results/study)")  # fmt: skip
    parser.add_argument("--teacher-captions", default="results/teacher", metavar="DIR",
                        help="captions by larger teachers of ours (default: results/teacher)")  # fmt: skip
    parser.add_argument("--checkpoint", metavar="DIR", help="the tiny base model (default: the embedded one)")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="of torch (default: 2)")
    parser.add_argument("--time", type=float, default=float("inf"), metavar="SECONDS",
                        help="begin no run after so many seconds; the same command goes on later")  # fmt: skip
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change the protocol")
    parser.add_argument("--tune", action="store_true", help="tune learning rates on the garden world")
    parser.add_argument("--filters", action="store_true",
                        help="measure each filter of pseudo-QA against the truth instead")  # fmt: skip
    parser.add_argument("--accuracy", action="store_true",
                        help="with --filters: also train a VQA model on what each filter leaves")  # fmt: skip
    parser.add_argument("--summary", action="store_true", help="run nothing, summarise the results that are there")
    parser.add_argument("--json", metavar="FILE", help="write the summary as JSON")
    parser.add_argument("--page", metavar="FILE", help="write the tables into a page, between its marks")
    parser.add_argument("--plot", metavar="FILE", help="draw the figure (.svg, .png, .pdf)")


def main(args: argparse.Namespace) -> int:
    from pathlib import Path

    from leaml_plugin import config
    from leaml_plugin.errors import LeamlError, unknown_name
    from leaml_plugin.report.markdown import require_marks
    from leaml_plugin.study.protocol import ORDER, REPORTED, Protocol, check_methods
    from leaml_plugin.worlds.files import checkpoint_path

    worlds = args.world or list(REPORTED)
    for world in worlds:
        if world not in REPORTED:
            raise unknown_name("world to report on", world, REPORTED)
    every = args.methods or list(ORDER)
    if not (args.methods or args.summary):
        every = _possible(every, worlds, Path(args.teacher_captions))
    methods = check_methods(every)
    if args.seeds < 1:
        raise LeamlError(f"--seeds is {args.seeds}; it must be at least 1.")
    settings: dict = {}
    for setting in args.set:
        config.assign(settings, setting)
    protocol = config.build(Protocol, settings, "study.")
    checkpoint = Path(args.checkpoint) if args.checkpoint else checkpoint_path()
    if not (checkpoint / "model.safetensors").is_file():
        raise LeamlError(f"{checkpoint}: has no model.safetensors; give the directory of the tiny base model.")
    if args.page:
        require_marks(Path(args.page))
    directory = Path(args.results)
    if args.filters:
        return _filters(args, protocol, checkpoint, directory, worlds)
    if args.accuracy:
        raise LeamlError("--accuracy belongs to --filters; without that, a study's runs have their accuracy anyway.")
    if args.tune:
        return _tune(args, protocol, checkpoint, directory, methods)
    return _study(args, protocol, checkpoint, directory, worlds, methods)


def _possible(methods, worlds, captions) -> list[str]:
    """The methods without those whose teacher's captions are not at hand: they ship with the repository alone."""
    from leaml_plugin.study.protocol import METHODS
    from leaml_plugin.worlds.teacher import captions_file

    def possible(method) -> bool:
        teacher = METHODS[method].teacher
        return teacher == "world" or all(captions_file(captions, teacher, world).is_file() for world in worlds)

    out = [method for method in methods if possible(method)]
    if len(out) < len(methods):
        left = ", ".join(method for method in methods if method not in out)
        print(f"without {left}: {captions} has no captions by the larger teacher", file=sys.stderr)
    return out


def _study(args, protocol, checkpoint, directory, worlds, methods) -> int:
    import json
    from pathlib import Path

    from leaml_plugin.artifacts import write_json
    from leaml_plugin.report.markdown import write_between
    from leaml_plugin.study import summary
    from leaml_plugin.study.protocol import budget_of
    from leaml_plugin.study.runner import (
        Job,
        Study,
        checkpoint_hash,
        identity,
        load_results,
        resolve,
        result_path,
        run_all,
    )

    jobs = list(
        dict.fromkeys(
            Job(world, method, budget_of(method, labels), seed)
            for labels in args.labels
            for seed in range(args.seeds)
            for method in methods
            for world in worlds
            if seed == 0 or method != "zero-shot"
        )
    )
    left = 0
    if args.summary:
        digest = checkpoint_hash(checkpoint)
        names = (
            identity(digest, j.world, j.method, j.labels, j.seed, resolve(protocol, j.method, j.seed, None, None))
            for j in jobs
        )
        paths = [path for path in (result_path(directory, name) for name in names) if path.exists()]
    else:
        import torch

        torch.set_num_threads(args.threads)
        study = Study(protocol, checkpoint, captions=Path(args.teacher_captions))
        paths, left = run_all(study, jobs, directory, stop_after=args.time)
    results = load_results(paths)
    table = summary.rows(results)
    print(summary.text_table(summary.HEADER, summary.cells(table)))
    found = summary.comparisons(table)
    if found:
        print("\n" + summary.text_table(summary.COMPARED, summary.compared_cells(found)))
    if left:
        print(f"\n{left} runs are left; the same command goes on with them.")
    if args.json:
        write_json(Path(args.json), json.loads(json.dumps(summary.summary(results))))
    if args.plot:
        from leaml_plugin.study.plot import draw

        draw(results, Path(args.plot))
    if args.page:
        write_between(Path(args.page), summary.page(results, Path(args.plot).name if args.plot else ""))
    return 0


def _filters(args, protocol, checkpoint, directory, worlds) -> int:
    import time
    from pathlib import Path

    import torch

    from leaml_plugin.artifacts import write_json
    from leaml_plugin.report.markdown import write_between
    from leaml_plugin.study import filters, summary
    from leaml_plugin.study.runner import Study

    torch.set_num_threads(args.threads)
    study, labels, start = Study(protocol, checkpoint), args.labels[0], time.monotonic()
    done = True
    # every seed's counts before any training
    for accuracy in (False, True) if args.accuracy else (False,):
        for seed in range(args.seeds):
            for world in worlds:
                left = args.time - (time.monotonic() - start)
                if args.summary:
                    continue
                if left <= 0:
                    done = False
                    continue
                done &= filters.run(study, world, labels, seed, directory, accuracy=accuracy, stop_after=left)
    found = {world: filters.load(study, world, labels, range(args.seeds), directory) for world in worlds}
    for world, results in found.items():
        if results:
            print(f"{world}, each filter alone")
            print(summary.text_table(filters.ALONE, filters.alone_cells(results)))
            print(f"\n{world}, one after the other")
            print(summary.text_table(filters.SEQUENCE, filters.sequence_cells(results)) + "\n")
    if not done:
        print("some runs are left; the same command goes on with them.")
    if args.json:
        write_json(Path(args.json), found)
    if args.page:
        write_between(Path(args.page), filters.page(found))
    return 0


def _tune(args, protocol, checkpoint, directory, methods) -> int:
    from pathlib import Path

    import torch

    from leaml_plugin.study import summary, tuning
    from leaml_plugin.study.protocol import METHODS
    from leaml_plugin.study.runner import Study, load_results, run_all

    torch.set_num_threads(args.threads)
    study = Study(protocol, checkpoint, captions=Path(args.teacher_captions))
    seeds, labels = range(args.seeds), args.labels[0]
    paths, left = run_all(study, tuning.jobs(methods, labels, seeds, protocol), directory, stop_after=args.time)
    found = tuning.outcome(load_results(paths), protocol)
    rates = sorted({rate for some in found.values() for rate in some})
    best, lines = tuning.best(found), []
    for name, scores in found.items():
        title = METHODS[name.removesuffix(tuning.VQA)].title + tuning.VQA * name.endswith(tuning.VQA)
        cells = [f"{100 * scores[rate]:.1f}" if rate in scores else "" for rate in rates]
        lines.append([title, *cells, f"{best[name]:g}"])
    print(summary.text_table(["method", *(f"lr {rate:g}" for rate in rates), "best"], lines))
    if left:
        print(f"\n{left} runs are left; the same command goes on with them.")
    return 0
