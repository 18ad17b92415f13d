"""Bypass: how far the first layer reads, and how the float model answers to what lies beyond."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from tcaq.errors import ModelError
from tcaq.layers.modes import floating
from tcaq.models.bypass import attach_bypass, bypass_of, common_channels, entrance_of
from tcaq.models.denoiser import clock_of
from tcaq.models.device import CPU, device_of, moved
from tcaq.models.trajectories import Trajectories, predict
from tcaq.quantizers.affine import AffineQuantizer
from tcaq.records import Record
from tcaq.spec.recipe import Bypass
from tcaq.stages.rows import Rows, table_rows


def measure_bypass(denoiser: nn.Module, trajectories: Trajectories, spec: Bypass, batch: int, seed: int) -> Record:
    """Record `reach` and `gain`, float32 [groups].

    Reach is in the units of x_t, and never less than what the images at the end hold, which is no noise. The gain is the slope of
    the float prediction of an element that is moved outwards from there, by up to its distance from zero: a few elements of each
    image are moved at once, too far apart to see much of each other.

    Args: batch: images at a time; seed: of the choice of elements.
    """
    inner = trajectories.first(spec.images)
    spread, image = trajectories.samples.flatten(1).float().std(dim=1), trajectories.samples[-1].abs().max().float()
    reach = torch.maximum(spec.reach * spread, image)
    edge, moved = planted(inner.samples, reach, spec.share, torch.Generator().manual_seed(seed))
    with floating(denoiser):
        answers = [predict(denoiser, replace(inner, samples=samples), batch=batch) for samples in (edge, moved)]
    axis, channels = common_channels(edge[0], answers[0][0])
    step, answer = (pair[1] - pair[0] for pair in ((edge, moved), answers))
    step, answer = (change.narrow(axis, 0, channels).flatten(1).float() for change in (step, answer))
    rows = table_rows(clock_of(denoiser).boundaries, trajectories.timesteps)
    return Record(
        {
            "reach": by_group(reach.square(), rows).sqrt(),
            "gain": by_group((step * answer).sum(1), rows) / by_group(step.square().sum(1), rows).clamp(min=1e-20),
        }
    )


def planted(samples: Tensor, reach: Tensor, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """x_t clipped to `reach`, [steps], with a share of its elements at the edge; and the same, those moved up to as far again."""
    limit = reach.to(samples.dtype).reshape(-1, *[1] * (samples.dim() - 1)).expand_as(samples)
    chosen = torch.rand(samples.shape, generator=generator) < share
    sign = torch.randint(0, 2, samples.shape, generator=generator) * 2.0 - 1.0
    further = 1 + torch.rand(samples.shape, generator=generator).to(samples.dtype)
    edge = torch.where(chosen, limit * sign.to(samples.dtype), samples.clamp(-limit, limit))
    return edge, torch.where(chosen, edge * further, edge)


def by_group(values: Tensor, rows: Rows) -> Tensor:
    """Means over the steps of each group, float32 [groups]. Args: values: float [steps]."""
    return values[rows.positions].mean(dim=1).float()[rows.of_group]


def apply_bypass(denoiser: nn.Module, record: Record) -> None:
    """Let the first layer read as far as the record says, and the rest go around.

    Raises: ModelError if nothing is known of the denoiser's first layer, or it is not quantized.
    """
    entrance = entrance_of(denoiser)
    if entrance is None:
        raise ModelError(
            f"{type(denoiser).__name__} has no quantized first layer that is known; leave the bypass out (`bypass`: null)"
        )
    quantizer = cast(AffineQuantizer, entrance.input_quantizer)
    ends = tuple(moved(end, CPU) for end in quantizer.limits)
    zero_point = (ends[0] + ends[1] + 1) // 2
    scale = record.tensors["reach"] / (ends[1] - zero_point)
    quantizer.set_rows(scale, torch.as_tensor(zero_point).expand_as(scale))
    quantizer.given = True
    low, high = (scale * (code - zero_point) for code in ends)
    (bypass_of(denoiser) or attach_bypass(denoiser).to(device_of(denoiser))).set_rows(low, high, record.tensors["gain"])


def inside(denoiser: nn.Module, trajectories: Trajectories) -> Trajectories:
    """The trajectories as the first layer reads them: what fits may see, for the rest is not theirs to predict."""
    if (bypass := bypass_of(denoiser)) is None:
        return trajectories
    clock = clock_of(denoiser)
    clock.set(trajectories.timesteps)
    low, high = (table.cpu()[clock.group] for table in (bypass.low, bypass.high))
    return replace(trajectories, window=(low, high))
