"""Quantized 2-d convolution."""

from __future__ import annotations

from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from tcaq.layers.weighted import QuantizedWeight
from tcaq.quantizers.clock import StepClock
from tcaq.spec.plan import LayerGrids


class QuantizedConv2d(QuantizedWeight, nn.Conv2d):
    """An `nn.Conv2d` that can run in float or quantized; see QuantizedWeight."""

    CHANNEL_AXIS = 1

    @classmethod
    def wrap(cls, conv: nn.Conv2d, grids: LayerGrids, clock: StepClock) -> Self:
        """Take over a convolution's parameters (shared, not copied) and add quantizers."""
        with torch.device("meta"):
            layer = cls(**conv_options(conv))
        layer.weight, layer.bias = conv.weight, conv.bias
        layer.train(conv.training)
        layer._add_quantizers(grids, clock)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """Convolve `x`, float [batch, in, height, width]."""
        if self.is_float:
            return cast(Tensor, self._conv_forward(x, self.float_weight(), self.bias))
        weight, bias = self.quantized_weight(x.dtype), self.quantized_bias()
        return cast(Tensor, self._conv_forward(self.quantized_input(x), weight, bias))


def conv_options(conv: nn.Conv2d) -> dict[str, Any]:
    """The arguments that construct a convolution like `conv`."""
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    return {name: getattr(conv, name) for name in names} | {"bias": conv.bias is not None}
