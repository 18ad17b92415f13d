"""What the first layer's grid cuts off x_t goes around the denoiser, so that no pixel runs away.

The float denoiser takes the noise of an outlying pixel for what it is: its prediction there grows with the pixel, by 1 / sigma_t.
Through grids of 4 bits it stops growing at some 4 standard deviations. What is not predicted is not removed, and a sampler that
does not clip magnifies it at every step, by 140 times over 50 steps of DDIM. So the first layer reads x_t within a few standard
deviations, where the grids hold, and the rest, which can be nothing but noise, is added to the prediction with the gain that the
float model has there.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from tcaq.layers.modes import Mode, Moded
from tcaq.layers.weighted import QuantizedWeight
from tcaq.models.architectures import architecture
from tcaq.models.denoiser import clock_of
from tcaq.quantizers.affine import AffineQuantizer
from tcaq.quantizers.clock import StepClock

BYPASS = "input_bypass"


class InputBypass(Moded, nn.Module):
    """Adds `gain * (x - clip(x))` to a prediction, whatever it is of, unless the denoiser runs in float.

    Attributes: low, high: float32 [groups], how far the first layer's grid reaches; gain: float32 [groups]. All zero until set.
    """

    low: Tensor
    high: Tensor
    gain: Tensor

    def __init__(self, clock: StepClock) -> None:
        super().__init__()
        self._clock = (clock,)
        for table in ("low", "high", "gain"):
            self.register_buffer(table, torch.zeros(clock.count))

    def set_rows(self, low: Tensor, high: Tensor, gain: Tensor) -> None:
        """Write the tables, float [groups] each."""
        self.low.copy_(low)
        self.high.copy_(high)
        self.gain.copy_(gain)

    def inside(self, x: Tensor) -> Tensor:
        """`x` clipped to what the first layer's grid holds at the running timestep.

        Args: x: float [batch, channels, height, width] or [batch, tokens, channels].
        """
        low, high = (self._clock[0].row(table, x.dim()).to(x.dtype) for table in (self.low, self.high))
        return torch.minimum(torch.maximum(x, low), high)

    def forward(self, x: Tensor, prediction: Tensor) -> Tensor:
        """The prediction with what x_t has beyond the grid; channels that only one of both has stay as they are."""
        if self.mode is not Mode.FAKE:
            return prediction
        axis, channels = common_channels(x, prediction)
        rest = (x - self.inside(x)).narrow(axis, 0, channels) * self._clock[0].row(self.gain, x.dim()).to(x.dtype)
        more = prediction.shape[axis] - channels
        if not more:
            return prediction + rest
        first, others = prediction.split([channels, more], dim=axis)
        return torch.cat([first + rest, others], dim=axis)


def common_channels(x: Tensor, prediction: Tensor) -> tuple[int, int]:
    """The axis of channels, from behind, and how many of them x_t and its prediction have in common: the first ones.

    Inpainting reads more than it predicts, a learned variance is predicted beside the noise.

    Args: both [batch, channels, height, width], or both [batch, tokens, channels].
    """
    axis = -3 if x.dim() == 4 else -1
    return axis, min(x.shape[axis], prediction.shape[axis])


def entrance_of(denoiser: nn.Module) -> QuantizedWeight | None:
    """The layer that reads x_t on a grid of its own; None if the denoiser's class is in no table, or its plan says otherwise."""
    name = architecture(denoiser).entrance
    layer = denoiser.get_submodule(name) if name else None
    fixed = isinstance(layer, QuantizedWeight) and isinstance(layer.input_quantizer, AffineQuantizer)
    return cast(QuantizedWeight, layer) if fixed else None


def attach_bypass(denoiser: nn.Module) -> InputBypass:
    """Let what the first layer's grid cuts off go around a denoiser with a clock."""
    bypass = InputBypass(clock_of(denoiser))
    denoiser.add_module(BYPASS, bypass)
    sample = next(iter(inspect.signature(denoiser.forward).parameters))
    denoiser.register_forward_hook(_adding(sample), with_kwargs=True)
    return bypass


def bypass_of(denoiser: nn.Module) -> InputBypass | None:
    """The bypass that `attach_bypass` added, if any."""
    found = getattr(denoiser, BYPASS, None)
    return found if isinstance(found, InputBypass) else None


def _adding(sample: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]:
    # the name is looked up once: reading a signature inside forward would break torch.compile's graph
    def add(denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        bypass, x = cast(InputBypass, getattr(denoiser, BYPASS)), args[0] if args else kwargs[sample]
        if isinstance(output, tuple):
            return bypass(x, output[0]), *output[1:]
        output.sample = bypass(x, output.sample)
        return output

    return add
