"""How close an exported denoiser is to the one it was made from."""

from __future__ import annotations

from typing import Any, cast

import torch
from diffusers import DiffusionPipeline

from tcaq.models.denoiser import clock_of, find_denoiser


@torch.no_grad()
def parity(pipe: DiffusionPipeline, exported: DiffusionPipeline, images: int = 2, seed: int = 0) -> float:
    """Signal-to-difference ratio of predictions on noise, in dB, at a timestep of every step group (at most eight of them).

    Equal arithmetic gives about 120 dB; single values that rounding tips over the edge of a code lower it.

    Args: pipe: the quantized pipeline, not lowered.
    """
    ours, theirs = find_denoiser(pipe)[1], find_denoiser(exported)[1]
    config: Any = cast(Any, ours).config
    size = config.sample_size if not isinstance(config.sample_size, int) else (config.sample_size, config.sample_size)
    draw = torch.Generator().manual_seed(seed)
    signal = difference = torch.zeros((), dtype=torch.float64)
    for timestep in _timesteps(clock_of(ours).boundaries.tolist()):
        x = torch.randn(images, config.in_channels, *size, generator=draw)
        expected, found = (model(x, torch.tensor(timestep)).sample.double() for model in (ours, theirs))
        signal, difference = signal + expected.square().sum(), difference + (found - expected).square().sum()
    return float(10 * torch.log10(signal / difference.clamp(min=1e-30)))


def _timesteps(boundaries: list[float], most: int = 8) -> list[float]:
    starts = [0.0, *boundaries]
    return starts[:: -(-len(starts) // most)]
