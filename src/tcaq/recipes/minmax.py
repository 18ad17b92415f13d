"""Min-max: scales that cover the observed ranges, weights to the nearest code. The floor every method must beat."""

from __future__ import annotations

from typing import Any

from tcaq.recipes.job import Job
from tcaq.recipes.start import PLAIN, start

OPTIONS: dict[str, Any] = {
    **PLAIN,
    "step_groups": 1,
    "ranges": {"weight_candidates": 1, "input_candidates": 1},
    "reconstruction": None,
}


def minmax(job: Job) -> None:
    """Calibrate by one pass over the float model's trajectories."""
    start(job)
