"""The quantizer of activations: one scale and zero point per step group, for the whole tensor."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tcaq.numerics.affine import code_range, fake_quantize
from tcaq.quantizers.clock import StepClock
from tcaq.spec.grid import AffineGrid


class AffineQuantizer(nn.Module):
    """Quantize-dequantize with the row of the running step group.

    Attributes: scale: float32 [groups], 1 until calibrated; zero_point: int16 [groups]; log_gain: None, or float32
        [rows that differ] while step sizes are learned: the scale in use is `scale * exp(log_gain)`, so that a rate means a
        relative change. Rows that are equal when learning begins share their gain, so they stay equal; given: whether the rows are
        fixed by something else than the data, so that no fit changes them.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, grid: AffineGrid, clock: StepClock) -> None:
        super().__init__()
        self.regrid(grid)
        # a tuple keeps the shared clock out of this module's children: it belongs to the denoiser
        self._clock = (clock,)
        self.log_gain: Tensor | None = None
        self.given = False
        self._gain_of = torch.zeros(clock.count, dtype=torch.int64)
        self.register_buffer("scale", torch.ones(clock.count))
        self.register_buffer("zero_point", torch.zeros(clock.count, dtype=torch.int16))

    def regrid(self, grid: AffineGrid) -> None:
        """Take another grid; its rows must be written afterwards."""
        self.grid = grid
        self.low, self.high = code_range(grid.bits, grid.signed)

    @property
    def clock(self) -> StepClock:
        """The denoiser's clock."""
        return self._clock[0]

    def forward(self, x: Tensor, channel_gain: Tensor | None = None) -> Tensor:
        """Quantize-dequantize.

        Args: x: float [batch, ...]; channel_gain: TCR's r, broadcastable against x, multiplies the scale per channel.
        """
        table = self.scale if self.log_gain is None else self.scale * self.log_gain.exp()[self._gain_of]
        scale = self.clock.row(table, x.dim())
        if channel_gain is not None:
            scale = scale * channel_gain
        zero_point = self.clock.row(self.zero_point, x.dim()).to(scale.dtype)
        return fake_quantize(x, scale, zero_point, *self.ends(x.dim())).to(x.dtype)

    @property
    def limits(self) -> tuple[int, int] | tuple[Tensor, Tensor]:
        """Smallest and largest code: of all rows, or of each, int16 [groups]."""
        return self.low, self.high

    def ends(self, dims: int) -> tuple[int, int] | tuple[Tensor, Tensor]:
        """Those of the running batch, broadcastable against a tensor with `dims` dimensions."""
        return self.low, self.high

    def set_rows(self, scale: Tensor, zero_point: Tensor) -> None:
        """Write the calibrated table: float [groups] each."""
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)

    def follow(self, scale: Tensor) -> None:
        """Use these scales, float [groups], in place of the table until `log_gain` is None again; gradients reach them."""
        self._gain_of = torch.arange(len(self.scale), device=self.scale.device)
        self.log_gain = torch.log(scale / self.scale)

    def begin_learning(self) -> list[Tensor]:
        """Start to learn the step sizes; returns what an optimizer must own."""
        rows = torch.stack([self.scale, self.zero_point.to(self.scale.dtype)], dim=1)
        different, self._gain_of = torch.unique(rows, dim=0, return_inverse=True)
        # no nn.Parameter: the name of one takes no plain tensor afterwards, which is what `follow` gives it
        self.log_gain = self.scale.new_zeros(len(different)).requires_grad_()
        return [self.log_gain]

    def end_learning(self) -> None:
        """Fold what was learned into `scale`."""
        if self.log_gain is not None:
            self.scale.mul_(self.log_gain.detach().exp()[self._gain_of])
            self.log_gain = None
