"""Quantized linear layer."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from tcaq.layers.weighted import QuantizedWeight
from tcaq.quantizers.clock import StepClock
from tcaq.spec.plan import LayerGrids


class QuantizedLinear(QuantizedWeight, nn.Linear):
    """An `nn.Linear` that can run in float or quantized; see QuantizedWeight."""

    CHANNEL_AXIS = -1

    @classmethod
    def wrap(cls, layer: nn.Linear, grids: LayerGrids, clock: StepClock) -> Self:
        """Take over a linear layer's parameters (shared, not copied) and add quantizers."""
        with torch.device("meta"):
            wrapped = cls(layer.in_features, layer.out_features, layer.bias is not None)
        wrapped.weight, wrapped.bias = layer.weight, layer.bias
        wrapped.train(layer.training)
        wrapped._add_quantizers(grids, clock)
        return wrapped

    def forward(self, x: Tensor) -> Tensor:
        """Multiply `x`, float [batch, ..., in]."""
        if self.is_float:
            return linear(x, self.float_weight(), self.bias)
        return linear(self.quantized_input(x), self.quantized_weight(x.dtype), self.quantized_bias())
