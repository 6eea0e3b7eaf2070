"""Timing contenders against each other: all of them in every repetition, in rotated order, and ratios within one.

Covers: the clock of a CPU thread, of several threads and of a GPU; medians and percentiles of paired ratios.
Does not cover: what is timed (``layers``, ``peers``, ``limits``) and what is asked of it (``kernels``, ``step``).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

# limits that need no scaling: the rows of a step moved, a product with nothing to gather
SAME = ("same_bytes", "same_product")


@dataclass
class Contender:
    """One way to do the work. ``before`` is not timed."""

    name: str
    run: Callable[[], Any]
    before: Callable[[], Any] | None = None


class Timer:
    """Milliseconds of one call: CUDA events, the thread's CPU time, or the clock where there are several threads.

    On a GPU the work queues up behind a short sleep of the device, as it does in training, where the host runs ahead:
    else the time it takes to launch would count as the device's.
    """

    def __init__(self, device: Any, threads: int):
        import torch

        self.cuda = device.type == "cuda"
        self.torch = torch
        self.clock = time.thread_time_ns if threads == 1 else time.perf_counter_ns

    def __call__(self, contender: Contender) -> float:
        if contender.before is not None:
            contender.before()
        if not self.cuda:
            start = self.clock()
            contender.run()
            return (self.clock() - start) / 1e6
        begin, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.torch.cuda.synchronize()
        self.torch.cuda._sleep(4_000_000)  # cycles: about two milliseconds
        begin.record()
        contender.run()
        end.record()
        self.torch.cuda.synchronize()
        return begin.elapsed_time(end)


def compare(contenders: Sequence[Contender], timer: Timer, pairs: int) -> list[dict[str, float]]:
    """``pairs`` repetitions of all contenders, each repetition in another order, after two to warm up."""
    for contender in contenders:
        for _ in range(2):
            timer(contender)
    result = []
    for number in range(pairs):
        shift = number % len(contenders)
        order = [*contenders[shift:], *contenders[:shift]]
        result.append({contender.name: timer(contender) for contender in order})
    return result


def quantile(values: Sequence[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Their 20th and 80th percentile."""
    return quantile(values, 0.2), quantile(values, 0.8)


def middle(values: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """Median and :func:`spread`, to three digits after the point."""
    low, high = spread(values)
    return round(statistics.median(values), 3), (round(low, 3), round(high, 3))


def summary(times: list[dict[str, float]], limit_bytes: int | None, measured_bytes: int) -> dict[str, Any]:
    """Medians of the paired ratios. ``limit`` moved ``measured_bytes``; the op needs ``limit_bytes``. Where there is
    one of ``SAME``, that is the limit, and the stream stands beside it."""
    ours = [t["ours"] for t in times]
    result: dict[str, Any] = {"time_ms": statistics.median(ours), "ratio": {}, "spread": {}, "limit_share": None}
    for name in times[0]:
        if name in ("ours", "limit", *SAME):
            continue
        result["ratio"][name], result["spread"][name] = middle([t[name] / t["ours"] for t in times])
    if "limit" in times[0] and limit_bytes:
        shares = [t["limit"] * limit_bytes / measured_bytes / t["ours"] for t in times]
        result["limit_share"], result["spread"]["limit"] = middle(shares)
        result["bandwidth_gb_s"] = round(measured_bytes / statistics.median(t["limit"] for t in times) / 1e6, 1)
        result["bytes"] = limit_bytes
    for name in (name for name in SAME if name in times[0]):
        if result["limit_share"] is not None:
            result["stream_share"] = result["limit_share"]
            result["spread"]["stream"] = result["spread"]["limit"]
        result["limit_share"], result["spread"]["limit"] = middle([t[name] / t["ours"] for t in times])
    return result
