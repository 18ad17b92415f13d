"""PTQD (He et al., *PTQD: Accurate post-training quantization for diffusion models*, NeurIPS 2023).

From the paper: block reconstruction with one grid for all steps; then, step by step, the part of the quantization noise that
follows the prediction and its bias are taken out, and the sampler adds less noise where quantization has added some.
Ours: the correction belongs to the denoiser, so that every scheduler has it; iterations and rates of the preset. The noise is
measured on the float model's trajectories. Only stochastic samplers (DDPM, DDIM with eta above 0) have noise to add less of.
"""

from __future__ import annotations

from typing import Any

from tcaq.errors import UsageError
from tcaq.recipes.job import Job
from tcaq.recipes.start import BLOCKWISE, start
from tcaq.stages.rows import ONE_ROW

OPTIONS: dict[str, Any] = {**BLOCKWISE, "step_groups": "per-step", "correction": {"strengths": [], "sampler": True}}


def ptqd(job: Job) -> None:
    """Calibrate with one row for all steps, reconstruct, and correct step by step."""
    if job.recipe.correction is not None and job.recipe.correction.strengths:
        raise UsageError("ptqd corrects at full strength: leave `correction.strengths` empty ([])")
    job.classes = lambda layer: ONE_ROW
    data = start(job)
    if job.recipe.reconstruction is not None:
        job.reconstruct(0, data.trajectories, job.recipe.reconstruction.iterations)
    if job.recipe.correction is not None:
        job.correct(data.trajectories)
