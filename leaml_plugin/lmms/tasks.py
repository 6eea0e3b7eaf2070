"""``leaml tasks``: the lmms-eval tasks of this package and where their data would come from, in a moment.

Covers: our own tasks, read from their files, without importing lmms-eval. Does not cover: lmms-eval's other tasks
(``lmms-eval --tasks list`` shows all).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

from leaml_plugin.lmms import endoscopy, entry, sportr, sports
from leaml_plugin.lmms.cache import cache_root

EXAMPLES = """examples:
  leaml tasks
  leaml tasks --names
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--names", action="store_true", help="print the names alone, one a line")


def main(args: argparse.Namespace) -> int:
    found = sorted(tasks())
    if args.names:
        print("\n".join(name for name, _ in found))
        return 0
    width = max(len(name) for name, _ in found)
    for name, about in found:
        print(f"{name:<{width}}  {about}")
    print()
    for variable, otherwise in (
        (endoscopy.DATA_VARIABLE, f"not set: {endoscopy.HUB_ID} from the Hub ({endoscopy.LICENCE})"),
        (sports.DATA_VARIABLE, "not set: SPORTU must be fetched by hand (github.com/chili-lab/SPORTU)"),
        (sportr.DATA_VARIABLE, f"not set: SportR is given out on request ({sportr.HUB_ID} on the Hub)"),
        (endoscopy.LABEL_VARIABLE, f"not set: {endoscopy.label_fraction():g} of the training pictures"),
        ("LEAML_PROMPTS", "not set: the prompts that leaml adapt uses by default"),
        ("LEAML_CACHE", f"not set: {cache_root()}"),
    ):
        print(f"{variable:<{width}}  {os.environ.get(variable) or otherwise}")
    return 0


def tasks() -> Iterator[tuple[str, str]]:
    """Name and one-line description of every task and group of this package."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Reads the files without running what ``!function`` names."""

    Loader.add_constructor("!function", lambda loader, node: None)
    for path in Path(entry.tasks_directory()).rglob("*.yaml"):
        data = yaml.load(path.read_text(encoding="utf-8"), Loader)
        name = data.get("group") or data["task"]
        yield name, (data.get("metadata") or {}).get("about", "")
