"""The quantizer of attention probabilities: log2 or evenly spaced from zero, per step group (DAQ)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tcaq.numerics.affine import fake_quantize
from tcaq.numerics.log2 import fake_quantize_log2
from tcaq.quantizers.clock import StepClock
from tcaq.spec.grid import Log2Grid, ProbabilityGrid


class ProbabilityQuantizer(nn.Module):
    """Quantize-dequantize probabilities on the grid of the running step group.

    Attributes: scale: float32 [groups], distance of codes of the even grid; peak: float32 [groups], largest value of
        the log2 grid; use_log2: bool [groups], fixed by the grid or chosen by DAQ.
    """

    scale: Tensor
    peak: Tensor
    use_log2: Tensor

    def __init__(self, grid: ProbabilityGrid, clock: StepClock) -> None:
        super().__init__()
        self.grid = grid
        self._clock = (clock,)
        self.last = 2**grid.bits - 1
        self.register_buffer("scale", torch.full((clock.count,), 1.0 / self.last))
        self.register_buffer("peak", torch.ones(clock.count))
        self.register_buffer("use_log2", torch.full((clock.count,), isinstance(grid, Log2Grid)))

    @property
    def clock(self) -> StepClock:
        """The denoiser's clock."""
        return self._clock[0]

    def forward(self, p: Tensor) -> Tensor:
        """Quantize-dequantize `p`, float [batch, ...] in [0, 1]; gradients pass straight through."""
        use_log2 = self.clock.row(self.use_log2, p.dim())
        if self.grid.code == "unit" or self._none(use_log2):
            return self._even(p)
        if self.grid.code == "log2" or self._none(~use_log2):
            return self._log2(p)
        return torch.where(use_log2, self._log2(p), self._even(p))

    def _even(self, p: Tensor) -> Tensor:
        scale = self.clock.row(self.scale, p.dim())
        return fake_quantize(p, scale, torch.zeros_like(scale), 0, self.last).to(p.dtype)

    def _log2(self, p: Tensor) -> Tensor:
        peak = self.clock.row(self.peak, p.dim())
        return fake_quantize_log2(p.float(), peak, self.grid.bits, self.grid.per_octave).to(p.dtype)

    @staticmethod
    def _none(chosen: Tensor) -> bool:
        """Whether no sample chose so, asked only where the answer is at hand: not of another device, not in a traced graph."""
        return chosen.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(chosen.any())

    def set_rows(self, scale: Tensor, peak: Tensor, use_log2: Tensor) -> None:
        """Write the calibrated tables, each [groups]."""
        self.scale.copy_(scale)
        self.peak.copy_(peak)
        self.use_log2.copy_(use_log2)
