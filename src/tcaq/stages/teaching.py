"""What a unit learns from: its inputs, what the float unit makes of them, and when."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tcaq.numerics.bands import bands
from tcaq.stages.call import Call


@dataclass(frozen=True)
class Teaching:
    """What a unit learns from: its inputs in the float and in the quantized stream, the float outputs, and each row's timestep,
    all of it where the unit is.

    A block of two streams, text and image, puts out two tensors; the error of each counts relative to `sizes`, its mean power.
    """

    float_inputs: Call
    inputs: Call
    targets: list[Tensor]
    timesteps: Tensor
    _taken: dict[tuple[float, bool], list[Tensor]] = field(default_factory=dict, compare=False, repr=False)

    def __len__(self) -> int:
        return len(self.timesteps)

    def distance(
        self, outputs: list[Tensor], rows: Tensor, power: float, *, in_bands: bool = False, stretch: int = 1
    ) -> Tensor:
        """Each sample's error over all outputs, float [rows, 1], or [rows, bands] by spatial frequency.

        Args: stretch: as many rows in a row count as one, with the mean of their errors: float [rows / stretch, ...].
        """
        apart = by_band if in_bands else at_once
        errors = [output - target[rows] for output, target in zip(outputs, self.targets, strict=True)]
        parts = [apart(joined(error, stretch), power) for error in errors]
        if len(parts) == 1:
            return parts[0]
        sizes = self._sizes(power, in_bands=in_bands)
        return torch.stack([part / size for part, size in zip(parts, sizes, strict=True)]).sum(dim=0)

    def _sizes(self, power: float, *, in_bands: bool) -> list[Tensor]:
        """The mean power of each output over all rows; taken once, for every step of learning asks."""
        if (power, in_bands) not in self._taken:
            apart = by_band if in_bands else at_once
            self._taken[power, in_bands] = [apart(t, power).mean(dim=0).clamp(min=1e-20) for t in self.targets]
        return self._taken[power, in_bands]


@dataclass(frozen=True)
class Lessons:
    """All that a unit learns from, in parts whose rows make common batches.

    There is one part, unless the halves of guidance have texts of unequal length, or arguments that others lack.

    Attributes: stretches: None, or for each part rows that are steps of one image in a row, int64 [n, length].
    """

    parts: tuple[Teaching, ...]
    stretches: tuple[Tensor, ...] | None = None

    @property
    def timesteps(self) -> Tensor:
        """Of every row of every part, in order."""
        return torch.cat([part.timesteps for part in self.parts])

    @property
    def stretch(self) -> int:
        """How many rows of a batch belong together."""
        return 1 if self.stretches is None else self.stretches[0].shape[1]

    def batches(self, size: int) -> Iterator[tuple[int, Tensor]]:
        """Every row once: the number of its part, and rows there, int64 [at most `size`]."""
        for number, part in enumerate(self.parts):
            for rows in torch.arange(len(part), device=part.timesteps.device).split(size):
                yield number, rows

    def draw(self, size: int, generator: torch.Generator) -> tuple[int, Tensor]:
        """The number of a part, chosen by how many rows it has, and `size` of its rows, with repeats; whole stretches of them, as
        many as `size` has room for, if there are stretches.
        """
        number = choose([len(part) for part in self.parts], generator)
        part = self.parts[number]
        if self.stretches is not None:
            own = self.stretches[number]
            drawn = torch.randint(len(own), (size // own.shape[1],), generator=generator)
            return number, own[drawn.to(own.device)].flatten()
        return number, torch.randint(len(part), (size,), generator=generator).to(part.timesteps.device)


def choose(lengths: list[int], generator: torch.Generator) -> int:
    """One of several parts, each as likely as it is long; a single one costs no random number."""
    if len(lengths) == 1:
        return 0
    return int(torch.multinomial(torch.tensor(lengths, dtype=torch.float64), 1, generator=generator))


def joined(rows: Tensor, stretch: int) -> Tensor:
    """The mean of each `stretch` rows in a row, [rows / stretch, ...]."""
    return rows if stretch == 1 else torch.mean(rows.unflatten(0, (-1, stretch)), dim=1)


def at_once(error: Tensor, power: float) -> Tensor:
    """Each sample's p-norm of the error, to the power p: summed over channels, mean over positions; float [batch, 1]."""
    return error.abs().pow(power).sum(dim=1).reshape(len(error), -1).mean(dim=1, keepdim=True)


def by_band(error: Tensor, power: float) -> Tensor:
    """The same for each band of spatial frequencies, from the finest to the mean over all positions; float [batch, bands].

    What is no picture has one band, all of it.

    Args: error: float [batch, channels, height, width] for a picture.
    """
    if error.dim() != 4:
        return at_once(error, power)
    return torch.cat([at_once(band, power) for band in bands(error)], dim=1)
