"""Observe: the range of every input channel of every layer at every step, in the float model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tcaq.errors import NumericalError
from tcaq.layers.insert import channel_axis, quantized_layers
from tcaq.layers.weighted import QuantizedWeight
from tcaq.models.sampler import Trajectories
from tcaq.records import Record
from tcaq.stages.operands import as_rows, visiting


def observe(denoiser: nn.Module, trajectories: Trajectories) -> Record:
    """Record for each layer input `low`, `high` and `square` (mean square), float32 [steps, channels], named `layer|statistic`.

    Products are left out: their operands have no channels that a TCR vector could scale.
    Raises: NumericalError naming the layer and the step, if an input is not finite.
    """
    axes = {n: channel_axis(m) for n, m in quantized_layers(denoiser) if isinstance(m, QuantizedWeight)}
    rows: dict[str, list[Tensor]] = {}
    timestep = trajectories.timesteps[0]

    def visit(name: str, operand: str, value: Tensor) -> None:
        if not bool(torch.isfinite(value).all()):
            raise NumericalError(f"{operand} of layer {name!r} holds NaN or infinity at t = {float(timestep):g}")
        if name in axes:
            flat = as_rows(value, axes[name]).float()
            low, high = torch.aminmax(flat, dim=0)
            for statistic, values in (("low", low), ("high", high), ("square", flat.square().mean(dim=0))):
                rows.setdefault(f"{name}|{statistic}", []).append(values)

    with visiting(denoiser, visit):
        for x, timestep in zip(trajectories.samples, trajectories.timesteps, strict=True):
            denoiser(x, timestep)
    return Record({"timesteps": trajectories.timesteps} | {name: torch.stack(values) for name, values in rows.items()})


def channel_maxima(ranges: Record, layer: str) -> Tensor:
    """m_t[c] = max |x_t[c]| of a layer's input, float32 [steps, channels]."""
    return torch.maximum(ranges.tensors[f"{layer}|low"].abs(), ranges.tensors[f"{layer}|high"].abs())


def mean_squares(ranges: Record, layer: str) -> Tensor:
    """Mean square of each input channel of a layer over all steps, float32 [channels]."""
    return ranges.tensors[f"{layer}|square"].mean(dim=0)
