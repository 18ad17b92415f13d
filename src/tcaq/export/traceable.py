"""A denoiser made ready to be traced into another format."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, cast

import torch
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn.functional import interpolate

from tcaq.errors import ModelError
from tcaq.export.standin import ConvStandIn, Dialect, LinearStandIn, ProbabilityStandIn, StandIn, Steps
from tcaq.layers.conv import QuantizedConv2d
from tcaq.layers.insert import quantized_layers, replace
from tcaq.layers.linear import QuantizedLinear
from tcaq.layers.product import QuantizedProduct
from tcaq.layers.weighted import QuantizedWeight
from tcaq.models.bypass import bypass_of
from tcaq.models.correction import correction_of
from tcaq.models.denoiser import clock_of
from tcaq.quantizers.probability import ProbabilityQuantizer
from tcaq.quantizers.token import TokenQuantizer

ARCHITECTURES = ("UNet2DModel",)


class Traceable(nn.Module):
    """A quantized denoiser as a function of a batch and one timestep; hooks are not traced, so their work is done here.

    The denoiser given is copied, not changed.

    Args: vnni: it will only run on processors with VNNI instructions. Others add pairs of products in 16 bits and clip the sums, so
        weights of 7 or 8 bits that meet inputs of 8 bits are written in another form for them: exact everywhere, but slower.
    """

    def __init__(self, denoiser: nn.Module, dialect: Dialect, vnni: bool = False) -> None:
        super().__init__()
        check_exportable(denoiser)
        self.denoiser = deepcopy(denoiser).eval()
        steps = Steps(clock_of(self.denoiser).boundaries)
        for name, layer in list(quantized_layers(self.denoiser)):
            if isinstance(layer, QuantizedWeight):
                replace(self.denoiser, name, stand_in(layer, dialect, steps, vnni))
            else:
                _follow(layer, steps)
        plain_upsampling(self.denoiser)
        self.bypass, self.correction = bypass_of(self.denoiser), correction_of(self.denoiser)
        for part in (self.bypass, self.correction):
            if part is not None:
                cast(Any, part)._clock = (steps,)
        self.steps = (steps,)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """Predict from `sample`, float [batch, in, height, width], and one `timestep`, float [1], float [batch, out, ...]."""
        self.steps[0].set(timestep)
        prediction = cast(Any, self.denoiser).forward(sample, timestep, return_dict=False)[0]
        prediction = prediction if self.bypass is None else self.bypass(sample, prediction)
        return cast(Tensor, prediction if self.correction is None else self.correction(prediction))


def example_inputs(denoiser: nn.Module) -> tuple[Tensor, Tensor]:
    """A batch and a timestep to trace with; all sizes differ from each other, so that a trace mixes nothing up."""
    config = cast(Any, denoiser).config
    step = 2 ** (len(config.block_out_channels) - 1)
    return torch.zeros(2, config.in_channels, 4 * step, 5 * step), torch.zeros(1)


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


def stand_in(layer: QuantizedWeight, dialect: Dialect, steps: Steps, vnni: bool = False) -> StandIn:
    """What is traced in place of a layer."""
    if isinstance(layer, QuantizedConv2d):
        return ConvStandIn(layer, dialect, steps, vnni)
    return LinearStandIn(cast(QuantizedLinear, layer), dialect, steps, vnni)


def _follow(product: QuantizedProduct, steps: Steps) -> None:
    """Let the operands' quantizers look their rows up in the traced graph."""
    for quantizer in product.operands.values():
        cast(Any, quantizer)._clock = (steps,)
    if isinstance(product.left_quantizer, ProbabilityQuantizer):
        cast(Any, product).left_quantizer = ProbabilityStandIn(product.left_quantizer, steps)


def check_exportable(denoiser: nn.Module) -> None:
    """Raises: ModelError listing everything that cannot be written into another format."""
    if type(denoiser).__name__ not in ARCHITECTURES:
        raise ModelError(f"{type(denoiser).__name__} cannot be exported; known denoisers: {', '.join(ARCHITECTURES)}")
    layers = dict(quantized_layers(denoiser))
    if not layers:
        raise ModelError("the denoiser is not quantized, or was lowered; export what tcaq.load gives")
    problems = [f"{name}: {why}" for name, layer in layers.items() if (why := _problem(layer)) is not None]
    if problems:
        raise ModelError("these layers cannot be exported: " + "; ".join(problems))


def _problem(layer: QuantizedWeight | QuantizedProduct) -> str | None:
    if isinstance(layer, QuantizedWeight) and isinstance(layer.input_quantizer, TokenQuantizer):
        return "it has a grid for each token, which the format cannot hold"
    if isinstance(layer, QuantizedProduct | QuantizedLinear):
        return None
    if not isinstance(layer, QuantizedConv2d):
        return f"{type(layer).__name__} has no counterpart in the format"
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return f"padding {layer.padding!r} with {layer.padding_mode} has no integer counterpart; use numbers and zeros"
    return f"it has {layer.groups} groups; only one is supported" if layer.groups != 1 else None
