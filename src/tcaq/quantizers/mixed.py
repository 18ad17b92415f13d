"""Quantizers whose width changes from step group to step group (step-aware mixed precision: PTQD, He et al., NeurIPS 2023)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tcaq.numerics.affine import fake_quantize
from tcaq.numerics.log2 import fake_quantize_log2_rows
from tcaq.quantizers.affine import AffineQuantizer
from tcaq.quantizers.clock import StepClock
from tcaq.quantizers.probability import ProbabilityQuantizer
from tcaq.spec.grid import MOST_PER_OCTAVE, AffineGrid, ProbabilityGrid


class MixedQuantizer(AffineQuantizer):
    """An AffineQuantizer with a code range for each step group; a narrow row clips the codes of the widest one closer.

    Attributes: top: int16 [groups], the largest unsigned code of each row, 2^bits - 1, the narrowest width's until chosen; low,
        high: the widest row's range.
    """

    top: Tensor

    def __init__(self, grid: AffineGrid, clock: StepClock) -> None:
        super().__init__(grid.at(grid.widths[-1]), clock)
        self.grid = grid
        self.register_buffer("top", _tops(torch.full((clock.count,), grid.bits)))

    @property
    def limits(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest code of each row, int16 [groups]."""
        low = -((self.top + 1) // 2) if self.grid.signed else torch.zeros_like(self.top)
        return low, low + self.top

    def ends(self, dims: int) -> tuple[Tensor, Tensor]:
        """Those of the running batch, float [batch or 1, 1, ...]."""
        low, high = (self.clock.row(table.to(self.scale.dtype), dims) for table in self.limits)
        return low, high


class MixedProbabilityQuantizer(ProbabilityQuantizer):
    """A ProbabilityQuantizer with a number of codes for each step group.

    Attributes: top: int16 [groups], the largest code of each row, 2^bits - 1, of the narrowest width until chosen.
    """

    top: Tensor

    def __init__(self, grid: ProbabilityGrid, clock: StepClock) -> None:
        super().__init__(grid.at(grid.widths[-1]), clock)
        self.grid = grid
        self.register_buffer("top", _tops(torch.full((clock.count,), grid.bits)))

    @property
    def per_octave(self) -> Tensor:
        """Values of the log2 grid to each halving, float32 [groups]: a wider row has more, and reaches as far."""
        values: Tensor = (self.top.float() + 1) * (self.grid.per_octave / 2**self.grid.bits)
        return values.clamp(max=MOST_PER_OCTAVE)

    def _even(self, p: Tensor) -> Tensor:
        scale, top = (self.clock.row(table, p.dim()) for table in (self.scale, self.top.to(self.scale.dtype)))
        return fake_quantize(p, scale, torch.zeros_like(scale), 0, top).to(p.dtype)

    def _log2(self, p: Tensor) -> Tensor:
        tables = (self.peak, self.top.to(self.peak.dtype), self.per_octave)
        peak, top, per_octave = (self.clock.row(table, p.dim()) for table in tables)
        return fake_quantize_log2_rows(p.float(), peak, top, per_octave).to(p.dtype)


def affine_quantizer(grid: AffineGrid, clock: StepClock) -> AffineQuantizer:
    """The quantizer for a grid of one width, or of several."""
    return MixedQuantizer(grid, clock) if grid.wider else AffineQuantizer(grid, clock)


def probability_quantizer(grid: ProbabilityGrid, clock: StepClock) -> ProbabilityQuantizer:
    """The same for attention probabilities."""
    return MixedProbabilityQuantizer(grid, clock) if grid.wider else ProbabilityQuantizer(grid, clock)


def mixed_quantizers(model: nn.Module) -> Iterator[MixedQuantizer | MixedProbabilityQuantizer]:
    """Every quantizer whose width changes."""
    for module in model.modules():
        if isinstance(module, MixedQuantizer | MixedProbabilityQuantizer):
            yield module


def set_widths(model: nn.Module, bits: Tensor) -> None:
    """Give every such quantizer the width of each step group, int64 [groups]; scales must be calibrated for it afterwards."""
    for quantizer in mixed_quantizers(model):
        quantizer.top.copy_(_tops(bits))


def row_widths(quantizer: AffineQuantizer | ProbabilityQuantizer) -> Tensor:
    """The width of each step group, int64 [groups], on the CPU."""
    if isinstance(quantizer, MixedQuantizer | MixedProbabilityQuantizer):
        return torch.log2(quantizer.top.cpu().double() + 1).round().long()
    return torch.full((quantizer.clock.count,), quantizer.grid.bits)


def _tops(bits: Tensor) -> Tensor:
    return (torch.bitwise_left_shift(torch.ones_like(bits), bits) - 1).to(torch.int16)
