"""The one exception a user can cause, and the words around it.

Covers: :class:`LeamlError`, which every module raises for bad input, and "did you mean" suggestions.
Does not cover: bugs. Those keep their own exception type and traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LeamlError(Exception):
    """Bad input, told in one sentence: where (file, line, field), what is wrong, what to do.

    The command line prints the sentence without a traceback and exits with code 2.
    """

    exit_code = 2


def unknown_name(kind: str, name: str, choices: Iterable[str]) -> LeamlError:
    """A :class:`LeamlError` for a name that is not among ``choices``, with the nearest one suggested."""
    known = sorted(choices)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known) or 'none'}."
    return LeamlError(f"unknown {kind} {name!r}; {hint}")
