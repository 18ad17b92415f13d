"""Compiled convolutions and matrix products for processors with AVX2 and without VNNI, from tensors to tensors."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from tcaq.integer.backend import Geometry, Weights
from tcaq.integer.native.compiler import CompilerError, trusted
from tcaq.integer.native.winograd import FOUR, NativeWinograd
from tcaq.integer.native.winograd_wide import NativeWideWinograd

SOURCE = Path(__file__).with_name("avx2.c")
BLOCK = 16
"""Output channels that are multiplied at once."""
NARROW = 15
"""The largest code whose transformed sums fit 16 bits twice, whatever the weights of Winograd's form are."""


class _Window(ctypes.Structure):
    _fields_ = tuple(
        (name, c_int64)
        for name in (
            *("images", "height", "width", "channels", "runs", "beside", "run", "down", "right", "top", "left"),
            *("step_down", "step_right", "rows", "columns"),
        )
    )


class _Weights(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("codes", "sums", "rest", "scale", "bias")),
        *((name, c_int64) for name in ("out", "most")),
    )


class _Matrices(ctypes.Structure):
    _fields_ = tuple((name, c_int64) for name in ("count", "rows", "inner", "columns", "down", "beside"))


class PackedWeights:
    """Weights of a convolution as `avx2.c` reads them."""

    def __init__(self, weights: Weights, geometry: Geometry) -> None:
        """Args: weights: codes int8 [out, in, height, width]; geometry: without groups."""
        codes, rest = weights.codes, weights.rest
        self._out, channels, *self._kernel = codes.shape
        self._geometry = geometry
        more = -self._out % BLOCK
        joined = geometry.dilation[1] == 1 or self._kernel[1] == 1
        self._beside = 1 if joined else self._kernel[1]
        self._runs, self.run = self._kernel[0] * self._beside, self._kernel[1] * channels // self._beside
        runs = codes.permute(0, 2, 3, 1).reshape(self._out, self._runs, self.run)
        self._codes = _in_fours(pad(runs, (0, 0, 0, 0, 0, more)))
        self._sums = pad(codes.sum((1, 2, 3), dtype=torch.int32), (0, more))
        self._rest = torch.zeros_like(self._sums) if rest is None else pad(rest.int(), (0, more))
        self._scale = pad(weights.scale.float(), (0, more))
        self._none = torch.zeros_like(self._scale)
        self._bias = self._none if weights.bias is None else pad(weights.bias.float(), (0, more))
        self._largest = max(int(codes.max()), -int(codes.min()), 1)
        self._lacking = rest is not None

    def pairs(self, top: int) -> int:
        """How many sums of two products with codes 0 to `top` fit 16 bits; 0 where numbers of 16 bits are better multiplied.

        Moving them to 32 bits after each is as much work as that.
        """
        fitting = fitting_pairs(self._largest, top)
        return 0 if self._lacking or fitting < 2 else fitting

    def fields(self, pairs: int, biased: bool) -> _Weights:
        """As C takes them; to be held no longer than this object."""
        parts = self._codes, self._sums, self._rest, self._scale, self._bias if biased else self._none
        return _Weights(*(part.data_ptr() for part in parts), self._out, pairs)

    def window(self, shape: torch.Size) -> _Window:
        """How they slide over codes of a shape, [batch, in, height, width]."""
        images, channels, *size = shape
        own = self._geometry
        each = zip(size, self._kernel, own.padding, own.stride, own.dilation, strict=True)
        places = ((n + 2 * beside - (k - 1) * apart - 1) // step + 1 for n, k, beside, step, apart in each)
        runs = self._runs, self._beside, self.run
        return _Window(images, *size, channels, *runs, *own.stride, *own.padding, *own.dilation, *places)


def fitting_pairs(largest: int, top: int) -> int:
    """How many sums of two products of weights up to a size with codes 0 to `top` fit 16 bits."""
    return (2**15 - 1) // (2 * max(top, 1) * largest)


def _in_fours(runs: Tensor) -> Tensor:
    """Codes [out, runs, run], of whole blocks, as [blocks, runs, fours, BLOCK, FOUR]."""
    fours: Tensor = pad(runs, (0, -runs.shape[2] % FOUR)).unflatten(2, (-1, FOUR)).unflatten(0, (-1, BLOCK))
    return fours.permute(0, 2, 3, 1, 4).contiguous()


class NativeProducts:
    """Convolutions and matrix products of codes in compiled C, summed exactly.

    Attributes: helps: whether the compiler knows of no better instructions here; longest: what matrices of activations may have as
        their inner size; winograd, wide: 3x3 convolutions of narrow and of other numbers.
    """

    def __init__(self, library: Path) -> None:
        """Args: library: what `compiled` made of SOURCE. Raises: CompilerError where the processor has no AVX2."""
        functions = ctypes.CDLL(str(library))
        if not functions.exists():
            raise CompilerError("this processor has no AVX2")
        self.helps, self.longest = bool(functions.helps()), int(functions.longest())
        self.winograd, self.wide = NativeWinograd(functions), NativeWideWinograd(functions)
        self._convolve: Any = functions.convolve
        self._convolve.restype = None
        self._convolve.argtypes = (c_void_p, _Window, _Weights, c_float, c_int32, c_void_p, c_void_p, c_int32)
        self._multiply: Any = functions.multiply
        self._multiply.restype = None
        self._multiply.argtypes = (*[c_void_p] * 2, _Matrices, *[c_void_p] * 2, c_float, c_void_p, c_int32)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied with a model, or sent to another process: what is compiled there."""
        return native_products, ()

    def convolve(
        self, codes: Tensor, packed: PackedWeights, scale: float, zero_point: int, top: int, biased: bool = True
    ) -> Tensor:
        """Sums of `(code - zero_point) * weight` over windows, times both scales, plus the bias if it is asked for.

        Args: codes: uint8 [batch, in, height, width], 0 to top; scale: of the codes.
        Returns: float32 [batch, out, rows, columns], channels last.
        """
        codes = codes.contiguous(memory_format=torch.channels_last)
        window, pairs = packed.window(codes.shape), packed.pairs(top)
        weights = packed.fields(pairs, biased)
        out = torch.empty(window.images, window.rows, window.columns, weights.out)
        space = _space(window, torch.uint8 if pairs else torch.int16)
        self._convolve(
            codes.data_ptr(), window, weights, scale, int(zero_point), None if space is None else space.data_ptr(),
            out.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return out.permute(0, 3, 1, 2)

    def multiply(self, left: Tensor, right: Tensor, row: Tensor | None, column: Tensor | None, scale: float) -> Tensor:
        """See `backend.Product`; matrices with an inner size of at most `longest`."""
        count, rows, inner = left.shape
        columns = right.shape[2]
        turned = right.mT.is_contiguous()
        if not turned:
            right = right.contiguous()
        sizes = _Matrices(count, rows, inner, columns, *((1, inner) if turned else (columns, 1)))
        wide = torch.empty(left.numel() + FOUR, dtype=torch.int16)
        wide[: left.numel()].view(left.shape).copy_(left)
        out = torch.empty(count, rows, columns)
        row, column = (None if more is None else more.contiguous() for more in (row, column))
        more = (None if part is None else part.data_ptr() for part in (row, column))
        self._multiply(wide.data_ptr(), right.data_ptr(), sizes, *more, scale, out.data_ptr(), torch.get_num_threads())
        return out


def _space(window: _Window, dtype: torch.dtype) -> Tensor | None:
    """For padded inputs as they are multiplied; None where codes can be read as they are."""
    if dtype == torch.uint8 and not (window.top or window.left or window.run % FOUR):
        return None
    tall, broad = window.height + 2 * window.top, window.width + 2 * window.left
    return torch.empty(window.images * tall * broad * window.channels + FOUR, dtype=dtype)


@cache
def native_products() -> NativeProducts:
    """Compiled if it was not before, and tried once. Raises: CompilerError, see `trusted`, or where there is no AVX2."""
    return trusted(SOURCE, NativeProducts, _is_right)


@torch.no_grad()
def _is_right(products: NativeProducts) -> bool:
    """Whether sums of narrow and of wide numbers are exact, on a small image; those of narrow ones leave 16 bits many times."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (2, 7, 5, 6), generator=generator, dtype=torch.uint8)
    codes[0] = 255
    for low, high, rest in ((-16, 15, None), (-128, 127, torch.arange(19, dtype=torch.int32))):
        weight = torch.randint(low, high + 1, (19, 7, 3, 3), generator=generator, dtype=torch.int8)
        weight[0] = high
        whole = weight.double() + (0 if rest is None else rest.reshape(-1, 1, 1, 1))
        packed = PackedWeights(Weights(weight, torch.ones(19), rest=rest), Geometry(padding=(1, 1)))
        found = products.convolve(codes, packed, 1.0, 3, 255)
        if not torch.equal(found.double(), conv2d(codes.double() - 3, whole, padding=1)):
            return False
    return products.winograd.is_right(BLOCK, NARROW) and products.wide.is_right(BLOCK)
