"""Compiled products of our own for processors with AVX-512 VNNI, from tensors to tensors."""

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

SOURCE = Path(__file__).with_name("vnni.c")
BLOCK = 32
"""Output channels that are multiplied at once."""
TILES = 12
"""Rows that are, and fours of bytes:"""
FOUR = 4
LARGEST = 127 // 9
"""Of a weight in Winograd's form: a transformed one is a sum of up to nine, in a signed byte."""
HIGHEST = 255 // 4
"""Of a code in it: transformed ones lie within four times as much, in a byte."""


class _Image(ctypes.Structure):
    _fields_ = tuple((name, c_int64) for name in ("images", "height", "width", "channels"))


class _Weights(ctypes.Structure):
    _fields_ = (*((name, c_void_p) for name in ("codes", "sums", "rest", "scale", "bias")), ("out", c_int64))


class PackedWeights:
    """Weights as `vnni.c` reads them: of matrices, or of 3x3 convolutions in Winograd's form.

    Attributes: out, channels: how many; scale: float32 [out], padded.
    """

    def __init__(self, weights: Weights) -> None:
        """Args: weights: codes int8 [out, in], or [out, in, 3, 3], none beyond `LARGEST` and without a rest."""
        codes = weights.codes
        self.out, self.channels = codes.shape[:2]
        more = -self.out % BLOCK
        padded = pad(
            codes.flatten(2) if codes.dim() == 4 else codes[:, :, None], (0, 0, 0, -self.channels % FOUR, 0, more)
        )
        blocks = padded.reshape(-1, BLOCK, padded.shape[1] // FOUR, FOUR, padded.shape[2])
        self._codes = blocks.permute(0, 4, 2, 1, 3).contiguous()
        sums = padded.sum(1)
        sums = _transformed(sums.unflatten(1, (3, 3))) if codes.dim() == 4 else sums
        self._sums = sums.int().unflatten(0, (-1, BLOCK)).mT.contiguous()
        self.lacking = weights.rest is not None
        self._rest = (
            torch.zeros(len(padded), dtype=torch.int32) if weights.rest is None else pad(weights.rest.int(), (0, more))
        )
        self._scale = pad(weights.scale.float(), (0, more))
        self._none = torch.zeros_like(self._scale)
        self._bias = self._none if weights.bias is None else pad(weights.bias.float(), (0, more))

    def fields(self, biased: bool = True) -> _Weights:
        """As C takes them; to be held no longer than this object."""
        parts = self._codes, self._sums, self._rest, self._scale, self._bias if biased else self._none
        return _Weights(*[part.data_ptr() for part in parts], self.out)


def _transformed(kernels: Tensor) -> Tensor:
    """`2G g (2G)'` of whole numbers g [..., 3, 3], int64 [..., 16]."""
    g = torch.tensor([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]])
    return (g @ kernels.long() @ g.T).flatten(-2)


class NativeVnni:
    """Matrix products and 3x3 convolutions of codes in compiled C, summed exactly.

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
        self._multiply: Any = functions.multiply_rows
        self._multiply.restype = None
        self._multiply.argtypes = (
            c_void_p, c_int64, c_int64, _Weights, c_float, c_int32, c_void_p, c_void_p, c_int32,
        )  # fmt: skip

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied with a model, or sent to another process: what is compiled there."""
        return native_vnni, ()

    def multiply(
        self,
        codes: Tensor,
        sums: Tensor | None,
        packed: PackedWeights,
        scale: float,
        zero_point: int,
        biased: bool = True,
    ) -> Tensor:
        """Sums of `(code - zero_point) * (weight + rest)` over rows, times both scales, plus the bias if it is asked for.

        Args: codes: uint8 [rows, in]; sums: int32 [rows], of codes, if weights have a rest; scale: of the codes.
        Returns: float32 [rows, out].
        """
        count, more, few = len(codes), -packed.channels % FOUR, max(TILES - len(codes), 0)
        distances = None if sums is None else sums - packed.channels * zero_point
        if more or few:
            codes = pad(codes, (0, more, 0, few))
            distances = None if distances is None else pad(distances, (0, few))
        codes, address = codes.contiguous(), None if distances is None else distances.data_ptr()
        out = torch.empty(len(codes), packed.out)
        given = codes.data_ptr(), *codes.shape, packed.fields(biased), scale, int(zero_point), address
        self._multiply(*given, out.data_ptr(), torch.get_num_threads())
        return out[:count]

    def convolve(self, codes: Tensor, packed: PackedWeights, scale: float, zero_point: int, top: int) -> Tensor:
        """Sums of `(code - zero_point) * weight` over windows, one pixel around the image, times both scales, plus the bias.

        Args: codes: uint8 [batch, in, height, width], 0 to top, which is at most `HIGHEST`; scale: of the codes.
        Returns: float32 [batch, out, height, width], channels last.
        """
        rows = codes.permute(0, 2, 3, 1).contiguous()
        image, threads = _Image(*rows.shape), torch.get_num_threads()
        out = torch.empty(*rows.shape[:3], packed.out)
        space = torch.empty(self._space(image, threads), dtype=torch.uint8)
        overwritten = space.data_ptr(), out.data_ptr()
        self._convolve(rows.data_ptr(), image, packed.fields(), scale, int(zero_point), top, *overwritten, threads)
        return out.permute(0, 3, 1, 2)


@cache
def native_vnni() -> NativeVnni:
    """Compiled if it was not before, and tried once. Raises: CompilerError, see `trusted`, or where instructions are missing."""
    return trusted(SOURCE, NativeVnni, _is_right)


@torch.no_grad()
def _is_right(vnni: NativeVnni) -> bool:
    """Whether sums of the largest numbers are exact, of matrices and small images whose sides and channels fill nothing."""
    generator = torch.Generator().manual_seed(0)

    def numbers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=generator)

    ones, rest = torch.ones(41), torch.arange(41, dtype=torch.int32)
    rows, matrix = numbers(0, 255, 14, 70).byte(), numbers(-128, 127, 41, 70).to(torch.int8)
    rows[0], matrix[0], matrix[1] = 255, 127, -128
    products = vnni.multiply(
        rows, rows.sum(1, dtype=torch.int32), PackedWeights(Weights(matrix, ones, rest=rest)), 1.0, 9
    )
    image, kernel = numbers(0, HIGHEST, 2, 70, 7, 5).byte(), numbers(-LARGEST, LARGEST, 41, 70, 3, 3).to(torch.int8)
    image[0], kernel[0], kernel[1] = HIGHEST, LARGEST, -LARGEST
    convolved = vnni.convolve(image, PackedWeights(Weights(kernel, ones)), 1.0, 9, HIGHEST)
    whole = matrix.double() + rest.double()[:, None]
    return torch.equal(products.double(), (rows.double() - 9) @ whole.T) and torch.equal(
        convolved.double(), conv2d(image.double() - 9, kernel.double(), padding=1)
    )
