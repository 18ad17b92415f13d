"""APQ-DM (Wang et al., *Towards accurate post-training quantization for diffusion models*, CVPR 2024).

From the paper: steps are gathered in a few groups, each with grids of its own, by a differentiable search on the predicted noise;
calibration inputs come from the steps whose images tell most. Ours: which entropy that is (of the pixel values of x_t), and the
layers of the common plan. The author's plan: symmetric weights and inputs, attention products in float.
"""

from __future__ import annotations

from typing import Any

from tcaq.errors import UsageError
from tcaq.recipes import mse
from tcaq.recipes.job import Job

OPTIONS: dict[str, Any] = {
    **mse.OPTIONS,
    "step_groups": "per-step",
    "calibration": {"law": {"kind": "active"}},
    "grouping": {},
}
PARTS = frozenset({"allocation", "input_allocation", "daq", "mixed", "gptq", "grouping"})
AUTHOR: dict[str, Any] = {"symmetric": True, "products": False}


def apqdm(job: Job) -> None:
    """Choose steps, round the weights, learn the groups, then calibrate every operand group by group."""
    if job.recipe.step_groups != "per-step":
        raise UsageError(
            f"apqdm learns which steps share a row: step_groups is {job.recipe.step_groups!r}, it must be 'per-step'; "
            "`grouping.groups` says how many groups there are"
        )
    trajectories = job.weigh(job.collect(0).trajectories)
    job.allocate(trajectories)
    job.insert(trajectories)
    ranges = job.observe(trajectories)
    job.allocate_inputs(trajectories, ranges)
    job.scale_weights(ranges)
    job.group(trajectories, ranges)
    job.choose_widths(trajectories, ranges)
    job.scale_inputs(ranges)
    job.select(ranges)
    job.round_weights(trajectories)
