"""TFMQ-DM (Huang et al., *TFMQ-DM: Temporal feature maintenance quantization for diffusion models*, CVPR 2024).

From the paper: the time embedding and all its projections are reconstructed together as one unit (TIB) and then left alone; the
inputs of these layers take one of finitely many values, so each step has grids of its own for them (FSC); all other layers
have one grid for all steps and block reconstruction. Ours: iterations and rates of the preset, the same for every recipe. The
author's plan: attention products in float.
"""

from __future__ import annotations

from typing import Any

from tcaq.models.time import is_time_layer
from tcaq.recipes.job import Job
from tcaq.recipes.start import BLOCKWISE, start
from tcaq.stages.rows import ONE_ROW

OPTIONS: dict[str, Any] = {**BLOCKWISE, "step_groups": "per-step"}
AUTHOR: dict[str, Any] = {"products": False}


def tfmqdm(job: Job) -> None:
    """Calibrate, reconstruct the time path as one, then every other block."""

    job.classes = lambda layer: None if is_time_layer(job.denoiser, layer) else ONE_ROW
    data = start(job)
    if job.recipe.reconstruction is not None:
        job.reconstruct_time(data.trajectories.timesteps)
        job.reconstruct(0, data.trajectories, job.recipe.reconstruction.iterations)
