"""What a device must offer so that layers can run on its integer units."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tcaq.integer.normed import NormedSilu
from tcaq.numerics.bytes import byte_codes, signed_bytes
from tcaq.numerics.log2 import fake_quantize_log2


@dataclass(frozen=True)
class InputGrid:
    """How inputs become codes, `clamp(round(x / (scale * equalizer)) + zero_point, 0, top)`.

    Attributes: scale, zero_point: numbers, or float32 [..., 1] with a row for each token of a linear layer's input; equalizer:
        float32 [in channels], TCR's r; top: the largest code; owned: whether inputs may be overwritten on the way, since nobody
        else needs them; before: what inputs go through first, for kernels that fuse it, or None.
    """

    scale: float | Tensor
    zero_point: int | Tensor
    equalizer: Tensor
    top: int
    owned: bool = False
    before: NormedSilu | None = None

    def codes(self, x: Tensor, axis: int) -> Tensor:
        """Codes of x, uint8; the division is the fake quantizer's, so that the codes are, too.

        Args: axis: along which x has its channels.
        """
        owned = self.owned
        if self.before is not None:
            x, owned = self.before(x, owned), True
        divisor = self.scale * self.equalizer.reshape(-1, *[1] * (x.dim() - 1 - axis % x.dim()))
        units = x.div_(divisor) if owned and x.dtype == divisor.dtype else x / divisor
        return byte_codes(units, self.zero_point, self.top)


Kernel = Callable[[Tensor, InputGrid, torch.dtype], Tensor]
"""A float input [batch, in, height, width] or [..., in], its grid, and the dtype to put out -> the layer's output."""


class FusingKernel(Protocol):
    """A Kernel that does what comes before the quantization of some inputs in one with it."""

    def __call__(self, x: Tensor, grid: InputGrid, dtype: torch.dtype) -> Tensor:
        """See Kernel."""

    def fuses(self, x: Tensor) -> bool:
        """Whether x is such an input."""


Product = Callable[[Tensor, Tensor, Tensor | None, Tensor | None, float], Tensor]
"""Signed bytes a int8 [n, rows, inner] and b int8 [n, inner, columns], what to add to the sums of each row and column, int32 [n,
rows, 1] and [n, 1, columns] or None, and the scale of all sums -> `(a @ b + row + column) * scale`, float32 [n, rows, columns]."""

SignedEncoder = Callable[[Tensor, float, int, int, int], Tensor]
"""x, float [...], its scale, zero point, and the lowest and highest code, all within a signed byte -> `clamp(round(x / scale) +
zero_point, low, high)`, int8 in the memory format of x."""

FakeLog2 = Callable[[Tensor, float, int, int], Tensor]
"""Probabilities, float [...], the largest value of a log2 grid, its bits and codes per octave -> what they are on it, float32."""

FloatProduct = Callable[[Tensor, Tensor], Tensor]
"""Float32 matrices [n, rows, inner] and [n, inner, columns] -> [n, rows, columns]."""


def signed_codes(x: Tensor, scale: float, zero_point: int, low: int, high: int) -> Tensor:
    """A SignedEncoder of PyTorch's operations."""
    return signed_bytes(x.float() / scale, zero_point, low, high)


def eager_log2(p: Tensor, peak: float, bits: int, per_octave: int) -> Tensor:
    """A FakeLog2 of PyTorch's operations."""
    return fake_quantize_log2(p.float(), torch.tensor(peak, device=p.device), bits, per_octave)


def softmax_signed_codes(scores: Tensor, scale: float, zero_point: int, low: int, high: int) -> Tensor:
    """A SignedEncoder of what the softmax of scores is, over the last axis."""
    return signed_codes(torch.softmax(scores, dim=-1), scale, zero_point, low, high)


def eager_softmax_log2(scores: Tensor, peak: float, bits: int, per_octave: int) -> Tensor:
    """A FakeLog2 of the same."""
    return eager_log2(torch.softmax(scores, dim=-1), peak, bits, per_octave)


@dataclass(frozen=True)
class Geometry:
    """How a convolution slides: each [height, width] but `groups`; padding with zeros, on both sides alike."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def arguments(self) -> tuple[list[int], list[int], list[int], int]:
        """In the order in which ops take them."""
        return list(self.stride), list(self.padding), list(self.dilation), self.groups


@dataclass(frozen=True)
class Weights:
    """What one kernel multiplies with.

    Attributes: codes: int8 [out, ...]; scale: float32 [out]; bias: float32 [out] or None; rest: int32 [out] or None, a number to
        be added to each code of a channel, whose sum no byte would hold.
    """

    codes: Tensor
    scale: Tensor
    bias: Tensor | None = None
    rest: Tensor | None = None


@dataclass(frozen=True)
class Span:
    """The numbers that meet in a layer: weights in [low, high], codes of inputs in [0, top]."""

    low: int
    high: int
    top: int


@dataclass(frozen=True)
class Backend:
    """Integer kernels of a kind of device.

    Attributes: missing: why nothing can run there, or None; conv, linear: build a kernel; conv_problem, linear_problem: why a
        weight of a shape cannot run exactly with such numbers, or None; adds_rest: whether kernels take weights with a rest;
        product, product_problem: the same for matrices that are both activations, of any shape; float_product: of floats;
        signed: makes codes of activations for `product`; fake_log2: quantizes probabilities for `float_product`;
        softmax_signed, softmax_log2: the same of what the softmax of scores is, which the latter may overwrite; compiled: whether
        it needs a C compiler; helps: whether this device gains by it where another backend runs, too.
    """

    missing: Callable[[], str | None]
    conv: Callable[[Weights, Geometry], Kernel]
    linear: Callable[[Weights], Kernel]
    conv_problem: Callable[[tuple[int, ...], Geometry, Span], str | None]
    linear_problem: Callable[[tuple[int, ...], Span], str | None]
    adds_rest: bool = False
    product: Product | None = None
    product_problem: Callable[[], str | None] = lambda: "products of two activations have no integer kernel"
    float_product: FloatProduct = torch.bmm
    signed: SignedEncoder = signed_codes
    fake_log2: FakeLog2 = eager_log2
    softmax_signed: SignedEncoder = softmax_signed_codes
    softmax_log2: FakeLog2 = eager_softmax_log2
    compiled: bool = False
    helps: Callable[[], bool] = lambda: True
