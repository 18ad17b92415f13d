"""The quantizer of tokens: a grid for each token's features, found while it runs, so that nothing is calibrated."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tcaq.numerics.affine import code_range, fake_quantize, qparams
from tcaq.spec.grid import TokenGrid


class TokenQuantizer(nn.Module):
    """Quantize-dequantize each row of the last axis with a scale and zero point of its own; it has no state.

    The features of a transformer's tokens differ in size from token to token as much as from step to step (Xiao et al.,
    *SmoothQuant*, ICML 2023, section 3).
    """

    USUAL = 6.0
    """Width of a normalised token's values, three standard deviations on either side."""

    def __init__(self, grid: TokenGrid) -> None:
        super().__init__()
        self.grid = grid
        self.low, self.high = code_range(grid.bits, grid.signed)

    @property
    def usual_step(self) -> float:
        """What a code is worth for a normalised token."""
        return self.USUAL / (self.high - self.low)

    def forward(self, x: Tensor, channel_gain: Tensor | None = None) -> Tensor:
        """Quantize-dequantize.

        Args: x: float [..., features]; channel_gain: TCR's r, broadcastable against x, by which the scale is multiplied.
        """
        scale, zero_point = self.grid_of(x, channel_gain)
        if channel_gain is not None:
            scale = scale * channel_gain
        return fake_quantize(x, scale, zero_point, self.low, self.high).to(x.dtype)

    def grid_of(self, x: Tensor, channel_gain: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scale and zero point of each token of `x / gain`; x float [..., features]; float32 [..., 1] both."""
        seen = x.detach().float() if channel_gain is None else x.detach().float() / channel_gain
        low, high = torch.aminmax(seen, dim=-1, keepdim=True)
        return qparams(low, high, self.grid.bits, self.grid.signed, self.grid.symmetric)
