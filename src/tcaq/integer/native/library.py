"""The compiled functions, from tensors to tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_double, c_float, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from tcaq.integer.backend import Geometry, InputGrid, eager_log2, signed_codes
from tcaq.integer.native.compiler import trusted
from tcaq.integer.normed import NormedSilu
from tcaq.numerics.log2 import dequantize_log2

SOURCE = Path(__file__).with_name("glue.c")
PART = 128
"""Pixels whose sums one thread finds before it looks for more."""


class _Grid(ctypes.Structure):
    _fields_ = (
        ("equalizer", c_void_p),
        ("scale", c_float),
        ("zero_point", c_float),
        ("low", c_float),
        ("top", c_float),
    )


class _Norm(ctypes.Structure):
    _fields_ = (("weight", c_void_p), ("bias", c_void_p), ("added", c_void_p), ("groups", c_int64), ("eps", c_double))


_SIZES = "height", "width", "kernel_height", "kernel_width"


class _Window(ctypes.Structure):
    _fields_ = tuple((name, c_int64) for name in (*_SIZES, "down", "right", "top", "left", "step_down", "step_right"))


class NativeGlue:
    """What stands between integer kernels in compiled C, each in one pass over an activation; a norm takes one more.

    Division, rounding and clipping are the fake quantizer's to the bit; norm and SiLU are PyTorch's within float rounding.
    """

    def __init__(self, library: Path) -> None:
        """Args: library: what `compiled` made of SOURCE."""
        functions = ctypes.CDLL(str(library))
        pointer, size = c_void_p, c_int64
        self._repeats = cache(_function(functions.repeats, size, result=size))
        self._encode = _function(functions.encode, *[pointer] * 3, size, size, _Grid, pointer, c_int32)
        self._encode_normed = _function(
            functions.encode_normed, *[pointer] * 3, *[size] * 3, _Norm, _Grid, pointer, pointer, size, c_int32
        )
        self._scale_sums = _function(functions.scale_sums, *[pointer] * 4, size, size, c_float, c_int32)
        self._fake_log2 = _function(functions.fake_log2, pointer, pointer, size, *[c_float] * 3, pointer, c_int32)
        self._softmax_encode = _function(functions.softmax_encode, pointer, pointer, size, size, _Grid, c_int32)
        self._softmax_log2 = _function(functions.softmax_log2, pointer, size, size, *[c_float] * 3, c_int32)
        self._add_windows = _function(functions.add_windows, *[pointer] * 3, *[size] * 4, _Window, c_int32, c_int32)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied with a model, or sent to another process: what is compiled there."""
        return native_glue, ()

    def takes(self, x: Tensor, axis: int) -> bool:
        """Whether x is in float32 on the CPU, its channels beside each other.

        Args: axis: of the channels, 1 in [batch, channels, height, width], else -1.
        """
        layout = torch.contiguous_format if axis == -1 else torch.channels_last
        return x.dtype == torch.float32 and x.is_cpu and x.is_contiguous(memory_format=layout)

    def encode(self, x: Tensor, grid: InputGrid, axis: int, summed: bool = False) -> tuple[Tensor, Tensor | None]:
        """What `InputGrid.codes` gives, uint8 [...] in x's memory format, and the sums of codes over channels, int32 [...] without
        `axis`, if they are asked for. An input that it does not take goes PyTorch's way.
        """
        if not self.takes(x, axis) or isinstance(grid.scale, Tensor):
            codes = grid.codes(x, axis)
            return codes, codes.sum(axis, dtype=torch.int32) if summed else None
        codes, sums = torch.empty_like(x, dtype=torch.uint8), None
        if summed:
            sums = torch.empty(x.movedim(axis, -1).shape[:-1], dtype=torch.int32)
        # C knows addresses alone: what they belong to is held by a name until the call is over
        equalizer = grid.equalizer.float().contiguous()
        own = _Grid(equalizer.data_ptr(), grid.scale, grid.zero_point, 0, grid.top)
        given = x.data_ptr(), codes.data_ptr(), None if sums is None else sums.data_ptr()
        if grid.before is None:
            self._plain(given, x.numel() // x.shape[axis], x.shape[axis], own)
        else:
            self._normed(given, x.shape, own, grid.before)
        return codes, sums

    def _plain(self, given: tuple[int, int, int | None], pixels: int, channels: int, grid: _Grid) -> None:
        space = torch.empty(self._repeats(channels) * channels)
        self._encode(*given, pixels, channels, grid, space.data_ptr(), torch.get_num_threads())

    def _normed(self, given: tuple[int, int, int | None], shape: torch.Size, grid: _Grid, before: NormedSilu) -> None:
        """Args: shape: of the input, [images, channels, height, width]."""
        images, channels, height, width = shape
        pixels = height * width
        parts = max(1, pixels // PART)
        moments = torch.empty(images * parts * 2 * channels, dtype=torch.float64)
        space = torch.empty((2 * images + 1) * self._repeats(channels) * channels)
        norm = before.norm
        weight, bias = norm.weight.float().contiguous(), norm.bias.float().contiguous()
        added = None if before.added is None else before.added.float().expand(images, channels).contiguous()
        address = None if added is None else added.data_ptr()
        own = _Norm(weight.data_ptr(), bias.data_ptr(), address, norm.num_groups, norm.eps)
        overwritten = moments.data_ptr(), space.data_ptr()
        self._encode_normed(*given, images, pixels, channels, own, grid, *overwritten, parts, torch.get_num_threads())

    def add_windows(
        self, x: Tensor, sums: Tensor, factors: Tensor, absent: int, kernel: Sequence[int], geometry: Geometry
    ) -> None:
        """Add to a convolution's output what constants in its weights, one for each output channel, would have made of its input.

        Args: x: float32 [batch, out, rows, columns], channels beside each other, changed in place; sums: int32 [batch, height,
            width], of the input's codes over channels; factors: float32 [out], the constants in the units of the output;
            absent: what stands for nothing in these sums; kernel: height and width of the weight.
        """
        images, channels, rows, columns = x.shape
        slide = (number for pair in (geometry.stride, geometry.padding, geometry.dilation) for number in pair)
        sums = sums.contiguous()
        window = _Window(*sums.shape[1:], *kernel, *slide)
        addresses = (part.data_ptr() for part in (x, sums, factors))
        self._add_windows(*addresses, images, rows, columns, channels, window, absent, torch.get_num_threads())

    def signed(self, x: Tensor, scale: float, zero_point: int, low: int, high: int) -> Tensor:
        """See `backend.SignedEncoder`."""
        order = sorted(range(x.dim()), key=x.stride, reverse=True)
        rows = x.permute(order)
        if not self.takes(rows, -1):
            return signed_codes(x, scale, zero_point, low, high)
        codes = torch.empty(rows.shape, dtype=torch.int8)
        given = rows.data_ptr(), codes.data_ptr(), None
        self._plain(given, *_matrix(rows.shape), _Grid(None, scale, zero_point, low, high))
        return codes.permute([order.index(dim) for dim in range(x.dim())])

    def fake_log2(self, p: Tensor, peak: float, bits: int, per_octave: int) -> Tensor:
        """See `backend.FakeLog2`."""
        if not self.takes(p, -1):
            return eager_log2(p, peak, bits, per_octave)
        values, hats, last = log2_values(peak, bits, per_octave), torch.empty_like(p), 2**bits - 1
        addresses = p.data_ptr(), hats.data_ptr()
        self._fake_log2(*addresses, p.numel(), peak, per_octave, last, values.data_ptr(), torch.get_num_threads())
        return hats

    def softmax_signed(self, scores: Tensor, scale: float, zero_point: int, low: int, high: int) -> Tensor:
        """`signed` of the softmax of scores, float [..., columns], over columns, without one tensor in between."""
        if not self.takes(scores, -1):
            return self.signed(torch.softmax(scores, dim=-1), scale, zero_point, low, high)
        codes = torch.empty(scores.shape, dtype=torch.int8)
        addresses, grid = (scores.data_ptr(), codes.data_ptr()), _Grid(None, scale, zero_point, low, high)
        self._softmax_encode(*addresses, *_matrix(scores.shape), grid, torch.get_num_threads())
        return codes

    def softmax_log2(self, scores: Tensor, peak: float, bits: int, per_octave: int) -> Tensor:
        """The same for `fake_log2`, in the memory of the scores if it can be."""
        if not self.takes(scores, -1):
            return self.fake_log2(torch.softmax(scores, dim=-1), peak, bits, per_octave)
        grid = peak, per_octave, 2**bits - 1
        self._softmax_log2(scores.data_ptr(), *_matrix(scores.shape), *grid, torch.get_num_threads())
        return scores

    def scale_sums(self, sums: Tensor, row: Tensor | None, column: Tensor | None, scale: float, out: Tensor) -> None:
        """See `cpu.scale_sums`."""
        row, column = (None if more is None else more.contiguous() for more in (row, column))
        more = (None if part is None else part.data_ptr() for part in (row, column))
        self._scale_sums(sums.data_ptr(), *more, out.data_ptr(), *sums.shape, scale, torch.get_num_threads())


class FusesNorm:
    """A convolution that encodes its inputs by compiled C, and what comes before them with it.

    Attributes: glue: the compiled functions.
    """

    glue: NativeGlue

    def fuses(self, x: Tensor) -> bool:
        """Whether a norm of x is done in one with its codes."""
        return self.glue.takes(x, 1)


def log2_values(peak: float, bits: int, per_octave: int) -> Tensor:
    """What each code of a log2 grid stands for, float32 [2^bits]."""
    return dequantize_log2(torch.arange(2.0**bits), torch.tensor(peak), bits, per_octave)


def _matrix(shape: torch.Size) -> tuple[int, int]:
    return shape[:-1].numel(), shape[-1]


def _function(function: Any, *arguments: Any, result: Any = None) -> Any:
    function.argtypes, function.restype = arguments, result
    return function


@cache
def native_glue() -> NativeGlue:
    """Compiled if it was not before, and tried once. Raises: CompilerError, see `trusted`."""
    return trusted(SOURCE, NativeGlue, _is_right)


@torch.no_grad()
def _is_right(glue: NativeGlue) -> bool:
    """Whether codes are PyTorch's own to the bit, and behind a norm within one, on a small image."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 24, 9, 7, generator=generator).contiguous(memory_format=torch.channels_last)
    before = NormedSilu(nn.GroupNorm(4, 24), torch.randn(2, 24, generator=generator))
    equalizer = torch.rand(24, generator=generator) + 0.5
    plain, behind = InputGrid(0.02, 100, equalizer, 255), InputGrid(0.02, 20, equalizer, 255, before=before)
    codes, sums = glue.encode(x, plain, 1, summed=True)
    off = glue.encode(x, behind, 1)[0].int() - behind.codes(x, 1).int()
    return (
        torch.equal(codes, plain.codes(x, 1))
        and torch.equal(cast(Tensor, sums), codes.sum(1, dtype=torch.int32))
        and bool((off.abs() <= 1).all() and (off != 0).float().mean() < 0.01)
    )
