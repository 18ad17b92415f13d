"""Compiled 3x3 convolutions of narrow numbers by Winograd's minimal filtering, from tensors to tensors."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from tcaq.integer.backend import Weights
from tcaq.integer.native.compiler import CompilerError, trusted

SOURCE = Path(__file__).with_name("winograd.c")
BLOCK = 32
"""Output channels that are multiplied at once."""
FOUR = 4
"""Bytes that are."""
LARGEST = 127 // 9
"""Of a weight: a transformed one is a sum of up to nine, in a signed byte."""
HIGHEST = 255 // 4
"""Of a code: transformed ones lie within four times as much, in a byte."""


class _Image(ctypes.Structure):
    _fields_ = tuple((name, c_int64) for name in ("images", "height", "width", "channels"))


class _Weights(ctypes.Structure):
    _fields_ = (*((name, c_void_p) for name in ("codes", "sums", "scale", "bias")), ("out", c_int64))


class WinogradWeights:
    """Weights of a 3x3 convolution as `winograd.c` reads them."""

    def __init__(self, weights: Weights) -> None:
        """Args: weights: codes int8 [out, in, 3, 3], none beyond `LARGEST`, without a rest."""
        codes = weights.codes
        self._out, channels = codes.shape[:2]
        more = -self._out % BLOCK
        padded = pad(codes, (0, 0, 0, 0, 0, -channels % FOUR, 0, more))
        blocks = padded.reshape(-1, BLOCK, padded.shape[1] // FOUR, FOUR, codes[0, 0].numel())
        self._codes = blocks.permute(0, 4, 2, 1, 3).contiguous()
        self._sums = _transformed(padded.sum(1)).unflatten(0, (-1, BLOCK)).mT.contiguous()
        self._scale = pad(weights.scale.float(), (0, more))
        self._bias = torch.zeros_like(self._scale) if weights.bias is None else pad(weights.bias.float(), (0, more))

    def fields(self) -> _Weights:
        """As C takes them; to be held no longer than this object."""
        parts = self._codes, self._sums, self._scale, self._bias
        return _Weights(*(part.data_ptr() for part in parts), self._out)


def _transformed(kernels: Tensor) -> Tensor:
    """`2G g (2G)'` of whole numbers g [..., 3, 3], int32 [..., 16]."""
    g = torch.tensor([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]])
    return (g @ kernels.long() @ g.T).flatten(-2).int()


class NativeWinograd:
    """3x3 convolutions of codes in compiled C, summed exactly.

    Attributes: helps: whether the compiler knows of no better instructions here.
    """

    def __init__(self, library: Path) -> None:
        """Args: library: what `compiled` made of SOURCE. Raises: CompilerError where the processor lacks the instructions."""
        functions = ctypes.CDLL(str(library))
        if not functions.exists():
            raise CompilerError("this processor has no AVX-512 VNNI")
        self.helps = bool(functions.helps())
        self._space: Any = functions.space_of
        self._space.argtypes, self._space.restype = (_Image, c_int32), c_int64
        self._convolve: Any = functions.convolve
        self._convolve.restype = None
        self._convolve.argtypes = (
            c_void_p, _Image, _Weights, c_float, c_int32, c_int32, c_void_p, c_void_p, c_int32,
        )  # fmt: skip

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied with a model, or sent to another process: what is compiled there."""
        return native_winograd, ()

    def convolve(self, codes: Tensor, packed: WinogradWeights, scale: float, zero_point: int, top: int) -> Tensor:
        """Sums of `(code - zero_point) * weight` over windows, one pixel around the image, times both scales, plus the bias.

        Args: codes: uint8 [batch, in, height, width], 0 to top, which is at most `HIGHEST`; scale: of the codes.
        Returns: float32 [batch, out, height, width], channels last.
        """
        rows = codes.permute(0, 2, 3, 1).contiguous()
        images, height, width, channels = rows.shape
        image, weights, threads = _Image(images, height, width, channels), packed.fields(), torch.get_num_threads()
        out = torch.empty(images, height, width, weights.out)
        space = torch.empty(self._space(image, threads), dtype=torch.uint8)
        overwritten = space.data_ptr(), out.data_ptr()
        self._convolve(rows.data_ptr(), image, weights, scale, int(zero_point), top, *overwritten, threads)
        return out.permute(0, 3, 1, 2)


@cache
def native_winograd() -> NativeWinograd:
    """Compiled if it was not before, and tried once. Raises: CompilerError, see `trusted`, or where instructions are missing."""
    return trusted(SOURCE, NativeWinograd, _is_right)


@torch.no_grad()
def _is_right(winograd: NativeWinograd) -> bool:
    """Whether sums of the largest numbers are exact, on small images whose sides and channels fill nothing."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, HIGHEST + 1, (2, 70, 7, 5), generator=generator, dtype=torch.uint8)
    codes[0] = HIGHEST
    weight = torch.randint(-LARGEST, LARGEST + 1, (41, 70, 3, 3), generator=generator, dtype=torch.int8)
    weight[0], weight[1] = LARGEST, -LARGEST
    packed = WinogradWeights(Weights(weight, torch.ones(len(weight))))
    found = winograd.convolve(codes, packed, 1.0, 9, HIGHEST)
    return torch.equal(found.double(), conv2d(codes.double() - 9, weight.double(), padding=1))
