"""Parts of denoisers that cannot be traced as they are, in another form."""

from __future__ import annotations

from typing import Any, cast

import torch
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn.functional import batch_norm, group_norm, interpolate

from tcaq.layers.insert import replace


class Upsample(nn.Module):
    """diffusers' `Upsample2D` without its questions about the size of the batch, whose answers a trace would freeze."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor, output_size: int | None = None) -> Tensor:
        """Twice the size of `x`, float [batch, channels, height, width], and a convolution."""
        size: Any = {"scale_factor": 2.0} if output_size is None else {"size": output_size}
        return cast(Tensor, self.conv(interpolate(x, mode="nearest", **size)))


def plain_upsampling(denoiser: nn.Module) -> None:
    """Make a denoiser's upsamplings traceable, in place."""
    for name, module in list(denoiser.named_modules()):
        if type(module) is Upsample2D and _is_plain(module):
            replace(denoiser, name, Upsample(cast(nn.Module, module.conv)))


def _is_plain(module: Upsample2D) -> bool:
    """Whether an upsampling is interpolation and a convolution, nothing else."""
    usual = module.norm is None and module.interpolate and module.use_conv and not module.use_conv_transpose
    return bool(usual) and module.name == "conv"


class RootMeanSquareNorm(nn.Module):
    """torch's `RMSNorm` in operators that every format has."""

    def __init__(self, norm: nn.RMSNorm) -> None:
        super().__init__()
        self.axes = tuple(range(-len(norm.normalized_shape), 0))
        self.eps = torch.finfo(torch.float32).eps if norm.eps is None else norm.eps
        self.weight = norm.weight

    def forward(self, x: Tensor) -> Tensor:
        """`x`, float [..., features], over the root of its mean square."""
        normed = x * torch.rsqrt(x.square().mean(self.axes, keepdim=True) + self.eps)
        return normed if self.weight is None else normed * self.weight


class GroupNorm(nn.Module):
    """torch's `GroupNorm`, whose weight and bias are one operator: ONNX Runtime passes over a tensor for each of two."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.groups, self.eps = norm.num_groups, norm.eps
        self.weight, self.bias = norm.weight, norm.bias
        self.register_buffer("mean", torch.zeros_like(norm.weight))
        self.register_buffer("variance", torch.ones_like(norm.weight))

    def forward(self, x: Tensor) -> Tensor:
        """`x`, float [batch, channels, ...], each group of channels with mean 0 and variance 1, then scaled and shifted."""
        normed = group_norm(x, self.groups, eps=self.eps)
        return batch_norm(normed, cast(Tensor, self.mean), cast(Tensor, self.variance), self.weight, self.bias, eps=0.0)


def joined_group_norms(denoiser: nn.Module) -> None:
    """Give a denoiser's group norms that form, in place."""
    for name, module in list(denoiser.named_modules()):
        if type(module) is nn.GroupNorm and module.affine:
            replace(denoiser, name, GroupNorm(module))


def plain_norms(denoiser: nn.Module) -> None:
    """Make a denoiser's norms traceable, in place."""
    for name, module in list(denoiser.named_modules()):
        if type(module) is nn.RMSNorm:
            replace(denoiser, name, RootMeanSquareNorm(module))
