"""A denoiser made ready to be traced into another format."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, cast

from torch import Tensor, nn

from tcaq.errors import ModelError
from tcaq.export.interface import UNCONDITIONAL, Interface
from tcaq.export.parts import plain_norms, plain_upsampling
from tcaq.export.positions import free_positions
from tcaq.export.powers import is_coarse
from tcaq.export.probability import probability_stand_in
from tcaq.export.product import PowersStandIn, ProductStandIn, is_even
from tcaq.export.standin import ConvStandIn, Dialect, LinearStandIn, ProductDialect, StandIn, Steps
from tcaq.export.token import TokenStandIn
from tcaq.layers.conv import QuantizedConv2d
from tcaq.layers.insert import quantized_layers, replace
from tcaq.layers.linear import QuantizedLinear
from tcaq.layers.product import QuantizedProduct
from tcaq.layers.weighted import QuantizedWeight
from tcaq.models.bypass import bypass_of
from tcaq.models.correction import correction_of
from tcaq.models.denoiser import clock_of
from tcaq.models.inputs import prediction
from tcaq.models.nested import rebuilt
from tcaq.quantizers.probability import ProbabilityQuantizer
from tcaq.quantizers.token import TokenQuantizer


class Traceable(nn.Module):
    """A quantized denoiser as a function of tensors; hooks are not traced, so their work is done here.

    The denoiser given is copied, not changed; the copy is in float32.

    Args: interface: the names of the tensors.
    """

    def __init__(self, denoiser: nn.Module, dialect: Dialect, interface: Interface = UNCONDITIONAL) -> None:
        super().__init__()
        check_exportable(denoiser)
        # torch's own: diffusers lets nobody cast a quantized model, for whose codes it fears; no code is of a float type here
        self.denoiser, self.interface = nn.Module.float(deepcopy(denoiser).eval()), (interface,)
        steps = Steps(clock_of(self.denoiser).boundaries)
        for name, layer in list(quantized_layers(self.denoiser)):
            if isinstance(layer, QuantizedWeight):
                replace(self.denoiser, name, stand_in(layer, dialect, steps))
            elif isinstance(dialect, ProductDialect) and is_even(layer):
                replace(self.denoiser, name, ProductStandIn(layer, dialect, steps))
            elif isinstance(dialect, ProductDialect) and is_coarse(layer.left_quantizer):
                replace(self.denoiser, name, PowersStandIn(layer, dialect, steps))
            else:
                _follow(layer, steps)
        plain_upsampling(self.denoiser)
        plain_norms(self.denoiser)
        free_positions(self.denoiser)
        dialect.prepare(self.denoiser)
        self.bypass, self.correction = bypass_of(self.denoiser), correction_of(self.denoiser)
        for part in (self.bypass, self.correction):
            if part is not None:
                cast(Any, part)._clock = (steps,)
        self.steps = (steps,)

    def forward(self, sample: Tensor, timestep: Tensor, *others: Tensor) -> Tensor:
        """Predict.

        Args: sample: float [batch, in, height, width] or [batch, tokens, in]; timestep: float [1], for the whole batch; others:
            what else the interface names, in its order.
        Returns: float, in the shape of the denoiser's own prediction.
        """
        self.steps[0].set(timestep)
        options: Any = rebuilt(dict(zip(self.interface[0].names[2:], others, strict=True)))
        output = cast(Any, self.denoiser).forward(sample, timestep=timestep.expand(sample.shape[0]), **options)
        found = prediction(output)
        found = found if self.bypass is None else self.bypass(sample, found)
        return cast(Tensor, found if self.correction is None else self.correction(found))


def stand_in(layer: QuantizedWeight, dialect: Dialect, steps: Steps) -> StandIn:
    """What is traced in place of a layer."""
    if isinstance(layer, QuantizedConv2d):
        return ConvStandIn(layer, dialect, steps)
    if isinstance(layer.input_quantizer, TokenQuantizer):
        return TokenStandIn(cast(QuantizedLinear, layer), dialect)
    return LinearStandIn(cast(QuantizedLinear, layer), dialect, steps)


def _follow(product: QuantizedProduct, steps: Steps) -> None:
    """Let the operands' quantizers look their rows up in the traced graph."""
    for quantizer in product.operands.values():
        cast(Any, quantizer)._clock = (steps,)
    if isinstance(product.left_quantizer, ProbabilityQuantizer):
        cast(Any, product).left_quantizer = probability_stand_in(product.left_quantizer, steps)


def check_exportable(denoiser: nn.Module) -> None:
    """Raises: UsageError for a lowered denoiser; ModelError listing everything that cannot be written into another format."""
    layers, quantizer = dict(quantized_layers(denoiser)), getattr(denoiser, "hf_quantizer", None)
    if not layers or not getattr(quantizer, "has_codes", True):
        raise ModelError("the denoiser is not quantized, or was lowered; export what tcaq.load gives")
    problems = [f"{name}: {why}" for name, layer in layers.items() if (why := _problem(layer)) is not None]
    if problems:
        raise ModelError("these layers cannot be exported: " + "; ".join(problems))


def _problem(layer: QuantizedWeight | QuantizedProduct) -> str | None:
    if isinstance(layer, QuantizedProduct | QuantizedLinear):
        return None
    if not isinstance(layer, QuantizedConv2d):
        return f"{type(layer).__name__} has no counterpart in the format"
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return f"padding {layer.padding!r} with {layer.padding_mode} has no integer counterpart; use numbers and zeros"
    return f"it has {layer.groups} groups; only one is supported" if layer.groups != 1 else None
