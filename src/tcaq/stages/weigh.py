"""Weigh: how much each recorded step counts in calibration, by the recipe's law."""

from __future__ import annotations

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from tcaq.models.architectures import architecture
from tcaq.models.denoiser import find_denoiser
from tcaq.models.trajectories import Trajectories
from tcaq.numerics.shares import active, skewed_normal
from tcaq.records import Record
from tcaq.spec.law import Active, Even, Law, SkewedNormal, Stride

BINS = 64


def weigh(pipe: DiffusionPipeline, trajectories: Trajectories, law: Law) -> Record:
    """Record `weights`, float64 [steps]."""
    steps, images = trajectories.samples.shape[:2]
    match law:
        case SkewedNormal():
            own = architecture(find_denoiser(pipe)[1]).last
            last = float(pipe.scheduler.config.num_train_timesteps - 1) if own is None else own
            # the halves of guidance are calls at one timestep, which share its part
            timesteps, call, calls = trajectories.timesteps.unique(return_inverse=True, return_counts=True)
            weights = (skewed_normal(timesteps, last, law.mean, law.deviation) / calls)[call]
        case Stride():
            weights = (trajectories.steps % law.every == 0).double()
        case Active():
            weights = active(entropies(trajectories), steps * images, law.price).double()
        case Even():
            weights = torch.ones(steps, dtype=torch.float64)
    return Record({"weights": weights})


def entropies(trajectories: Trajectories) -> Tensor:
    """Entropy of the pixel values of x_t at each step, in nats, from a histogram over [-4, 4]; float64 [steps].

    Early on x_t is white noise, whose values say most; as the image appears they gather. The paper does not say which entropy it
    takes: this is ours.
    """
    found = []
    for x in trajectories.samples:
        counts = torch.histc(x.float().clamp(-4, 4), BINS, -4, 4).double()
        found.append(torch.special.entr(counts / counts.sum()).sum())
    return torch.stack(found)
