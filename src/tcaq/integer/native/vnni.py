"""Compiled products of our own for processors with AVX-512 VNNI, from tensors to tensors."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from tcaq.integer.backend import Weights
from tcaq.integer.native.compiler import CompilerError, trusted
from tcaq.integer.native.winograd import FOUR, HIGHEST, NativeWinograd
from tcaq.integer.native.winograd_wide import NativeWideWinograd

SOURCE = Path(__file__).with_name("vnni.c")
BLOCK = 32
"""Output channels that are multiplied at once."""
TILES = 12
"""Rows that are."""


class _Matrix(ctypes.Structure):
    _fields_ = (*((name, c_void_p) for name in ("codes", "sums", "rest", "scale", "bias")), ("out", c_int64))


class PackedWeights:
    """Weights of a matrix product as `vnni.c` reads them.

    Attributes: out, channels: how many; lacking: whether they have a rest.
    """

    def __init__(self, weights: Weights) -> None:
        """Args: weights: codes int8 [out, in]."""
        codes, rest = weights.codes, weights.rest
        self.out, self.channels = codes.shape
        more = -self.out % BLOCK
        padded = pad(codes, (0, -self.channels % FOUR, 0, more))
        self._codes = padded.reshape(-1, BLOCK, padded.shape[1] // FOUR, FOUR).transpose(1, 2).contiguous()
        self._sums = padded.sum(1, dtype=torch.int32)
        self.lacking = rest is not None
        self._rest = torch.zeros_like(self._sums) if rest is None else pad(rest.int(), (0, more))
        self._scale = pad(weights.scale.float(), (0, more))
        self._none = torch.zeros_like(self._scale)
        self._bias = self._none if weights.bias is None else pad(weights.bias.float(), (0, more))

    def fields(self, biased: bool) -> _Matrix:
        """As C takes them; to be held no longer than this object."""
        parts = self._codes, self._sums, self._rest, self._scale, self._bias if biased else self._none
        return _Matrix(*[part.data_ptr() for part in parts], self.out)


class NativeVnni:
    """Matrix products and 3x3 convolutions of codes in compiled C, summed exactly.

    Attributes: helps: whether the compiler knows of no better instructions here; winograd, wide: convolutions of narrow and of
        other numbers.
    """

    def __init__(self, library: Path) -> None:
        """Args: library: what `compiled` made of SOURCE. Raises: CompilerError where the processor lacks the instructions."""
        functions = ctypes.CDLL(str(library))
        if not functions.exists():
            raise CompilerError("this processor has no AVX-512 VNNI")
        self.helps = bool(functions.helps())
        self.winograd, self.wide = NativeWinograd(functions), NativeWideWinograd(functions)
        self._multiply: Any = functions.multiply_rows
        self._multiply.restype = None
        self._multiply.argtypes = (
            c_void_p, c_int64, c_int64, _Matrix, c_float, c_int32, c_void_p, c_void_p, c_int32,
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


@cache
def native_vnni() -> NativeVnni:
    """Compiled if it was not before, and tried once. Raises: CompilerError, see `trusted`, or where instructions are missing."""
    return trusted(SOURCE, NativeVnni, _is_right)


@torch.no_grad()
def _is_right(vnni: NativeVnni) -> bool:
    """Whether sums of the largest numbers are exact, of matrices that fill no block."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 256, (14, 70), generator=generator, dtype=torch.uint8)
    matrix = torch.randint(-128, 128, (41, 70), generator=generator, dtype=torch.int8)
    rows[0], matrix[0], matrix[1], rest = 255, 127, -128, torch.arange(41, dtype=torch.int32)
    packed = PackedWeights(Weights(matrix, torch.ones(41), rest=rest))
    products = vnni.multiply(rows, rows.sum(1, dtype=torch.int32), packed, 1.0, 9)
    whole = matrix.double() + rest.double()[:, None]
    if not torch.equal(products.double(), (rows.double() - 9) @ whole.T):
        return False
    return vnni.winograd.is_right(BLOCK, HIGHEST) and vnni.wide.is_right(BLOCK)
