"""What stands between a residual block's convolutions, without a new tensor for every operation."""

from __future__ import annotations

from typing import Any, cast

from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from tcaq.integer.layer import IntegerConv2d
from tcaq.integer.normed import NormedSilu


class IntegerResnetBlock(ResnetBlock2D):  # type: ignore[misc]
    """A diffusers block whose convolutions run in integers: the same operations, in place where a tensor is the block's own, and
    norms in one with the codes behind them where the convolutions can do that.

    Tensors of several MiB that are written for the first time cost as much as the arithmetic on them.
    """

    def forward(self, input_tensor: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        """Args: input_tensor: float [batch, in, height, width]; temb: float [batch, features]; others: ignored, as they were."""
        if self.training:  # which drops out between norm and convolution
            return cast(Tensor, super().forward(input_tensor, temb, *args, **kwargs))
        x: Tensor = self.conv1(input_tensor, before=NormedSilu(self.norm1))
        x = self.conv2(x, owned=True, before=NormedSilu(self.norm2, self._time(temb)))
        x += input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        return x if self.output_scale_factor == 1 else x.div_(self.output_scale_factor)

    def _time(self, temb: Tensor | None) -> Tensor | None:
        """What the time adds to each pixel, float [batch, out]."""
        if self.time_emb_proj is None:
            return None
        return cast(Tensor, self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb)))


def keep_blocks_in_place(denoiser: nn.Module) -> None:
    """Let every block run so that does what this file knows."""
    for module in denoiser.modules():
        if type(module) is ResnetBlock2D and _is_known(module):
            module.__class__ = IntegerResnetBlock


def _is_known(block: ResnetBlock2D) -> bool:
    integer = isinstance(block.conv1, IntegerConv2d) and isinstance(block.conv2, IntegerConv2d)
    plain = block.upsample is None and block.downsample is None and block.time_embedding_norm == "default"
    norms = isinstance(block.norm1, nn.GroupNorm) and isinstance(block.norm2, nn.GroupNorm)
    return (
        integer
        and plain
        and norms
        and isinstance(block.nonlinearity, nn.SiLU)
        and isinstance(block.dropout, nn.Dropout)
    )
