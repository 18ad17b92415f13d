"""Correct: what quantization adds to predicted noise in each step group (PTQD, He et al., NeurIPS 2023)."""

from __future__ import annotations

import torch
from torch import nn

from tcaq.layers.modes import faking, floating
from tcaq.models.correction import attach_correction, channels_second, correction_of
from tcaq.models.denoiser import clock_of
from tcaq.models.trajectories import Trajectories, predict
from tcaq.numerics.correction import fit_noise
from tcaq.records import Record
from tcaq.spec.recipe import Correction
from tcaq.stages.rows import table_rows

STEEPEST = -0.5
"""A slope below would more than double what is left: the prediction is lost anyway."""


def correct(denoiser: nn.Module, trajectories: Trajectories, spec: Correction) -> Record:
    """Record `slope` [groups], `bias` [groups, channels] and `variance` [groups], float32, of predictions on the same inputs."""
    with floating(denoiser):
        original = predict(denoiser, trajectories)
    with faking(denoiser):
        quantized = predict(denoiser, trajectories)
    rows = table_rows(clock_of(denoiser).boundaries, trajectories.timesteps)
    quantized, original = (
        channels_second(eps.flatten(0, 1)).unflatten(0, eps.shape[:2]) for eps in (quantized, original)
    )
    fits = [fit_noise(quantized[steps].flatten(0, 1), original[steps].flatten(0, 1)) for steps in rows.positions]
    tables = {name: torch.stack([getattr(fit, name) for fit in fits]).float() for name in ("slope", "bias", "variance")}
    tables["slope"] = tables["slope"].clamp(min=STEEPEST) * spec.slope
    tables["bias"] = tables["bias"] * spec.bias
    return Record({name: table[rows.of_group] for name, table in tables.items()})


def apply_correction(denoiser: nn.Module, record: Record, strength: float = 1.0) -> None:
    """Let the denoiser correct what it puts out: 1 + slope to the power `strength`, and that part of the bias."""
    slope, bias = record.tensors["slope"], record.tensors["bias"]
    correction = correction_of(denoiser) or attach_correction(denoiser, bias.shape[1])
    correction.set_rows((1 + slope) ** strength - 1, bias * strength)
