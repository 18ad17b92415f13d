"""Q-Diffusion (Li et al., *Q-Diffusion: Quantizing diffusion models*, ICCV 2023).

From the paper: calibration on every fifth step (20 of 100), one grid for all steps, shortcut convolutions over concatenated
inputs split in two halves with grids of their own, block reconstruction by AdaRound and then of the step sizes. Ours: the number
of iterations and rates of the preset, the same for every recipe, and units in true execution order. The author's plan:
attention probabilities at 8 bits.
"""

from __future__ import annotations

from typing import Any

from tcaq.recipes.job import Job
from tcaq.recipes.start import BLOCKWISE, start

OPTIONS: dict[str, Any] = {**BLOCKWISE, "step_groups": 1, "calibration": {"law": {"kind": "stride", "every": 5}}}
TRAITS: dict[str, Any] = {"split": True}
AUTHOR: dict[str, Any] = {"probability_bits": 8}


def qdiffusion(job: Job) -> None:
    """Calibrate, then reconstruct block by block."""
    data = start(job)
    if job.recipe.reconstruction is not None:
        job.reconstruct(0, data.trajectories, job.recipe.reconstruction.iterations)
