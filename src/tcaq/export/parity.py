"""How close an exported denoiser is to the one it was made from."""

from __future__ import annotations

from dataclasses import replace

import torch
from diffusers import DiffusionPipeline

from tcaq.export.example import first_call
from tcaq.models.denoiser import clock_of, find_denoiser


@torch.no_grad()
def parity(pipe: DiffusionPipeline, exported: DiffusionPipeline, seed: int = 0) -> float:
    """Signal-to-difference ratio of predictions in dB: noise at a timestep of every step group (at most eight of them), under the
    conditions that the pipeline gives its denoiser first.

    Equal arithmetic gives about 120 dB; single values that rounding tips over the edge of a code lower it.

    Args: pipe: the quantized pipeline, not lowered.
    """
    ours, theirs = find_denoiser(pipe)[1], find_denoiser(exported)[1]
    call, draw = first_call(pipe), torch.Generator().manual_seed(seed)
    signal = difference = torch.zeros((), dtype=torch.float64)
    for timestep in _timesteps(clock_of(ours).boundaries.tolist()):
        x = torch.randn(call.sample.shape, generator=draw).to(call.sample.dtype)
        inputs = replace(call, sample=x, timestep=torch.full((len(x),), timestep))
        expected, found = (inputs(model).double() for model in (ours, theirs))
        signal, difference = signal + expected.square().sum(), difference + (found - expected).square().sum()
    return float(10 * torch.log10(signal / difference.clamp(min=1e-30)))


def _timesteps(boundaries: list[float], most: int = 8) -> list[float]:
    starts = [0.0, *boundaries]
    return starts[:: -(-len(starts) // most)]
