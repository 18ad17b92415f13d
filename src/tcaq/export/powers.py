"""Probabilities on a coarse log2 grid as sums of powers of two, without a logarithm.

A value of such a grid is a power of two, or `√2` times one: that power and `√2 - 1` times the same once more. No code is computed.
A number about 2^23 times as large as another has room for only one power of two of it, so that adding rounds it to that.
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
BESIDE = math.sqrt(2) - 1
"""What the second of two powers is worth."""
DIGITS = 24
"""Of a float, binary ones."""
LOWER = 2.0**-0.2
"""Values are taken so much smaller: each is then nearer than half a power of two to the one that it shall be rounded to, for every
lift that is used."""


class Powers(nn.Module):
    """A grid of one or two values to each halving, in units of its smallest one, or an even one in some step groups.

    Attributes: unit: float32 [groups], multiplies probabilities; limit: float32 [groups], the largest value after that; pull:
        float32 [groups], 1, or 0 where the grid is even: nothing is rounded to powers of two there; gain: float32 [groups], what 1
        is worth then.
    """

    unit: Tensor
    limit: Tensor
    pull: Tensor
    gain: Tensor

    def __init__(self, quantizer: ProbabilityQuantizer, steps: Steps) -> None:
        """Args: quantizer: see is_coarse."""
        super().__init__()
        per_octave, log2 = quantizer.grid.per_octave, quantizer.use_log2
        self.steps, self.halved, self.mixed = (steps,), per_octave == 2, not bool(log2.all())
        largest = 2.0 ** ((quantizer.last - 1) // per_octave)
        gain = torch.where(log2, quantizer.peak / largest, quantizer.scale)
        tables = {
            "unit": torch.where(log2, LOWER, 1.0) / gain, "pull": log2.float(), "gain": gain,
            "limit": torch.where(log2, largest * LOWER, float(quantizer.last)),
        }  # fmt: skip
        for name, table in tables.items():
            self.register_buffer(name, table)

    def forward(self, p: Tensor) -> tuple[Tensor, ...]:
        """What must yet be rounded to whole numbers, where a half, of values below the grid, becomes zero.

        Args: p: float [batch, ...] in [0, 1].
        Returns: float, the shape of p: powers of two, or two of them, the second worth `BESIDE` times as much; codes and zeros
            where the grid is even.
        """
        step = self.steps[0]
        # a number, not a tensor of one: ONNX Runtime compares with that in all threads
        x = (p * step.row(self.unit, p.dim())).clamp(max=step.row(self.limit, 1).reshape(()))
        if not self.halved:
            return (self._powers(x, 0.5),)
        below = self._powers(x, 0.25)
        return below, self._powers(x, 0.75) - below

    def worth(self) -> Tensor:
        """The running group's gain, float [1]."""
        return self.steps[0].row(self.gain, 1)

    def _powers(self, x: Tensor, lift: float) -> Tensor:
        """2^n for x / LOWER in [2^(n - lift), 2^(n + 1 - lift)); x itself where the grid is even."""
        factor = 2.0 ** (DIGITS - 1 + lift) / LOWER
        large = x * (self.steps[0].row(self.pull * factor, x.dim()) if self.mixed else factor)
        return large - (large - x)


def is_coarse(quantizer: nn.Module | None) -> bool:
    """Whether a quantizer is one of probabilities, on a log2 grid in some step group, with few values."""
    if not isinstance(quantizer, ProbabilityQuantizer) or isinstance(quantizer, MixedProbabilityQuantizer):
        return False
    few = quantizer.grid.bits <= MOST_BITS and quantizer.grid.per_octave <= MOST_PER_OCTAVE
    return few and bool(quantizer.use_log2.any())
