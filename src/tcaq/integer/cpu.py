"""Integer convolutions and matrix products of the CPU: oneDNN's, as PyTorch carries them for its own exported graphs.

These ops are internal to PyTorch. This is the only file that touches them; it checks that they are what it expects, and tries
each shape before a layer relies on it: processors without VNNI instructions add pairs of products in 16 bits and clip the sums
without a word.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from tcaq.integer.backend import Backend, Geometry, Kernel, Span

_SCALED = ("x_scale", "x_zero_point", "qw", "w_scale", "w_zero_point", "bias")
_OUTPUT = ("output_scale", "output_zero_point", "output_dtype")
ROWS = 64
"""Output channels of a trial; kernels take them in blocks of up to so many."""
ARGUMENTS = {
    "qconv_prepack": ("weight", "w_scales", "x_scale", "x_zp", "stride", "padding", "dilation", "groups", "x_shape"),
    "qconv2d_pointwise": (
        "qx", *_SCALED, "stride", "padding", "dilation", "groups", *_OUTPUT, "attr", "scalars", "algorithm",
    ),
    "qlinear_prepack": ("weight", "x_shape"),
    "qlinear_pointwise": ("qx", *_SCALED, *_OUTPUT, "post_op_name", "post_op_args", "post_op_algorithm"),
}  # fmt: skip


def missing() -> str | None:
    """Why this PyTorch cannot run integers on the CPU; None if it has every op, with the arguments used here."""
    where = f"PyTorch {torch.__version__}"
    if not torch.backends.mkldnn.is_available():
        return f"{where} was built without oneDNN"
    for name, expected in ARGUMENTS.items():
        packet = getattr(torch.ops.onednn, name, None)
        if packet is None:
            return f"{where} has no op onednn::{name}"
        found = tuple(argument.name for argument in packet.default._schema.arguments)
        if found != expected:
            return f"in {where} the op onednn::{name} takes other arguments than this version of tcaq knows"
    return None


class CpuConv:
    """A convolution of uint8 inputs with int8 weights, summed in int32."""

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None, geometry: Geometry) -> None:
        self.scale, self.bias, self.geometry = scale, bias, geometry
        self.zeros = torch.zeros(len(scale), dtype=torch.int64)
        # packed for inputs with a zero point, which need sums of the weights beside them
        self.packed = torch.ops.onednn.qconv_prepack(weight, scale, 1.0, 1, *geometry.arguments, None)

    def __call__(self, codes: Tensor, scale: float, zero_point: int, dtype: torch.dtype) -> Tensor:
        """Codes [batch, in, height, width], best channels-last."""
        result: Tensor = torch.ops.onednn.qconv2d_pointwise(
            codes, scale, zero_point, self.packed, self.scale, self.zeros, self.bias, *self.geometry.arguments,
            1.0, 0, _output(dtype), "none", [], "",
        )  # fmt: skip
        return result.to(dtype)


class CpuLinear:
    """A matrix product of uint8 inputs with int8 weights, summed in int32."""

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        self.scale, self.bias = scale, bias
        self.zeros = torch.zeros(len(scale), dtype=torch.int64)
        self.packed = torch.ops.onednn.qlinear_prepack(weight, None)

    def __call__(self, codes: Tensor, scale: float, zero_point: int, dtype: torch.dtype) -> Tensor:
        """Codes [rows, in]."""
        result: Tensor = torch.ops.onednn.qlinear_pointwise(
            codes, scale, zero_point, self.packed, self.scale, self.zeros, self.bias, 1.0, 0, _output(dtype), "none", [], "",
        )  # fmt: skip
        return result.to(dtype)


def _output(dtype: torch.dtype) -> torch.dtype:
    """What an op is asked to put out: oneDNN's convolutions write no float16."""
    return torch.float32 if dtype == torch.float16 else dtype


@cache
def conv_problem(shape: tuple[int, ...], geometry: Geometry, span: Span) -> str | None:
    """Try a weight of this shape on a small image of extreme values, against float64, which holds all such sums exactly."""
    weight = _extremes(_fewer(shape, geometry.groups), span.low, span.high)
    size = 2 + max(step * (k - 1) for step, k in zip(geometry.dilation, shape[2:], strict=True))
    codes = _extremes((2, shape[1] * geometry.groups, size, size), 0, span.top)

    def expected(zero: int) -> Tensor:
        return conv2d(codes.double() - zero, weight.double(), None, *geometry.arguments)

    return _compare(lambda w, s: CpuConv(w, s, None, geometry), weight, codes, expected, span)


@cache
def linear_problem(shape: tuple[int, ...], span: Span) -> str | None:
    """The same for a matrix."""
    weight, codes = _extremes(_fewer(shape), span.low, span.high), _extremes((8, shape[1]), 0, span.top)

    def expected(zero: int) -> Tensor:
        return (codes.double() - zero) @ weight.double().T

    return _compare(lambda w, s: CpuLinear(w, s, None), weight, codes, expected, span)


def _fewer(shape: tuple[int, ...], groups: int = 1) -> tuple[int, ...]:
    """The shape with at most `ROWS` output channels, if they are in one group: the sums are the same, in a tenth of the memory."""
    return shape if groups > 1 else (min(shape[0], ROWS), *shape[1:])


def _extremes(shape: tuple[int, ...], low: int, high: int) -> Tensor:
    """Random ends of a range; the first row holds the upper one alone, the last the lower, for the largest sums there are."""
    upper = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    upper[0], upper[-1] = True, False
    return torch.where(upper, high, low)


def _compare(
    make: Callable[[Tensor, Tensor], Kernel], weight: Tensor, codes: Tensor, expected: Callable[[int], Tensor], span: Span
) -> str | None:  # fmt: skip
    try:
        kernel = make(weight.to(torch.int8), torch.ones(len(weight)))
        for zero in {0, span.top // 2, span.top}:
            found = kernel(_bytes(codes), 1.0, zero, torch.float32)
            if not torch.equal(found, expected(zero).float()):
                return f"this processor does not multiply weights {span.low} to {span.high} by codes 0 to {span.top} exactly"
    except RuntimeError as error:  # an op that refuses a shape is as good as none
        return f"oneDNN refuses it: {error}"
    return None


def _bytes(codes: Tensor) -> Tensor:
    small = codes.to(torch.uint8)
    return small.contiguous(memory_format=torch.channels_last) if small.dim() == 4 else small


CPU = Backend(missing, CpuConv, CpuLinear, conv_problem, linear_problem)
