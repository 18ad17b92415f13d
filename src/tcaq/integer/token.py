"""An integer matrix product whose input has a grid for each token."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from tcaq.integer.backend import Kernel
from tcaq.integer.layer import IntegerLayer
from tcaq.layers.linear import QuantizedLinear
from tcaq.numerics.bytes import byte_codes
from tcaq.numerics.integers import SignedCodes
from tcaq.quantizers.token import TokenQuantizer


class IntegerTokenLinear(IntegerLayer):
    """Stands in for a QuantizedLinear with a TokenQuantizer; see IntegerLayer.

    Kernels take one zero point for all rows. They are given the middle code m, and what a token's own zero point z adds, `(m - z)
    Σ w`, comes behind them in float: small, because m is as near to every z as one number can be.

    Attributes: sums: float32 [out], the sum of each output channel's weights; bias: None, or float32 [out].
    """

    sums: Tensor
    bias: Tensor | None

    def __init__(self, layer: QuantizedLinear, codes: SignedCodes, kernel: Kernel) -> None:
        """Args: kernel: of the weight without a bias, which a token's scale must not multiply."""
        super().__init__(layer, codes, kernel)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.quantizer, self.middle = cast(TokenQuantizer, layer.input_quantizer), (self.top + 1) // 2
        bias = layer.quantized_bias()
        self.register_buffer("sums", codes.whole().sum(1, dtype=torch.float32) * layer.weight_quantizer.scale)
        self.register_buffer("bias", None if bias is None else bias.detach().float())

    def forward(self, x: Tensor) -> Tensor:
        """Multiply `x`, float [..., in]. Raises: CheckpointError in float mode or on another device."""
        self.check(x)
        scale, zero_point = self.quantizer.grid_of(x, self.equalizer)
        unsigned = zero_point - self.quantizer.low
        codes = byte_codes(x / (scale * self.equalizer), unsigned, self.top).reshape(-1, self.in_features)
        products = self._kernel(codes, 1.0, self.middle, torch.float32)
        products = products if self.is_plain else self._sum(products)
        products = products.reshape(*x.shape[:-1], self.out_features)
        products = torch.addcmul(products, self.middle - unsigned, self.sums).mul_(scale)
        return (products if self.bias is None else products.add_(self.bias)).to(x.dtype)
