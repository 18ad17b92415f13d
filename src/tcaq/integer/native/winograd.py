"""Compiled 3x3 convolutions of narrow numbers in Winograd's form, from tensors to tensors, by C that includes `winograd.h`."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from tcaq.integer.backend import Geometry, Span, Weights

FOUR = 4
"""Bytes that are multiplied at once."""
KERNEL = 9
"""Weights that a transformed one is the sum of, at most."""
LARGEST = 127 // KERNEL
"""Of a weight: a transformed one is a signed byte."""
HIGHEST = 255 // 4
"""Of a code: transformed ones lie within four times as much, in a byte."""
FEWEST = 32
"""Channels on either side, below which vectors are too empty."""
SAME = Geometry(padding=(1, 1))


def misshapen(shape: tuple[int, ...], geometry: Geometry, fewest: int = FEWEST) -> str | None:
    """Why a weight of this shape, whatever its numbers are, is better convolved another way; None if it is not."""
    if shape[2:] != (3, 3) or geometry != SAME:
        return "Winograd's form is for 3x3 convolutions that keep the size of an image"
    if min(shape[:2]) < fewest:
        return f"Winograd's form pays from {fewest} channels on"
    return None


def unsuited(shape: tuple[int, ...], geometry: Geometry, span: Span) -> str | None:
    """The same for numbers whose transformed ones are to fit bytes."""
    if problem := misshapen(shape, geometry):
        return problem
    if max(-span.low, span.high) > LARGEST or span.top > HIGHEST:
        return f"transformed weights {span.low} to {span.high} or codes 0 to {span.top} do not fit bytes"
    return None


def pairs(largest: int, top: int) -> int:
    """How many sums of two products of transformed weights up to a size with transformed codes 0 to `top` fit 16 bits."""
    return (2**15 - 1) // max(2 * FOUR * top * largest, 1)


class Image(ctypes.Structure):
    """A batch of codes, channels last, as C takes it."""

    _fields_ = tuple((name, c_int64) for name in ("images", "height", "width", "channels"))


class _Kernels(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("codes", "sums", "scale", "bias")),
        *((name, c_int64) for name in ("out", "most")),
    )


class WinogradWeights:
    """Weights of a 3x3 convolution as `winograd.h` reads them.

    Attributes: out: channels; largest: of the transformed weights.
    """

    def __init__(self, weights: Weights, block: int) -> None:
        """Args: weights: codes int8 [out, in, 3, 3], none beyond `LARGEST`, without a rest; block: OUT of the C file."""
        codes = weights.codes
        self.out, channels = codes.shape[:2]
        more = -self.out % block
        padded = pad(codes, (0, 0, 0, 0, 0, -channels % FOUR, 0, more))
        blocks = padded.reshape(-1, block, padded.shape[1] // FOUR, FOUR, codes[0, 0].numel())
        self._codes = blocks.permute(0, 2, 4, 1, 3).contiguous()
        self._sums = transformed(padded.sum(1)).unflatten(0, (-1, block)).mT.contiguous()
        self.largest = max(int(transformed(part).abs().max()) for part in codes.split(block))
        self._scale = pad(weights.scale.float(), (0, more))
        self._bias = torch.zeros_like(self._scale) if weights.bias is None else pad(weights.bias.float(), (0, more))

    def fields(self, top: int) -> _Kernels:
        """As C takes them, for codes 0 to `top`; to be held no longer than this object."""
        parts = self._codes, self._sums, self._scale, self._bias
        return _Kernels(*[part.data_ptr() for part in parts], self.out, max(pairs(self.largest, top), 1))


def transformed(kernels: Tensor) -> Tensor:
    """`2G g (2G)'` of whole numbers g [..., 3, 3], int32 [..., 16]."""
    for axis in (-2, -1):
        a, b, c = kernels.to(torch.int32).unbind(axis)
        kernels = torch.stack((2 * a, a + b + c, a - b + c, 2 * c), axis)
    return kernels.flatten(-2)


class NativeWinograd:
    """3x3 convolutions of codes in compiled C, summed exactly."""

    def __init__(self, functions: ctypes.CDLL) -> None:
        """Args: functions: of a C file that includes `winograd.h`."""
        self._space: Any = functions.space_of
        self._space.argtypes, self._space.restype = (Image, c_int32), c_int64
        self._convolve: Any = functions.convolve_tiles
        self._convolve.restype = None
        self._convolve.argtypes = (
            c_void_p, Image, _Kernels, c_float, c_int32, c_int32, c_void_p, c_void_p, c_int32,
        )  # fmt: skip

    def convolve(self, codes: Tensor, packed: WinogradWeights, scale: float, zero_point: int, top: int) -> Tensor:
        """Sums of `(code - zero_point) * weight` over windows, one pixel around the image, times both scales, plus the bias.

        Args: codes: uint8 [batch, in, height, width], 0 to top, which is at most `HIGHEST`; scale: of the codes.
        Returns: float32 [batch, out, height, width], channels last.
        """
        rows = codes.permute(0, 2, 3, 1).contiguous()
        image, threads = Image(*rows.shape), torch.get_num_threads()
        out = torch.empty(*rows.shape[:3], packed.out)
        space = torch.empty(self._space(image, threads), dtype=torch.uint8)
        overwritten = space.data_ptr(), out.data_ptr()
        self._convolve(rows.data_ptr(), image, packed.fields(top), scale, int(zero_point), top, *overwritten, threads)
        return out.permute(0, 3, 1, 2)

    def is_right(self, block: int, top: int) -> bool:
        """Whether sums of large numbers are exact, on small images whose sides and channels fill nothing.

        Args: block: OUT of the C file; top: the largest code that it is for.
        """
        generator = torch.Generator().manual_seed(0)
        codes = torch.randint(0, top + 1, (2, 70, 7, 5), generator=generator, dtype=torch.uint8)
        weight = torch.randint(-LARGEST, LARGEST + 1, (41, 70, 3, 3), generator=generator, dtype=torch.int8)
        codes[0], weight[0], weight[1] = top, LARGEST, -LARGEST
        packed = WinogradWeights(Weights(weight, torch.ones(len(weight))), block)
        found = self.convolve(codes, packed, 1.0, 9, top)
        return torch.equal(found.double(), conv2d(codes.double() - 9, weight.double(), padding=1))
