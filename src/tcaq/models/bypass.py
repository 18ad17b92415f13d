"""What the first layer's grid cuts off x_t goes around the denoiser, so that no pixel runs away.

The float denoiser takes the noise of an outlying pixel for what it is: its prediction there grows with the pixel, by 1 / sigma_t.
Through grids of 4 bits it stops growing at some 4 standard deviations. What is not predicted is not removed, and a sampler that
does not clip magnifies it at every step, by 140 times over 50 steps of DDIM. So the first layer reads x_t within a few standard
deviations, where the grids hold, and the rest, which can be nothing but noise, is added to the prediction with the gain that the
float model has there.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from tcaq.layers.modes import Mode, Moded
from tcaq.layers.weighted import QuantizedWeight
from tcaq.models.denoiser import clock_of
from tcaq.models.units import architecture
from tcaq.quantizers.clock import StepClock

BYPASS = "input_bypass"


class InputBypass(Moded, nn.Module):
    """Adds `gain * (x - clip(x))` to a prediction, unless the denoiser runs in float.

    Attributes: gain: float32 [groups], zero, which changes nothing, until calibrated.
    """

    gain: Tensor

    def __init__(self, clock: StepClock, entrance: QuantizedWeight) -> None:
        super().__init__()
        self._clock = (clock,)
        self._entrance = (entrance,)  # a tuple keeps the layer out of this module's children
        self.register_buffer("gain", torch.zeros(clock.count))

    def inside(self, x: Tensor) -> Tensor:
        """`x`, float [batch, channels, ...], clipped to what the first layer's grid holds at the running timestep."""
        low, high = self._entrance[0].input_quantizer.limits(x.dim())
        gain = self._entrance[0].gain(x.dim())
        return torch.minimum(torch.maximum(x, (low * gain).to(x.dtype)), (high * gain).to(x.dtype))

    def forward(self, x: Tensor, prediction: Tensor) -> Tensor:
        """The prediction with what x_t has beyond the grid; channels that only one of both has stay as they are."""
        if self.mode is not Mode.FAKE:
            return prediction
        channels = min(x.shape[1], prediction.shape[1])
        rest = (x - self.inside(x))[:, :channels] * self._clock[0].row(self.gain, x.dim()).to(x.dtype)
        if channels == prediction.shape[1]:
            return prediction + rest
        return torch.cat([prediction[:, :channels] + rest, prediction[:, channels:]], dim=1)


def entrance_of(denoiser: nn.Module) -> QuantizedWeight | None:
    """The quantized layer that reads x_t; None if the denoiser's class is in no table, or its plan leaves that layer in float."""
    name = architecture(denoiser).entrance
    layer = denoiser.get_submodule(name) if name else None
    return layer if isinstance(layer, QuantizedWeight) else None


def attach_bypass(denoiser: nn.Module, entrance: QuantizedWeight) -> InputBypass:
    """Let what the first layer's grid cuts off go around a denoiser with a clock."""
    bypass = InputBypass(clock_of(denoiser), entrance)
    denoiser.add_module(BYPASS, bypass)
    denoiser.register_forward_hook(_add, with_kwargs=True)
    return bypass


def bypass_of(denoiser: nn.Module) -> InputBypass | None:
    """The bypass that `attach_bypass` added, if any."""
    found = getattr(denoiser, BYPASS, None)
    return found if isinstance(found, InputBypass) else None


def _add(denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    bypass = cast(InputBypass, getattr(denoiser, BYPASS))
    x = args[0] if args else kwargs["sample"]
    if isinstance(output, tuple):
        return bypass(x, output[0]), *output[1:]
    output.sample = bypass(x, output.sample)
    return output
