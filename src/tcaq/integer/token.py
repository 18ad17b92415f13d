"""An integer matrix product whose input has a grid for each token."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from tcaq.integer.backend import InputGrid, Kernel
from tcaq.integer.layer import IntegerLayer
from tcaq.layers.linear import QuantizedLinear
from tcaq.numerics.integers import SignedCodes
from tcaq.quantizers.token import TokenQuantizer


class IntegerTokenLinear(IntegerLayer):
    """Stands in for a QuantizedLinear with a TokenQuantizer; see IntegerLayer."""

    def __init__(self, layer: QuantizedLinear, codes: SignedCodes, kernel: Kernel, adds_rest: bool) -> None:
        super().__init__(layer, codes, kernel, adds_rest)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.quantizer = cast(TokenQuantizer, layer.input_quantizer)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply `x`, float [..., in]. Raises: CheckpointError in float mode or on another device."""
        self.check(x)
        scale, zero_point = self.quantizer.grid_of(x, self.equalizer)
        return self._multiply(x, InputGrid(scale, zero_point - self.quantizer.low, self.equalizer, self.top))
