"""Compiled 3x3 convolutions of numbers of up to nine bits in Winograd's form, by C that includes `winograd_wide.h`."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from tcaq.integer.backend import Weights
from tcaq.integer.native.winograd import FOUR, KERNEL, Image

TWO = 2
"""Numbers of 16 bits that are multiplied at once."""
BELOW = 2**25
"""Sums of a chunk of channels are exact as long as none is larger."""
WIDEST = 255
"""Of a weight or a code, less what it is counted from: transformed ones fit 16 bits."""


class _Kernels(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("codes", "rest", "scale", "bias")),
        *((name, c_int64) for name in ("out", "chunks", "deep")),
    )


def chunks_of(reach: Tensor) -> int:
    """Of how many chunks of channels sums must be made for those of each to stay below `BELOW`, whatever codes and zero points are.

    A code and its zero point are both 0 to `WIDEST`: one less the other pulls weights of one sign up by no more than that, and
    those of the other sign down, or the other way round.

    Args: reach: int32 [sides, out, in], of the positive weights of each kernel their sum, and of the negative ones; in whole fours.
    """
    channels, count = reach.shape[2], 1
    while any(int(part.sum(2).max()) * WIDEST >= BELOW for part in reach.split(deep_of(channels, count), 2)):
        count += 1
    return -(-channels // deep_of(channels, count))


def deep_of(channels: int, chunks: int) -> int:
    """Channels of a chunk, whole fours. Args: channels: whole fours; chunks: how many there may be."""
    return -(-channels // (FOUR * chunks)) * FOUR


def _reach(codes: Tensor, rest: Tensor) -> Tensor:
    whole = codes.to(torch.int32) + rest.to(torch.int32).reshape(-1, 1, 1, 1)
    return torch.stack([side.clamp(min=0).sum((2, 3), dtype=torch.int32) for side in (whole, -whole)])


class WideWeights:
    """Weights of a 3x3 convolution as `winograd_wide.h` reads them.

    Attributes: out: channels; chunks: of input channels, of which sums are made.
    """

    def __init__(self, weights: Weights, block: int) -> None:
        """Args: weights: codes int8 [out, in, 3, 3], with or without a rest; block: OUT of the C file."""
        self.out, channels = weights.codes.shape[:2]
        more, few = -self.out % block, -channels % FOUR
        rest = torch.zeros(self.out, dtype=torch.int16) if weights.rest is None else weights.rest.to(torch.int16)
        parts = zip(weights.codes.split(block), rest.split(block), strict=True)  # all at once would take much memory
        self.chunks = chunks_of(pad(torch.cat([_reach(*part) for part in parts], 1), (0, few)))
        self._deep = deep_of(channels + few, self.chunks)
        padded = pad(weights.codes, (0, 0, 0, 0, 0, few, 0, more)) if more or few else weights.codes
        blocks = padded.reshape(-1, block, padded.shape[1] // TWO, TWO, KERNEL)
        self._codes = blocks.permute(0, 2, 4, 1, 3).contiguous()
        self._rest = pad(rest, (0, more)).repeat_interleave(TWO)
        self._scale = pad(weights.scale.float(), (0, more))
        self._bias = torch.zeros_like(self._scale) if weights.bias is None else pad(weights.bias.float(), (0, more))

    def fields(self) -> _Kernels:
        """As C takes them; to be held no longer than this object."""
        parts = self._codes, self._rest, self._scale, self._bias
        return _Kernels(*[part.data_ptr() for part in parts], self.out, self.chunks, self._deep)


class NativeWideWinograd:
    """3x3 convolutions of codes in compiled C, summed exactly."""

    def __init__(self, functions: ctypes.CDLL) -> None:
        """Args: functions: of a C file that includes `winograd_wide.h`."""
        self._space: Any = functions.wide_space_of
        self._space.argtypes, self._space.restype = (Image, c_int64, c_int32), c_int64
        self._convolve: Any = functions.convolve_wide_tiles
        self._convolve.restype = None
        self._convolve.argtypes = (c_void_p, Image, _Kernels, c_float, c_int32, c_void_p, c_void_p, c_int32)

    def convolve(self, codes: Tensor, packed: WideWeights, scale: float, zero_point: int) -> Tensor:
        """Sums of `(code - zero_point) * (weight + rest)` over windows, one pixel around the image, scaled by both, plus the bias.

        Args: codes: uint8 [batch, in, height, width]; scale: of the codes.
        Returns: float32 [batch, out, height, width], channels last.
        """
        rows = codes.permute(0, 2, 3, 1).contiguous()
        image, threads = Image(*rows.shape), torch.get_num_threads()
        out = torch.empty(*rows.shape[:3], packed.out)
        space = torch.empty(self._space(image, packed.chunks, threads), dtype=torch.uint8)
        overwritten = space.data_ptr(), out.data_ptr()
        self._convolve(rows.data_ptr(), image, packed.fields(), scale, int(zero_point), *overwritten, threads)
        return out.permute(0, 3, 1, 2)

    def is_right(self, block: int) -> bool:
        """Whether sums of large numbers are exact, on small images whose sides and channels fill nothing.

        Args: block: OUT of the C file.
        """
        generator = torch.Generator().manual_seed(0)
        codes = torch.randint(0, 256, (2, 70, 11, 7), generator=generator, dtype=torch.uint8)
        weight = torch.randint(-128, 128, (41, 70, 3, 3), generator=generator, dtype=torch.int8)
        codes[0], weight[0], weight[1], rest = 255, 127, -128, 120 - 6 * torch.arange(41, dtype=torch.int32)
        packed = WideWeights(Weights(weight, torch.ones(41), rest=rest), block)
        whole = weight.double() + rest.double().reshape(-1, 1, 1, 1)
        exact = conv2d(codes.double() - 9, whole, padding=1)
        # float32 holds each sum, and rounds it once
        return torch.equal(self.convolve(codes, packed, 1.0, 9), exact.float())
