"""Layers that quantize their input to codes and hand it to an integer kernel."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from tcaq.errors import CheckpointError
from tcaq.integer.backend import FusingKernel, InputGrid, Kernel
from tcaq.integer.normed import NormedSilu
from tcaq.integer.steps import by_group, step_rows
from tcaq.layers.conv import QuantizedConv2d
from tcaq.layers.linear import QuantizedLinear
from tcaq.layers.modes import Mode, Moded
from tcaq.layers.weighted import QuantizedWeight
from tcaq.numerics.integers import SignedCodes
from tcaq.quantizers.affine import AffineQuantizer
from tcaq.quantizers.clock import StepClock


class IntegerLayer(Moded, nn.Module):
    """What integer convolutions and linear layers share.

    They compute `Σ (w - w_zero)(q - q_zero)` in whole numbers and scale the sum: what the fake layer computes in float, within
    the rounding of float. TCR's r divides the input as it is quantized and has no other part in it, since it cancels against
    the weight's.

    Attributes: equalizer: float32 [in channels]; rest: None, or float32 [out], what the sum of a channel's inputs is worth where
        the kernel does not add it;
        fingerprint: uint8 [32], SHA-256 of weight and bias, which only the kernel holds, so that the module's state still tells
        two models apart.
    """

    equalizer: Tensor
    rest: Tensor | None
    fingerprint: Tensor

    CHANNEL_AXIS = -1
    """Of the output."""

    def __init__(self, layer: QuantizedWeight, codes: SignedCodes, kernel: Kernel, adds_rest: bool) -> None:
        """Args: adds_rest: whether the kernel adds what `codes` have beside their planes."""
        super().__init__()
        self._kernel = kernel
        self._fusing = cast(FusingKernel, kernel) if hasattr(kernel, "fuses") else None
        quantizer, weight = layer.input_quantizer, layer.weight_quantizer
        self.top = quantizer.high - quantizer.low
        self.planes = len(codes.planes)
        self.groups = layer.groups
        self._device = layer.equalizer.device
        self.register_buffer("equalizer", layer.equalizer.clone())
        self.register_buffer("rest", codes.rest * weight.scale if codes.has_rest and not adds_rest else None)
        self.register_buffer("fingerprint", _fingerprint(codes.whole(), weight.scale, layer.quantized_bias()))

    @property
    def is_plain(self) -> bool:
        """Whether the kernel's products are the layer's, with nothing to add up."""
        return self.planes == 1 and self.rest is None

    def check(self, x: Tensor) -> None:
        """Raises: CheckpointError in float mode, for which the weight is not there any more, or for an input on another device
        than the kernel, which stays where it was packed when the module moves.
        """
        if x.device != self._device:
            raise CheckpointError(
                f"this layer was lowered for {self._device}, its input is on {x.device}; lower after moving"
            )
        if self.mode is not Mode.FAKE:
            raise CheckpointError(
                "this layer runs in integers and keeps no float weight; load the model again for other modes"
            )

    def _multiply(self, x: Tensor, grid: InputGrid) -> Tensor:
        """The kernel's products, their parts added up; x float [batch, in, height, width] or [..., in]."""
        if self.is_plain:
            return self._kernel(x, grid, x.dtype)
        return self._sum(self._kernel(x, grid, torch.float32)).to(x.dtype)

    def _sum(self, products: Tensor) -> Tensor:
        """Add the planes, and what `rest` makes of the summing channel; see `stacked` for how they lie."""
        axis = self.CHANNEL_AXIS % products.dim()
        parts = products.unflatten(axis, (self.groups, -1))
        own = (parts.shape[axis + 1] - (self.rest is not None)) // self.planes
        total = parts.narrow(axis + 1, 0, own)
        for plane in range(1, self.planes):
            total = total + parts.narrow(axis + 1, plane * own, own)
        if self.rest is not None:
            rest = self.rest.reshape(self.groups, own, *[1] * (parts.dim() - axis - 2))
            total = torch.addcmul(total, parts.narrow(axis + 1, self.planes * own, 1), rest)
        result: Tensor = total.flatten(axis, axis + 1)
        return result


class SteppedLayer(IntegerLayer):
    """An integer layer whose input has a grid for each step group.

    Attributes: scale: float32 [groups]; zero_point: int16 [groups], among unsigned codes.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, layer: QuantizedWeight, codes: SignedCodes, kernel: Kernel, adds_rest: bool) -> None:
        super().__init__(layer, codes, kernel, adds_rest)
        quantizer = cast(AffineQuantizer, layer.input_quantizer)
        self._clock = (quantizer.clock,)
        low, high = quantizer.limits
        self.register_buffer("scale", quantizer.scale.clone())
        self.register_buffer("zero_point", quantizer.zero_point - low)
        self._scales, self._zero_points = self.scale.tolist(), self.zero_point.tolist()
        # a row of fewer bits clips the same bytes closer
        self._tops: list[int] = torch.as_tensor(high - low).expand(self.clock.count).tolist()

    @property
    def clock(self) -> StepClock:
        """The denoiser's clock."""
        return self._clock[0]

    def forward(self, x: Tensor, owned: bool = False, before: NormedSilu | None = None) -> Tensor:
        """Multiply `x`, float [batch, ...], or what `before` makes of it.

        Args: owned: whether x may be overwritten, since it is needed nowhere else.
        Raises: CheckpointError in float mode or on another device.
        """
        self.check(x)
        rows = step_rows(self.clock)
        if before is not None and not (len(set(rows)) == 1 and self._fuses(x)):
            x, owned, before = before(x, owned), True, None
        return by_group(rows, lambda x, group: self._run(x, group, owned, before), x)

    def _fuses(self, x: Tensor) -> bool:
        """Whether the kernel does what comes before the quantization of x."""
        return self._fusing is not None and self._fusing.fuses(x)

    def _run(self, x: Tensor, group: int, owned: bool, before: NormedSilu | None) -> Tensor:
        """The layer on samples that are all in one step group."""
        scale, zero_point, top = self._scales[group], self._zero_points[group], self._tops[group]
        return self._multiply(x, InputGrid(scale, zero_point, self.equalizer, top, owned, before))


class IntegerConv2d(SteppedLayer):
    """Stands in for a QuantizedConv2d; see SteppedLayer."""

    CHANNEL_AXIS = 1

    def __init__(
        self, layer: QuantizedConv2d, codes: SignedCodes, kernel: Kernel, adds_rest: bool, padded: Sequence[int]
    ) -> None:
        super().__init__(layer, codes, kernel, adds_rest)
        self.in_channels, self.out_channels = layer.in_channels, layer.out_channels
        self._padded = list(padded)
        self._padding_mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode

    def _fuses(self, x: Tensor) -> bool:
        return not any(self._padded) and super()._fuses(x)

    def _run(self, x: Tensor, group: int, owned: bool, before: NormedSilu | None) -> Tensor:
        if any(self._padded):
            x, owned = pad(x, self._padded, mode=self._padding_mode), True
        return super()._run(x, group, owned, before)


class IntegerLinear(SteppedLayer):
    """Stands in for a QuantizedLinear; see SteppedLayer."""

    def __init__(self, layer: QuantizedLinear, codes: SignedCodes, kernel: Kernel, adds_rest: bool) -> None:
        super().__init__(layer, codes, kernel, adds_rest)
        self.in_features, self.out_features = layer.in_features, layer.out_features


def _fingerprint(*tensors: Tensor | None) -> Tensor:
    digest = sha256()
    for tensor in tensors:
        digest.update(b"none" if tensor is None else tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)
