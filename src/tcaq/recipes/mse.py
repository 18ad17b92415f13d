"""MSE: like min-max, but each range is searched for the least error |x - x_hat|^2.4 (BRECQ's start, Li et al., ICLR 2021)."""

from __future__ import annotations

from typing import Any

from tcaq.recipes.job import Job
from tcaq.recipes.start import PLAIN, start

OPTIONS: dict[str, Any] = {**PLAIN, "step_groups": 1, "reconstruction": None}


def mse(job: Job) -> None:
    """Calibrate by one pass over the float model's trajectories."""
    start(job)
