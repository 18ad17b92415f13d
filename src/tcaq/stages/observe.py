"""Observe: what every operand of every layer holds at every step of the float model, in one pass over the trajectories."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tcaq.errors import NumericalError
from tcaq.layers.insert import channel_axis, quantized_layers
from tcaq.layers.weighted import QuantizedWeight
from tcaq.models.trajectories import Trajectories
from tcaq.records import Record
from tcaq.stages.operands import draw_rows, visiting


def observe(denoiser: nn.Module, trajectories: Trajectories, values: int, batch: int, seed: int) -> Record:
    """Record per operand, named `layer|operand|statistic`, float32:

    `low`, `high` [steps, channels]: extremes; `square` [steps, channels]: mean square, of inputs only; `rows`
    [steps, n, channels]: a random sample. The operands of a product have one channel: nothing could scale theirs apart.

    Args: values: about how many numbers of each operand are sampled at each step; batch: images at a time; seed: of
        the sample.
    Raises: NumericalError naming the layer and the step, if an operand is not finite.
    """
    axes = {n: channel_axis(m) if isinstance(m, QuantizedWeight) else None for n, m in quantized_layers(denoiser)}
    found = Observations(trajectories, values, batch, seed)

    def visit(name: str, operand: str, value: Tensor) -> None:
        found.add(name, operand, value, axes[name])

    with visiting(denoiser, visit):
        for found.step, inputs in enumerate(trajectories.calls()):
            for found.chunk, part in enumerate(inputs.split(batch)):
                part(denoiser)
            found.check()
    tables = {name: table.cpu() for name, table in found.tables.items()}
    return Record({"timesteps": trajectories.timesteps, "shares": trajectories.shares} | tables)


class Observations:
    """Tables that fill step by step and chunk by chunk, where the model is: each number fetched from a GPU would halt it.

    They are made at the first step: small results kept between large temporary tensors would scatter the heap.
    """

    def __init__(self, trajectories: Trajectories, values: int, batch: int, seed: int) -> None:
        """See `observe`."""
        self.timesteps, self.images, self.values = trajectories.timesteps, trajectories.samples.shape[1], values
        self.chunks = -(-self.images // batch)
        self.generator = torch.Generator().manual_seed(seed)
        self.tables: dict[str, Tensor] = {}
        self.step = self.chunk = 0

    def add(self, name: str, operand: str, value: Tensor, axis: int | None) -> None:
        """Take an operand of one chunk of images in; `axis`: of its channels, None if it has none of its own."""
        key = f"{name}|{operand}"
        value = value.reshape(-1, 1) if axis is None else value.movedim(axis, -1)
        channels, others = value.shape[-1], tuple(range(value.dim() - 1))
        low = self._table(f"{key}|low", (channels,), float("inf"), value.device)
        high = self._table(f"{key}|high", (channels,), -float("inf"), value.device)
        torch.minimum(low, value.amin(others).float(), out=low)  # NaN stays, for `check`
        torch.maximum(high, value.amax(others).float(), out=high)
        if axis is not None:
            share = len(value) / self.images
            square = self._table(f"{key}|square", (channels,), 0.0, value.device)
            square.add_(value.float().square().mean(others), alpha=share)
        count = max(1, self.values // (channels * self.chunks))
        rows = self._table(f"{key}|rows", (self.chunks * count, channels), 0.0, value.device)
        rows[self.chunk * count :][:count] = draw_rows(value, count, self.generator)

    def check(self) -> None:
        """Raises: NumericalError naming the first operand of this step that is not finite."""
        ends = [name for name in self.tables if name.endswith(("|low", "|high"))]
        finite = torch.stack([torch.isfinite(self.tables[name][self.step]).all() for name in ends]).cpu().tolist()
        if not all(finite):
            name, operand, _ = ends[finite.index(False)].split("|")
            t = float(self.timesteps[self.step])
            raise NumericalError(f"{operand} of layer {name!r} holds NaN or infinity at t = {t:g}")

    def _table(self, name: str, shape: tuple[int, ...], start: float, device: torch.device) -> Tensor:
        """This step's part of a table."""
        if name not in self.tables:
            self.tables[name] = torch.full((len(self.timesteps), *shape), start, device=device)
        return self.tables[name][self.step]


def channel_maxima(ranges: Record, layer: str) -> Tensor:
    """m_t[c] = max |x_t[c]| of a layer's input, float32 [steps, channels]."""
    low, high = channel_ends(ranges, layer)
    return torch.maximum(low.abs(), high.abs())


def channel_ends(ranges: Record, layer: str) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each channel of a layer's input, float32 [steps, channels] each."""
    return ranges.tensors[f"{layer}|input|low"], ranges.tensors[f"{layer}|input|high"]


def channel_squares(ranges: Record, layer: str) -> Tensor:
    """Mean square of each channel of a layer's input, float32 [steps, channels]."""
    return ranges.tensors[f"{layer}|input|square"]


def mean_squares(ranges: Record, layer: str) -> Tensor:
    """The same over all steps, float32 [channels]."""
    return channel_squares(ranges, layer).mean(dim=0)
