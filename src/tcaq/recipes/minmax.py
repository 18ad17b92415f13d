"""Min-max: scales that cover the observed ranges, weights to the nearest code. The floor every method must beat."""

from __future__ import annotations

from typing import Any

from tcaq.recipes.job import Job
from tcaq.recipes.start import start

OPTIONS: dict[str, Any] = {
    "step_groups": 1,
    "ranges": {"weight_candidates": 1, "input_candidates": 1},
    "tcr": None,
    "daq": None,
    "reconstruction": None,
    "alignment": None,
    "network": None,
    "correction": None,
}


def minmax(job: Job) -> None:
    """Calibrate by one pass over the float model's trajectories."""
    start(job)
