"""A layer over two concatenated tensors, each half quantized by itself (Q-Diffusion, Li et al., ICCV 2023, section 3.3)."""

from __future__ import annotations

from typing import Self, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from tcaq.errors import PlanError
from tcaq.layers.conv import QuantizedConv2d, conv_options
from tcaq.layers.linear import QuantizedLinear
from tcaq.layers.modes import Mode
from tcaq.quantizers.clock import StepClock
from tcaq.spec.plan import LayerGrids


class SplitConv2d(nn.Module):
    """`first` on the channels before `where` plus `second` on the others; the bias belongs to `first`.

    A U-Net's shortcut convolutions read a hidden state beside a skip connection, whose ranges may differ by orders of magnitude:
    one scale for both wastes most codes of the smaller one. In float mode the two weights are put together again, so that
    the result is that of the original convolution, bit for bit.
    """

    def __init__(self, first: QuantizedConv2d, second: QuantizedConv2d) -> None:
        super().__init__()
        self.first, self.second = first, second

    @property
    def where(self) -> int:
        """How many channels `first` reads."""
        return self.first.in_channels

    @classmethod
    def wrap(cls, conv: nn.Conv2d, grids: LayerGrids, clock: StepClock) -> Self:
        """Split a convolution where its row of the plan says.

        Raises: PlanError if that is not inside its channels, or the convolution is grouped.
        """
        where = cast(int, grids.split)
        if not 0 < where < conv.in_channels or conv.groups != 1:
            raise PlanError(
                f"{grids.name!r} cannot be split after channel {where}: it has {conv.in_channels} input channels in {conv.groups} "
                "group(s); a split needs one group, and channels on either side"
            )
        halves = half(conv, slice(None, where), with_bias=True), half(conv, slice(where, None), with_bias=False)
        return cls(*(QuantizedConv2d.wrap(part, grids, clock) for part in halves))

    def forward(self, x: Tensor) -> Tensor:
        """Convolve `x`, float [batch, in, height, width]."""
        if self.first.mode is Mode.FLOAT:
            whole = torch.cat([self.first.float_weight(), self.second.float_weight()], dim=1)
            return cast(Tensor, self.first._conv_forward(x, whole, self.first.bias))
        return cast(Tensor, self.first(x[:, : self.where]) + self.second(x[:, self.where :]))


class SplitLinear(nn.Module):
    """The same for a linear layer: FLUX's single blocks read attention's result beside that of their feed-forward network."""

    def __init__(self, first: QuantizedLinear, second: QuantizedLinear) -> None:
        super().__init__()
        self.first, self.second = first, second

    @property
    def where(self) -> int:
        """How many features `first` reads."""
        return self.first.in_features

    @classmethod
    def wrap(cls, layer: nn.Linear, grids: LayerGrids, clock: StepClock) -> Self:
        """Split a linear layer where its row of the plan says. Raises: PlanError if that is not inside its features."""
        where = cast(int, grids.split)
        if not 0 < where < layer.in_features:
            raise PlanError(
                f"{grids.name!r} cannot be split after feature {where}: it has {layer.in_features}; a split needs features on "
                "either side"
            )
        halves = (
            linear_half(layer, slice(None, where), with_bias=True),
            linear_half(layer, slice(where, None), with_bias=False),
        )
        return cls(*(QuantizedLinear.wrap(part, grids, clock) for part in halves))

    def forward(self, x: Tensor) -> Tensor:
        """Multiply `x`, float [..., in]."""
        if self.first.mode is Mode.FLOAT:
            whole = torch.cat([self.first.float_weight(), self.second.float_weight()], dim=1)
            return linear(x, whole, self.first.bias)
        return cast(Tensor, self.first(x[..., : self.where]) + self.second(x[..., self.where :]))


def half(conv: nn.Conv2d, channels: slice, *, with_bias: bool) -> nn.Conv2d:
    """A convolution like `conv` on some of its input channels."""
    weight = conv.weight[:, channels].detach().contiguous()
    options = conv_options(conv) | {"in_channels": weight.shape[1], "bias": with_bias and conv.bias is not None}
    with torch.device("meta"):
        part = nn.Conv2d(**options)
    part.weight = nn.Parameter(weight, requires_grad=conv.weight.requires_grad)
    part.bias = conv.bias if with_bias else None
    return part.train(conv.training)


def linear_half(layer: nn.Linear, features: slice, *, with_bias: bool) -> nn.Linear:
    """A linear layer like `layer` on some of its input features."""
    weight = layer.weight[:, features].detach().contiguous()
    with torch.device("meta"):
        part = nn.Linear(weight.shape[1], layer.out_features, bias=with_bias and layer.bias is not None)
    part.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
    part.register_parameter("bias", layer.bias if with_bias else None)
    return part.train(layer.training)
