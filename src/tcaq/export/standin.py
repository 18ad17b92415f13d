"""Stand-ins for quantized layers while a denoiser is traced: the same arithmetic, as a target format writes integers."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Protocol, Self, cast, runtime_checkable

import torch
from torch import Tensor, nn

from tcaq.layers.conv import QuantizedConv2d
from tcaq.layers.linear import QuantizedLinear
from tcaq.layers.modes import Moded
from tcaq.layers.weighted import QuantizedWeight
from tcaq.quantizers.affine import AffineQuantizer
from tcaq.quantizers.mixed import MixedQuantizer


class Dialect(Protocol):
    """How a target format writes integer arithmetic. Whatever it says of a zero point is in its own type, see `zeros`."""

    def prepare(self, denoiser: nn.Module) -> None:
        """Bring a denoiser's other parts into the form that suits the format, in place."""

    def zeros(self, zero_point: Tensor, second: bool = False) -> Tensor:
        """Zero points of unsigned codes, float [...], as the format keeps them; second: of the right operand of a product."""

    def rows(self, layer: QuantizedWeight, top: int) -> nn.Module:
        """What the format keeps of a layer's weight; top: the largest code that it meets."""

    def quantize(
        self, x: Tensor, divisor: Tensor, zero: Tensor, top: int | Tensor, axis: int
    ) -> tuple[Tensor, Tensor | None]:
        """Codes of x: `round(x / divisor) + zero point`, clipped to 0 and `top`; and their zero point, None if it is taken off.

        Args: divisor: float [1] or [channels along axis]; zero: [1]; top: a number, or float [1] where it depends on the step
            group.
        """

    def conv(
        self, codes: Tensor, zero: Tensor | None, scale: Tensor, rows: nn.Module, layer: nn.Conv2d, bias: Tensor,
        steps: Steps,
    ) -> Tensor:  # fmt: skip
        """`Σ weight (code - zero point) * scale + bias` in float; scale [1], bias [out]; layer: for its geometry alone."""

    def linear(
        self, codes: Tensor, zero: Tensor | None, scale: Tensor, rows: nn.Module, bias: Tensor | None = None
    ) -> Tensor:
        """`Σ weight (code - zero point) * scale + bias` in float."""


@runtime_checkable
class ProductDialect(Dialect, Protocol):
    """One that also multiplies two activations in integers."""

    def product(self, left: Codes, right: Codes, scale: float) -> Tensor:
        """Products of two activations' rows and columns, times `scale`, in float."""


@dataclass(frozen=True)
class Codes:
    """A quantized activation: its codes, their zero point (None: it is taken off) and scale, [1] each."""

    codes: Tensor
    zero: Tensor | None
    scale: Tensor


class Steps:
    """Stands in for the clock: one step group for the whole batch, a part of the traced graph.

    Attributes: group: int64 [1]; once: what layers share in one run of the graph, by a key of theirs.
    """

    def __init__(self, boundaries: Tensor) -> None:
        self.boundaries, self.count = boundaries, len(boundaries) + 1
        self.group = torch.zeros(1, dtype=torch.int64)
        self.once: dict[Hashable, Any] = {}

    def set(self, timestep: Tensor) -> None:
        """Write the group of a timestep, float [1]: how many boundaries are not above it. A run begins with it."""
        self.group, self.once = (timestep >= self.boundaries).sum().reshape(1), {}

    def row(self, table: Tensor, dims: int) -> Tensor:
        """The row of a table [groups], shaped [1, 1, ...] with `dims` dimensions."""
        rows = table if self.count == 1 else table[self.group]
        return rows if dims == 1 else rows.reshape(-1, *[1] * (dims - 1))


class Grid(nn.Module):
    """An activation's grid for each step group.

    Attributes: scale: float32 [groups]; zero: [groups], as the format keeps it; tops: None, or float32 [groups], the largest code
        where it depends on the step group.
    """

    scale: Tensor
    zero: Tensor
    tops: Tensor | None

    def __init__(
        self, scale: Tensor, zero_point: Tensor, top: int | Tensor, dialect: Dialect, steps: Steps, second: bool = False
    ) -> None:
        """Args: zero_point: float [groups], of unsigned codes; top: float [groups] where it depends on the step group; second: of
        the right operand of a product."""
        super().__init__()
        self.dialect, self.steps = dialect, (steps,)
        self.top = None if isinstance(top, Tensor) else top
        self.register_buffer("scale", scale.clone())
        self.register_buffer("zero", dialect.zeros(zero_point, second))
        self.register_buffer("tops", top if isinstance(top, Tensor) else None)

    @classmethod
    def of(cls, quantizer: AffineQuantizer, dialect: Dialect, steps: Steps, second: bool = False) -> Self:
        """That of a quantizer."""
        zero_point = (quantizer.zero_point - quantizer.limits[0]).float()
        top = quantizer.top.float() if isinstance(quantizer, MixedQuantizer) else quantizer.high - quantizer.low
        return cls(quantizer.scale, zero_point, top, dialect, steps, second)

    def forward(self, x: Tensor, axis: int, equalizer: Tensor | None = None) -> Codes:
        """The codes of x; equalizer: float [1] or [channels along axis], multiplies the scale."""
        scale, zero = (self.steps[0].row(table, 1) for table in (self.scale, self.zero))
        top = cast(int, self.top) if self.tops is None else self.steps[0].row(self.tops, 1)
        divisor = scale if equalizer is None else scale * equalizer
        return Codes(*self.dialect.quantize(x, divisor, zero, top, axis), scale)


class StandIn(Moded, nn.Module):
    """What all kinds of layer share.

    Attributes: equalizer: None if it is 1 everywhere, or float32 [in]; rows: the weight in the dialect's form; bias: float32 [out].
    """

    equalizer: Tensor | None
    bias: Tensor

    def __init__(self, layer: QuantizedWeight, dialect: Dialect) -> None:
        super().__init__()
        quantizer, bias, r = layer.input_quantizer, layer.quantized_bias(), layer.equalizer
        self.dialect, self.top = dialect, quantizer.high - quantizer.low
        self.rows = dialect.rows(layer, self.top)
        self.register_buffer("equalizer", None if bool((r == 1).all()) else r.clone())
        self.register_buffer(
            "bias", torch.zeros_like(layer.weight_quantizer.scale) if bias is None else bias.detach().float()
        )


class ConvStandIn(StandIn):
    """A quantized convolution in one group."""

    def __init__(self, layer: QuantizedConv2d, dialect: Dialect, steps: Steps) -> None:
        super().__init__(layer, dialect)
        self.grid, self.steps = Grid.of(cast(AffineQuantizer, layer.input_quantizer), dialect, steps), (steps,)
        self.in_channels = layer.in_channels
        self.like = (layer,)  # for its geometry; a tuple keeps its tensors out of this module

    def forward(self, x: Tensor) -> Tensor:
        """Convolve `x`, float [batch, in, height, width]."""
        given: Codes = self.grid(x, 1, self.equalizer)
        return self.dialect.conv(
            given.codes, given.zero, given.scale, self.rows, self.like[0], self.bias, self.steps[0]
        )


class LinearStandIn(StandIn):
    """A quantized linear layer."""

    def __init__(self, layer: QuantizedLinear, dialect: Dialect, steps: Steps) -> None:
        super().__init__(layer, dialect)
        self.grid = Grid.of(cast(AffineQuantizer, layer.input_quantizer), dialect, steps)
        self.in_features = layer.in_features

    def forward(self, x: Tensor) -> Tensor:
        """Multiply `x`, float [..., in]."""
        given: Codes = self.grid(x, x.dim() - 1, self.equalizer)
        return self.dialect.linear(given.codes, given.zero, given.scale, self.rows, self.bias)
