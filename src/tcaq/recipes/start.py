"""What every recipe begins with."""

from __future__ import annotations

from tcaq.recipes.job import Collected, Job


def start(job: Job) -> Collected:
    """Sample the float model, insert the quantizers, and give every weight and operand its first grid: no gradients.

    Parts that the recipe leaves out (a law of its own for the steps, TCR) leave no record.
    """
    data = job.collect(0)
    trajectories = job.weigh(data.trajectories)
    job.insert(trajectories)
    ranges = job.observe(trajectories)
    job.equalize(ranges)
    job.scale_weights(ranges)
    job.scale_inputs(ranges)
    job.select(ranges)
    return Collected(trajectories, data.images)
