"""The correction of a quantized denoiser's predictions, as a part of the denoiser.

PTQD corrects in the sampler. Here it sits behind the denoiser, so that every pipeline and scheduler has it: diffusers' DDIMPipeline
builds its scheduler anew from its config and would drop a correcting one without a word.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from tcaq.errors import ModelError
from tcaq.layers.modes import Mode, Moded
from tcaq.models.denoiser import clock_of
from tcaq.numerics.correction import remove_noise
from tcaq.quantizers.clock import StepClock

CORRECTION = "noise_correction"


class NoiseCorrection(Moded, nn.Module):
    """Takes known quantization noise out of predicted noise, unless the denoiser runs in float.

    Attributes: slope: float32 [groups]; bias: float32 [groups, channels]; both zero, which changes nothing, until calibrated.
        Channels behind these, as of a learned variance, are left alone.
    """

    slope: Tensor
    bias: Tensor

    def __init__(self, clock: StepClock, channels: int) -> None:
        super().__init__()
        self._clock = (clock,)
        self.register_buffer("slope", torch.zeros(clock.count))
        self.register_buffer("bias", torch.zeros(clock.count, channels))

    def forward(self, eps: Tensor) -> Tensor:
        """Correct `eps`, float [batch, channels, height, width] or [batch, tokens, channels]."""
        if self.mode is not Mode.FAKE:
            return eps
        axis, channels = (-3 if eps.dim() == 4 else -1), self.bias.shape[1]
        if more := eps.shape[axis] - channels:
            noise, others = eps.split([channels, more], dim=axis)
            return torch.cat([self._corrected(noise), others], dim=axis)
        return self._corrected(eps)

    def _corrected(self, eps: Tensor) -> Tensor:
        clock = self._clock[0]
        bias = self.bias if clock.count == 1 else self.bias[clock.group]
        bias = channels_second(bias.reshape(*bias.shape, *[1] * (eps.dim() - 2)))
        return remove_noise(eps, clock.row(self.slope, eps.dim()), bias).to(eps.dtype)

    def set_rows(self, slope: Tensor, bias: Tensor) -> None:
        """Write the calibrated tables."""
        self.slope.copy_(slope)
        self.bias.copy_(bias)


def channels_second(eps: Tensor) -> Tensor:
    """Predictions of images, [n, channels, ...], as they are; those of tokens, [n, tokens, channels], turned; and back."""
    return eps.transpose(1, 2) if eps.dim() == 3 else eps


def attach_correction(denoiser: nn.Module, channels: int) -> NoiseCorrection:
    """Let a denoiser with a clock correct what it puts out."""
    correction = NoiseCorrection(clock_of(denoiser), channels)
    denoiser.add_module(CORRECTION, correction)
    denoiser.register_forward_hook(_correct)
    return correction


def correction_of(denoiser: nn.Module) -> NoiseCorrection | None:
    """The correction that `attach_correction` added, if any."""
    found = getattr(denoiser, CORRECTION, None)
    return found if isinstance(found, NoiseCorrection) else None


def _correct(denoiser: nn.Module, _: tuple[Any, ...], output: Any) -> Any:
    correction = cast(NoiseCorrection, getattr(denoiser, CORRECTION))
    if isinstance(output, tuple):
        return correction(output[0]), *output[1:]
    if not isinstance(getattr(output, "sample", None), Tensor):
        raise ModelError(
            f"{type(denoiser).__name__} puts out {type(output).__name__}, which holds no `sample` to correct"
        )
    output.sample = correction(output.sample)
    return output
