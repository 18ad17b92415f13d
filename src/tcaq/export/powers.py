"""Probabilities on a coarse log2 grid as sums of powers of two, without a logarithm.

A value of such a grid is a power of two, or `√2` times one: that power and `√2 - 1` times the same once more. No code is computed.
A number 2^23 times as large as another has room for only the first digit of it, so that adding rounds it to a power of two.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tcaq.export.standin import Steps
from tcaq.quantizers.mixed import MixedProbabilityQuantizer
from tcaq.quantizers.probability import ProbabilityQuantizer

MOST_BITS = 4
MOST_PER_OCTAVE = 2
LARGE = 2.0**23
"""A power of two, by which products are exact: runtimes may then join them with what is added."""


class Powers(nn.Module):
    """A grid of one or two values to each halving, in units of its smallest one, or an even one in some step groups.

    Attributes: largest: the highest power; unit: float32 [groups], multiplies probabilities; limit: float32 [groups], the largest
        value after that; large: float32 [groups], `LARGE`, or 0 where the grid is even: nothing is rounded to powers of two there;
        worth: float32 [groups], what 1 is worth after rounding; beside: float32 [groups], the same of what is between two powers.
    """

    unit: Tensor
    limit: Tensor
    large: Tensor
    worth: Tensor
    beside: Tensor

    def __init__(self, quantizer: ProbabilityQuantizer, steps: Steps) -> None:
        """Args: quantizer: see is_coarse."""
        super().__init__()
        per_octave, log2 = quantizer.grid.per_octave, quantizer.use_log2
        self.steps, self.halved, self.mixed = (steps,), per_octave == 2, not bool(log2.all())
        self.largest = 2.0 ** ((quantizer.last - 1) // per_octave)
        worth = torch.where(log2, quantizer.peak / self.largest, quantizer.scale)
        # 1.5, from which a float is rounded to the next power, lies halfway between two values in octaves
        middle = 1.5 * 2.0 ** (0.5 / per_octave - 1)
        tables = {
            "unit": torch.where(log2, middle, 1.0) / worth, "large": log2 * LARGE, "worth": worth,
            "limit": torch.where(log2, self.largest * middle, float(quantizer.last)),
            "beside": worth * log2 * (math.sqrt(2) - 1),
        }  # fmt: skip
        for name, table in tables.items():
            self.register_buffer(name, table)

    def forward(self, p: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
        """What p is the sum of.

        Args: p: float [batch, ...] in [0, 1].
        Returns: numbers, float, the shape of p, and what 1 of them is worth, [1]. They are powers of two and zero, or whole where
            the grid is even, once they are rounded: values below the grid are one half or less here.
        """
        step = self.steps[0]
        limit, worth, beside = (step.row(table, 1) for table in (self.limit, self.worth, self.beside))
        # a number, not a tensor of one: ONNX Runtime compares with that in all threads
        x = (p * step.row(self.unit, p.dim())).clamp(max=limit.reshape(()))
        powers = self._powers(x)
        return (
            ((powers, worth), (self._powers(x * math.sqrt(2)) - powers, beside)) if self.halved else ((powers, worth),)
        )

    def _powers(self, x: Tensor) -> Tensor:
        """The power of two nearest to x; x itself where the grid is even."""
        large = x * (self.steps[0].row(self.large, x.dim()) if self.mixed else LARGE)
        return large - (large - x)


def is_coarse(quantizer: nn.Module | None) -> bool:
    """Whether a quantizer is one of probabilities, on a log2 grid in some step group, with few values."""
    if not isinstance(quantizer, ProbabilityQuantizer) or isinstance(quantizer, MixedProbabilityQuantizer):
        return False
    few = quantizer.grid.bits <= MOST_BITS and quantizer.grid.per_octave <= MOST_PER_OCTAVE
    return few and bool(quantizer.use_log2.any())
