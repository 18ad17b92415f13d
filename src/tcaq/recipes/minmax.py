"""Min-max: scales from the observed ranges, weights to the nearest code. The floor every method must beat."""

from __future__ import annotations

from tcaq.recipes.job import Job


def minmax(job: Job) -> None:
    """Calibrate by one pass over the float model's trajectories."""
    data = job.collect(0)
    job.insert(data.trajectories)
    ranges = job.observe(data.trajectories)
    job.scale(ranges)
    job.select(ranges)
