"""Stand-ins for the quantizers of attention probabilities."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from tcaq.export.powers import Powers, is_coarse
from tcaq.export.standin import Steps
from tcaq.quantizers.mixed import MixedProbabilityQuantizer
from tcaq.quantizers.probability import ProbabilityQuantizer


class ProbabilityStandIn(nn.Module):
    """The quantizer of attention probabilities without what formats lack, and without a grid that no step group uses.

    Both grids are computed where both are used, and the values of one are worth nothing: choosing between two tensors takes
    ONNX Runtime longer than a whole grid.

    Attributes: top: float32 [groups], the last code; density: float32 [groups], how many values the log2 grid has to each halving;
        distance, height: float32 [groups], what a code of the even grid and a value of the log2 grid are worth: 0 where the group
        uses the other one.
    """

    scale: Tensor
    peak: Tensor
    top: Tensor
    density: Tensor
    distance: Tensor
    height: Tensor

    def __init__(self, quantizer: ProbabilityQuantizer, steps: Steps) -> None:
        super().__init__()
        self.steps = (steps,)
        mixed = isinstance(quantizer, MixedProbabilityQuantizer)
        tables = {
            "scale": quantizer.scale, "peak": quantizer.peak, "top": quantizer.top if mixed else quantizer.last,
            "density": quantizer.per_octave if mixed else quantizer.grid.per_octave,
            "distance": quantizer.scale * ~quantizer.use_log2, "height": quantizer.peak * quantizer.use_log2,
        }  # fmt: skip
        for name, table in tables.items():
            self.register_buffer(name, torch.as_tensor(table).float().expand(len(quantizer.scale)).clone())
        self.grids = {bool(chosen) for chosen in quantizer.use_log2}

    def forward(self, p: Tensor) -> Tensor:
        """Quantize-dequantize `p`, float [batch, ...] in [0, 1]."""
        if len(self.grids) == 1:
            return self._log2(p) if True in self.grids else self._even(p)
        return self._log2(p) + self._even(p)

    def _rows(self, p: Tensor, *tables: Tensor) -> list[Tensor]:
        return [self.steps[0].row(table, p.dim()) for table in tables]

    def _even(self, p: Tensor) -> Tensor:
        scale, top, distance = self._rows(p, self.scale, self.top, self.distance)
        return torch.minimum((p / scale).round(), top) * distance

    def _log2(self, p: Tensor) -> Tensor:
        peak, top, density, height = self._rows(p, self.peak, self.top, self.density, self.height)
        codes = torch.minimum((torch.log2(p / peak) * -density).round().clamp(min=0), top)
        return torch.exp(codes * (-math.log(2) / density)) * (codes < top).float() * height


class CoarseStandIn(nn.Module):
    """The same for coarse log2 grids, without a logarithm, which OpenVINO computes number by number."""

    def __init__(self, quantizer: ProbabilityQuantizer, steps: Steps) -> None:
        super().__init__()
        self.powers = Powers(quantizer, steps)

    def forward(self, p: Tensor) -> Tensor:
        """Quantize-dequantize `p`, float [batch, ...] in [0, 1]."""
        first, *more = (numbers.round() * worth for numbers, worth in self.powers(p))
        return cast(Tensor, first + more[0] if more else first)


def probability_stand_in(quantizer: ProbabilityQuantizer, steps: Steps) -> ProbabilityStandIn | CoarseStandIn:
    """What is traced in place of a quantizer of probabilities."""
    return CoarseStandIn(quantizer, steps) if is_coarse(quantizer) else ProbabilityStandIn(quantizer, steps)
