"""Correct: what quantization adds to predicted noise in each step group (PTQD, He et al., NeurIPS 2023)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tcaq.layers.hold import holding_weights
from tcaq.layers.modes import faking, floating
from tcaq.models.bypass import common_channels
from tcaq.models.correction import attach_correction, channels_second, correction_of
from tcaq.models.denoiser import clock_of
from tcaq.models.device import device_of
from tcaq.models.trajectories import Trajectories, predict
from tcaq.numerics.correction import NoiseModel, fit_noise
from tcaq.records import Record
from tcaq.spec.recipe import Correction
from tcaq.stages.rows import table_rows

STEEPEST = -0.5
"""A slope below would more than double what is left: the prediction is lost anyway."""


def correct(denoiser: nn.Module, trajectories: Trajectories, spec: Correction, batch: int) -> Record:
    """Record `slope` [groups], `bias` [groups, channels] and `variance` [groups], float32, of predictions on the same inputs.

    What is predicted beside the noise, as a learned variance, is left alone. Args: batch: images at a time.
    """
    rows = table_rows(clock_of(denoiser).boundaries, trajectories.timesteps)
    with holding_weights(denoiser):
        fits = [fit_steps(denoiser, trajectories, steps, batch) for steps in rows.positions]
    tables = {name: torch.stack([getattr(fit, name) for fit in fits]).float() for name in ("slope", "bias", "variance")}
    tables["slope"] = tables["slope"].clamp(min=STEEPEST) * spec.slope
    tables["bias"] = tables["bias"] * spec.bias
    return Record({name: table[rows.of_group] for name, table in tables.items()})


def fit_steps(denoiser: nn.Module, trajectories: Trajectories, steps: Tensor, batch: int) -> NoiseModel:
    """Fit the noise over some calls, int64 [n], which may repeat; what all calls predict may not fit into memory at once."""
    calls, place = steps.unique(return_inverse=True)

    def predicted() -> Tensor:
        eps = predict(denoiser, trajectories, calls.tolist(), batch)
        axis, channels = common_channels(trajectories.samples[0], eps[0])
        eps = eps.narrow(axis, 0, channels)
        rows: Tensor = channels_second(eps.flatten(0, 1)).unflatten(0, eps.shape[:2])[place].flatten(0, 1)
        return rows

    with floating(denoiser):
        original = predicted()
    with faking(denoiser):
        quantized = predicted()
    return fit_noise(quantized, original)


def apply_correction(denoiser: nn.Module, record: Record, strength: float = 1.0) -> None:
    """Let the denoiser correct what it puts out: 1 + slope to the power `strength`, and that part of the bias."""
    slope, bias = record.tensors["slope"], record.tensors["bias"]
    attached = correction_of(denoiser)
    correction = attached or attach_correction(denoiser, bias.shape[1]).to(device_of(denoiser))
    correction.set_rows((1 + slope) ** strength - 1, bias * strength)


def typical_error(images: Tensor, others: Tensor) -> float:
    """Mean squared difference of an image to its counterpart, uint8, in gray levels squared: the geometric mean over the set.

    A few images that became pictures of something else would decide a plain mean; what befalls them is chance.
    """
    squares = (images.double() - others.double()).square().flatten(1).mean(dim=1)
    return float(squares.clamp(min=1e-6).log().mean().exp())
