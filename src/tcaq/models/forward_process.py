"""What a scheduler knows of the forward process: how much of x_t is signal, and what the denoiser predicts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast, get_args

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from tcaq.errors import UsageError
from tcaq.numerics.snr import Prediction


@dataclass(frozen=True)
class ForwardProcess:
    """Of a variance-preserving process: `x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps`.

    Attributes: alpha_bar: float64 [training timesteps]; prediction: of the denoiser.
    """

    alpha_bar: Tensor
    prediction: Prediction

    def signal_share(self, timesteps: Tensor) -> Tensor:
        """alpha_bar at some timesteps, [n], float64 [n]; between whole ones on the line between its neighbours."""
        last = len(self.alpha_bar) - 1
        t = timesteps.double().clamp(0, last)
        before = t.floor().long()
        return torch.lerp(self.alpha_bar[before], self.alpha_bar[(before + 1).clamp(max=last)], t - before)


def forward_process(pipe: DiffusionPipeline) -> ForwardProcess:
    """That of a pipeline's scheduler. Raises: UsageError if it is of another kind, as in flow matching."""
    scheduler: Any = pipe.scheduler
    table, known = getattr(scheduler, "alphas_cumprod", None), scheduler.config.get("prediction_type")
    kind = known or "epsilon"
    if not isinstance(table, Tensor) or kind not in get_args(Prediction):
        predicts = f" (it predicts: {known})" if known else ""
        raise UsageError(
            f"{type(scheduler).__name__} has no signal-to-noise ratio by timestep to choose widths by{predicts}; "
            "leave out --step-bits (`mixed`: null)"
        )
    return ForwardProcess(table.double().cpu(), cast(Prediction, kind))
