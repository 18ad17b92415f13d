"""The norm and SiLU before a U-Net's last convolution, in one with the codes behind them where the convolution can do that."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from tcaq.integer.layer import IntegerConv2d
from tcaq.integer.normed import NormedSilu


class PassedNorm(nn.GroupNorm):
    """Keeps the parameters of a norm that the layer behind it does, and hands its input on."""

    @classmethod
    def of(cls, norm: nn.GroupNorm) -> PassedNorm:
        """The same norm, its parameters shared."""
        own = cls(norm.num_groups, norm.num_channels, norm.eps, norm.affine, device="meta")
        own.weight, own.bias = norm.weight, norm.bias
        return own.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        """Args: x: float [batch, channels, height, width]."""
        return x


def fuse_final_norm(denoiser: nn.Module) -> None:
    """Let the last convolution of one of diffusers' U-Nets norm its own input, if it runs in integers."""
    unet = cast(Any, denoiser)
    norm, act, conv = (getattr(unet, name, None) for name in ("conv_norm_out", "conv_act", "conv_out"))
    if type(norm) is nn.GroupNorm and norm.affine and isinstance(act, nn.SiLU) and isinstance(conv, IntegerConv2d):
        conv.before = NormedSilu(norm)
        unet.conv_norm_out, unet.conv_act = PassedNorm.of(norm), nn.Identity()
