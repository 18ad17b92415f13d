"""Stand-ins for the quantizers of attention probabilities."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tcaq.export.standin import Steps
from tcaq.numerics.affine import fake_quantize
from tcaq.quantizers.mixed import MixedProbabilityQuantizer
from tcaq.quantizers.probability import ProbabilityQuantizer


class ProbabilityStandIn(nn.Module):
    """The quantizer of attention probabilities without what formats lack, and without a grid that no step group uses."""

    scale: Tensor
    peak: Tensor
    use_log2: Tensor

    def __init__(self, quantizer: ProbabilityQuantizer, steps: Steps) -> None:
        super().__init__()
        self.last, self.per_octave, self.steps = quantizer.last, quantizer.grid.per_octave, (steps,)
        for name in ("scale", "peak", "use_log2"):
            self.register_buffer(name, getattr(quantizer, name).clone())
        self.grids = {bool(chosen) for chosen in self.use_log2}

    def forward(self, p: Tensor) -> Tensor:
        """Quantize-dequantize `p`, float [batch, ...] in [0, 1]."""
        if len(self.grids) == 1:
            return self._log2(p) if True in self.grids else self._even(p)
        return torch.where(self.steps[0].row(self.use_log2, p.dim()), self._log2(p), self._even(p))

    def _even(self, p: Tensor) -> Tensor:
        scale = self.steps[0].row(self.scale, p.dim())
        return fake_quantize(p, scale, torch.zeros_like(scale), 0, self.last)

    def _log2(self, p: Tensor) -> Tensor:
        peak = self.steps[0].row(self.peak, p.dim())
        codes = (torch.log2(p / peak) * -self.per_octave).round().clamp(0, self.last)
        return (
            torch.where(codes < self.last, torch.exp(codes * (-math.log(2) / self.per_octave)), torch.zeros_like(codes))
            * peak
        )


class MixedProbabilityStandIn(ProbabilityStandIn):
    """The same where the number of codes depends on the step group.

    Attributes: top, the last code, and density, how many values the log2 grid has to each halving: float32 [groups].
    """

    top: Tensor
    density: Tensor

    def __init__(self, quantizer: MixedProbabilityQuantizer, steps: Steps) -> None:
        super().__init__(quantizer, steps)
        self.register_buffer("top", quantizer.top.float())
        self.register_buffer("density", quantizer.per_octave.clone())

    def _even(self, p: Tensor) -> Tensor:
        scale, top = (self.steps[0].row(table, p.dim()) for table in (self.scale, self.top))
        return fake_quantize(p, scale, torch.zeros_like(scale), 0, top)

    def _log2(self, p: Tensor) -> Tensor:
        peak, top, dense = (self.steps[0].row(table, p.dim()) for table in (self.peak, self.top, self.density))
        codes = (torch.log2(p / peak) * -dense).round().clamp(min=0)
        return torch.where(codes < top, torch.exp(codes * (-math.log(2) / dense)), torch.zeros_like(codes)) * peak


def probability_stand_in(quantizer: ProbabilityQuantizer, steps: Steps) -> ProbabilityStandIn:
    """What is traced in place of a quantizer of probabilities."""
    if isinstance(quantizer, MixedProbabilityQuantizer):
        return MixedProbabilityStandIn(quantizer, steps)
    return ProbabilityStandIn(quantizer, steps)
