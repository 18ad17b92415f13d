"""Stand-in for a linear layer whose input has a grid for each token."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from tcaq.export.standin import Dialect, StandIn
from tcaq.layers.linear import QuantizedLinear
from tcaq.quantizers.token import TokenQuantizer


class TokenStandIn(StandIn):
    """Formats take one scale and zero point for all tokens, so that a token's own are applied around its product.

    Attributes: sums: float32 [out], the sum of each output channel's weights.
    """

    sums: Tensor

    def __init__(self, layer: QuantizedLinear, dialect: Dialect) -> None:
        super().__init__(layer, dialect)
        self.in_features = layer.in_features
        self.quantizer, self.middle = cast(TokenQuantizer, layer.input_quantizer), (self.top + 1) // 2
        self.register_buffer(
            "sums", layer.weight_quantizer.centered().sum(1, dtype=torch.float32) * layer.weight_quantizer.scale
        )

    def forward(self, x: Tensor) -> Tensor:
        """Multiply `x`, float [..., in]."""
        gain = self.equalizer if self.equalizer is not None else torch.ones(1)
        scale, zero_point = self.quantizer.grid_of(x, gain)
        zero_point, one = zero_point - self.quantizer.low, torch.ones(1)
        nothing, middle = (self.dialect.zeros(torch.full((1,), float(code))) for code in (0, self.middle))
        shifted = torch.round(x / (scale * gain)) + zero_point
        codes, _ = self.dialect.quantize(shifted, one, nothing, self.top, x.dim() - 1)
        products = self.dialect.linear(codes, middle, one, self.rows)
        return (products + (self.middle - zero_point) * self.sums) * scale + self.bias
