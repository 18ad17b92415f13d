"""PTQ4DM (Shang et al., *Post-training quantization on diffusion models*, CVPR 2023).

From the paper: calibration on inputs of the reverse process whose timesteps follow a skewed normal law; ranges searched for
the least error; one grid for all steps; no gradients. Ours: the law's exact shares in place of draws, and the layers of
the common plan. The author's plan: symmetric weights and inputs, attention products in float.
"""

from __future__ import annotations

from typing import Any

from tcaq.recipes import mse
from tcaq.recipes.job import Job
from tcaq.recipes.start import start

OPTIONS: dict[str, Any] = {**mse.OPTIONS, "calibration": {"law": {"kind": "skewed-normal"}}}
AUTHOR: dict[str, Any] = {"symmetric": True, "products": False}


def ptq4dm(job: Job) -> None:
    """Calibrate on steps by the law."""
    start(job)
