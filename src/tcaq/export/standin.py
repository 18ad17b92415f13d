"""Stand-ins for quantized layers while a denoiser is traced: the same arithmetic, as a target format writes integers."""

from __future__ import annotations

import math
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from tcaq.layers.conv import QuantizedConv2d
from tcaq.layers.linear import QuantizedLinear
from tcaq.layers.modes import Moded
from tcaq.layers.weighted import QuantizedWeight
from tcaq.numerics.affine import fake_quantize
from tcaq.numerics.integers import SignedCodes, signed_codes
from tcaq.quantizers.affine import AffineQuantizer
from tcaq.quantizers.mixed import MixedProbabilityQuantizer, MixedQuantizer
from tcaq.quantizers.probability import ProbabilityQuantizer


class Dialect(Protocol):
    """How a target format writes integer arithmetic.

    Attributes: conv_clips, linear_clips: whether its runtime clips sums of two products to 16 bits on processors without VNNI;
        conv_offset: what a convolution's codes are moved down by, 0 or 128, to be signed.
    """

    conv_clips: bool
    linear_clips: bool
    conv_offset: int

    def conv_weight(self, weight: Tensor) -> Tensor:
        """A convolution's weight, int8 [out, in, kh, kw], as the format keeps it."""

    def quantize(
        self, x: Tensor, divisor: Tensor, zero_point: Tensor, top: int | Tensor, axis: int, offset: int = 0
    ) -> Tensor:
        """Codes of x: `round(x / divisor) + zero_point`, clipped to 0 and `top`, minus `offset`.

        Args: divisor: float [1] or [channels along axis]; zero_point: float [1]; top: a number, or float [1] where it depends on
            the step group; offset: 0 or the dialect's `conv_offset`.
        """

    def conv(
        self, codes: Tensor, zero_point: Tensor, scale: Tensor, weight: Tensor, gain: Tensor, layer: nn.Conv2d
    ) -> Tensor:
        """`Σ weight (code - zero_point) * gain * scale` in float; weight as kept, gain [out], scale [1]."""

    def linear(self, codes: Tensor, zero_point: Tensor, scale: Tensor, weight: Tensor, gain: Tensor) -> Tensor:
        """`Σ weight (code - zero_point) * gain * scale` in float; weight [out, in], gain [out], scale [1]."""


class Steps:
    """Stands in for the clock: one step group for the whole batch, a part of the traced graph.

    Attributes: group: int64 [1].
    """

    def __init__(self, boundaries: Tensor) -> None:
        self.boundaries, self.count = boundaries, len(boundaries) + 1
        self.group = torch.zeros(1, dtype=torch.int64)

    def set(self, timestep: Tensor) -> None:
        """Write the group of a timestep, float [1]: how many boundaries are not above it."""
        self.group = (timestep >= self.boundaries).sum().reshape(1)

    def row(self, table: Tensor, dims: int) -> Tensor:
        """The row of a table [groups], shaped [1, 1, ...] with `dims` dimensions."""
        rows = table if self.count == 1 else table[self.group]
        return rows.reshape(-1, *[1] * (dims - 1))


class StandIn(Moded, nn.Module):
    """What all kinds of layer share.

    Attributes: equalizer: float32 [in] or [1] if it is 1 everywhere; weight:
        int8 [rows, ...], a row for each plane of each output channel, then one of ones if some need the sum of their inputs;
        gain: float32 [rows], what a row's sums are worth; rest: None, or float32 [out], what the sum of the inputs is worth;
        bias: float32 [out].
    """

    equalizer: Tensor
    weight: Tensor
    gain: Tensor
    rest: Tensor | None
    bias: Tensor

    def __init__(self, layer: QuantizedWeight, dialect: Dialect, steps: Steps, clips: bool) -> None:
        super().__init__()
        quantizer = layer.input_quantizer
        bias, r = layer.quantized_bias(), layer.equalizer
        scale, self.top = layer.weight_quantizer.scale, quantizer.high - quantizer.low
        form = _form(layer, 2**15 // (2 * self.top + 1) if clips else 255)
        summing = [torch.ones_like(form.planes[0][:1])] if form.has_rest else []
        self.out, self.planes = len(scale), len(form.planes)
        self.dialect, self.steps = dialect, (steps,)
        self.register_buffer("equalizer", r[:1].clone() if bool((r == 1).all()) else r.clone())
        self.register_buffer("weight", torch.cat([*form.planes, *summing]))
        self.register_buffer(
            "gain", torch.cat([*(factor * scale for factor in form.factors), scale.new_ones(len(summing))])
        )
        self.register_buffer("rest", form.rest * scale if form.has_rest else None)
        self.register_buffer("bias", torch.zeros_like(scale) if bias is None else bias.detach().float())

    def _total(self, products: Tensor, axis: int) -> Tensor:
        """Add up the planes, and what `rest` makes of the summing channel."""
        shape = [1] * products.dim()
        shape[axis] = -1
        total = products.narrow(axis, 0, self.out) if len(self.weight) > self.out else products
        for plane in range(1, self.planes):
            total = total + products.narrow(axis, plane * self.out, self.out)
        if self.rest is not None:
            total = total + products.narrow(axis, self.planes * self.out, 1) * self.rest.reshape(shape)
        return total


class SteppedStandIn(StandIn):
    """A layer whose input has a grid for each step group.

    Attributes: scale, zero_point: float32 [groups]; tops: None, or float32 [groups], the largest code where it depends on the step
        group.
    """

    scale: Tensor
    zero_point: Tensor
    tops: Tensor | None

    def __init__(self, layer: QuantizedWeight, dialect: Dialect, steps: Steps, clips: bool) -> None:
        super().__init__(layer, dialect, steps, clips)
        quantizer = cast(AffineQuantizer, layer.input_quantizer)
        self.register_buffer("scale", quantizer.scale.clone())
        self.register_buffer("zero_point", (quantizer.zero_point - quantizer.limits[0]).float())
        self.register_buffer("tops", quantizer.top.float() if isinstance(quantizer, MixedQuantizer) else None)

    def _codes(self, x: Tensor, axis: int, offset: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """The input's codes, moved down by `offset`, and the zero point and scale that they have, [1] each."""
        scale, zero_point = (self.steps[0].row(table, 1) for table in (self.scale, self.zero_point))
        top = self.top if self.tops is None else self.steps[0].row(self.tops, 1)
        codes = self.dialect.quantize(x, scale * self.equalizer, zero_point, top, axis, offset)
        return codes, zero_point - offset, scale


def _form(layer: QuantizedWeight, most: int) -> SignedCodes:
    """The first form of a weight without a number beyond `most`; the last one if there is none."""
    forms = list(signed_codes(layer.weight_quantizer.centered()))
    return next((form for form in forms if max(map(abs, form.extremes)) <= most), forms[-1])


class ConvStandIn(SteppedStandIn):
    """A quantized convolution in one group."""

    def __init__(self, layer: QuantizedConv2d, dialect: Dialect, steps: Steps, vnni: bool) -> None:
        super().__init__(layer, dialect, steps, clips=dialect.conv_clips and not vnni)
        self.weight = dialect.conv_weight(self.weight)
        self.in_channels = layer.in_channels
        self.like = (layer,)  # for its geometry; a tuple keeps its tensors out of this module

    def forward(self, x: Tensor) -> Tensor:
        """Convolve `x`, float [batch, in, height, width]."""
        codes, zero_point, scale = self._codes(x, 1, self.dialect.conv_offset)
        products = self.dialect.conv(codes, zero_point, scale, self.weight, self.gain, self.like[0])
        return self._total(products, 1) + self.bias.reshape(-1, 1, 1)


class LinearStandIn(SteppedStandIn):
    """A quantized linear layer."""

    def __init__(self, layer: QuantizedLinear, dialect: Dialect, steps: Steps, vnni: bool) -> None:
        super().__init__(layer, dialect, steps, clips=dialect.linear_clips and not vnni)
        self.in_features = layer.in_features

    def forward(self, x: Tensor) -> Tensor:
        """Multiply `x`, float [..., in]."""
        codes, zero_point, scale = self._codes(x, x.dim() - 1)
        products = self.dialect.linear(codes, zero_point, scale, self.weight, self.gain)
        return self._total(products, x.dim() - 1) + self.bias


class ProbabilityStandIn(nn.Module):
    """The quantizer of attention probabilities without what formats lack, and without a grid that no step group uses."""

    scale: Tensor
    peak: Tensor
    use_log2: Tensor

    def __init__(self, quantizer: ProbabilityQuantizer, steps: Steps) -> None:
        super().__init__()
        self.last, self.per_octave, self.steps = quantizer.last, quantizer.grid.per_octave, (steps,)
        for name in ("scale", "peak", "use_log2"):
            self.register_buffer(name, getattr(quantizer, name).clone())
        self.grids = {bool(chosen) for chosen in self.use_log2}

    def forward(self, p: Tensor) -> Tensor:
        """Quantize-dequantize `p`, float [batch, ...] in [0, 1]."""
        if len(self.grids) == 1:
            return self._log2(p) if True in self.grids else self._even(p)
        return torch.where(self.steps[0].row(self.use_log2, p.dim()), self._log2(p), self._even(p))

    def _even(self, p: Tensor) -> Tensor:
        scale = self.steps[0].row(self.scale, p.dim())
        return fake_quantize(p, scale, torch.zeros_like(scale), 0, self.last)

    def _log2(self, p: Tensor) -> Tensor:
        peak = self.steps[0].row(self.peak, p.dim())
        codes = (torch.log2(p / peak) * -self.per_octave).round().clamp(0, self.last)
        return (
            torch.where(codes < self.last, torch.exp(codes * (-math.log(2) / self.per_octave)), torch.zeros_like(codes))
            * peak
        )


class MixedProbabilityStandIn(ProbabilityStandIn):
    """The same where the number of codes depends on the step group.

    Attributes: top, the last code, and density, how many values the log2 grid has to each halving: float32 [groups].
    """

    top: Tensor
    density: Tensor

    def __init__(self, quantizer: MixedProbabilityQuantizer, steps: Steps) -> None:
        super().__init__(quantizer, steps)
        self.register_buffer("top", quantizer.top.float())
        self.register_buffer("density", quantizer.per_octave.clone())

    def _even(self, p: Tensor) -> Tensor:
        scale, top = (self.steps[0].row(table, p.dim()) for table in (self.scale, self.top))
        return fake_quantize(p, scale, torch.zeros_like(scale), 0, top)

    def _log2(self, p: Tensor) -> Tensor:
        peak, top, dense = (self.steps[0].row(table, p.dim()) for table in (self.peak, self.top, self.density))
        codes = (torch.log2(p / peak) * -dense).round().clamp(min=0)
        return torch.where(codes < top, torch.exp(codes * (-math.log(2) / dense)), torch.zeros_like(codes)) * peak


def probability_stand_in(quantizer: ProbabilityQuantizer, steps: Steps) -> ProbabilityStandIn:
    """What is traced in place of a quantizer of probabilities."""
    if isinstance(quantizer, MixedProbabilityQuantizer):
        return MixedProbabilityStandIn(quantizer, steps)
    return ProbabilityStandIn(quantizer, steps)
