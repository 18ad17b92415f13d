"""Time several things in one run, so that what else the machine does meets all of them alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median
from time import perf_counter


def interleaved(calls: Mapping[str, Callable[[], object]], repeat: int) -> dict[str, float]:
    """Median seconds of each call. Every call runs once unmeasured; then all run in turn, `repeat` times."""
    for call in calls.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeat):
        for name, call in calls.items():
            began = perf_counter()
            call()
            seconds[name].append(perf_counter() - began)
    return {name: median(values) for name, values in seconds.items()}
