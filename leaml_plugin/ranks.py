"""Which of several processes of one run this is: under torchrun, in an array job of a cluster, or alone.

Covers: reading rank and number of processes from options or the environment, and the device of a rank.
Does not cover: communication. Ranks of a run meet in its directory only (``leaml_plugin.artifacts``), so there is no
process group that could time out, and a rank may come late, die, or work at its own speed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from leaml_plugin.errors import LeamlError

# Ours win, so that an array job can say what it wants whatever the cluster sets. The others are torchrun's.
_VARIABLES = (("LEAML_RANK", "LEAML_WORLD_SIZE"), ("RANK", "WORLD_SIZE"))
PATIENCE = "LEAML_PATIENCE"


@dataclass(frozen=True)
class Rank:
    """Process ``number`` (from 0) of ``count``. Rank 0 leads: it alone runs what cannot be shared.

    ``patience``: seconds that the others wait for a rank 0 that has not come or has gone.
    """

    number: int = 0
    count: int = 1
    patience: float = 1800.0

    def __post_init__(self):
        if not 0 <= self.number < self.count:
            raise LeamlError(
                f"rank {self.number} of {self.count} processes: ranks count from 0 to the number of processes less one."
            )

    @property
    def leads(self) -> bool:
        return self.number == 0

    @classmethod
    def here(cls, number: int | None = None, count: int | None = None, env: Mapping[str, str] = os.environ) -> Rank:
        """From the arguments, else ``LEAML_RANK`` and ``LEAML_WORLD_SIZE``, else the same names without ``LEAML_``.

        Raises:
            LeamlError: one of a pair without the other, or no whole numbers.
        """
        patience = _number(env, PATIENCE, float) if PATIENCE in env else cls.patience
        if number is not None or count is not None:
            if number is None or count is None:
                raise LeamlError("--rank and --world-size belong together; give both.")
            return cls(number, count, patience)
        for rank, world in _VARIABLES:
            if rank in env and world in env:
                return cls(_number(env, rank, int), _number(env, world, int), patience)
            if rank.startswith("LEAML") and (rank in env or world in env):
                raise LeamlError(f"{rank} and {world} belong together; set both.")
        return cls(patience=patience)


def local_device(device: str, env: Mapping[str, str] = os.environ) -> str:
    """``device``, or for "auto" and "cuda" under torchrun the accelerator of this machine that belongs to the rank."""
    local = env.get("LOCAL_RANK")
    if device not in ("auto", "cuda") or not local:
        return device
    import torch

    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return f"cuda:{_number(env, 'LOCAL_RANK', int) % seen}" if seen > 1 else device


def _number(env: Mapping[str, str], name: str, kind: type):
    try:
        return kind(env[name])
    except ValueError as error:
        raise LeamlError(f"the environment variable {name} is {env[name]!r}; it must be a number.") from error
