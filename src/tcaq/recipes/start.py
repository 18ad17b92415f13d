"""What every recipe begins with."""

from __future__ import annotations

from typing import Any

from tcaq.recipes.job import Collected, Job

START = frozenset({"allocation", "input_allocation", "bypass", "tcr", "daq", "stagger", "mixed", "gptq"})
"""The parts of a recipe that `start` knows what to do with."""
BLOCKS = START | {"reconstruction"}
"""The same of a program that reconstructs block by block after it."""
PLAIN: dict[str, Any] = {
    "bypass": None,
    "tcr": None,
    "daq": None,
    "stagger": None,
    "alignment": None,
    "network": None,
    "correction": None,
}
"""Options of a recipe that has nothing of TCAQ-DM's own."""
BLOCKWISE: dict[str, Any] = {**PLAIN, "reconstruction": {"schedule": "two-phase", "drop": 0.0, "balance": "all"}}
"""The same with block reconstruction as in BRECQ: roundings first, then step sizes, on quantized inputs, errors as they are."""


def start(job: Job) -> Collected:
    """Sample the float model, insert the quantizers, and give every weight and operand its first grid: no gradients.

    Parts that the recipe leaves out (a law of its own for the steps, widths by layer, the bypass, TCR, widths by step, GPTQ) leave
    no record.
    """
    data = job.collect(0)
    trajectories = job.weigh(data.trajectories)
    job.allocate(trajectories)
    job.insert(trajectories)
    job.bypass(trajectories)
    ranges = job.observe(trajectories)
    job.equalize(ranges)
    job.allocate_inputs(trajectories, ranges)
    job.scale_weights(ranges)
    job.choose_widths(trajectories, ranges)
    job.scale_inputs(ranges)
    job.stagger()
    job.select(ranges)
    job.round_weights(trajectories)
    return Collected(trajectories, data.images)
