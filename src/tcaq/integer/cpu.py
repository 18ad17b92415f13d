"""Integer convolutions and matrix products of the CPU: oneDNN's, as PyTorch carries them for its own exported graphs.

These ops are internal to PyTorch. This is the only file that touches them; it checks that they are what it expects, and each
shape is tried before a layer relies on it.
"""

from __future__ import annotations

import timeit
from collections.abc import Callable, Iterator
from functools import cache, reduce

import torch
from torch import Tensor

from tcaq.integer.backend import Backend, Geometry, InputGrid, Span, Weights
from tcaq.integer.trial import try_conv, try_linear, try_product

_SCALED = ("x_scale", "x_zero_point", "qw", "w_scale", "w_zero_point", "bias")
_OUTPUT = ("output_scale", "output_zero_point", "output_dtype")
LARGE = 2**21
"""Products of numbers in a matrix product, from which on oneDNN's is faster than MKL's."""
EXACT = 2**24 // 2**14
"""So many products of signed bytes add up to no more than float32 counts without a gap."""
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

    def __init__(self, weights: Weights, geometry: Geometry) -> None:
        self.scale, self.bias, self.geometry = weights.scale, weights.bias, geometry
        self.zeros = torch.zeros(len(weights.scale), dtype=torch.int64)
        # packed for inputs with a zero point, which need sums of the weights beside them
        self.packed = torch.ops.onednn.qconv_prepack(weights.codes, weights.scale, 1.0, 1, *geometry.arguments, None)

    def __call__(self, x: Tensor, grid: InputGrid, dtype: torch.dtype) -> Tensor:
        """Convolve float [batch, in, height, width]."""
        return self.multiply(grid.codes(x, 1), grid, dtype)

    def multiply(self, codes: Tensor, grid: InputGrid, dtype: torch.dtype) -> Tensor:
        """Convolve codes, uint8 [batch, in, height, width]."""
        result: Tensor = torch.ops.onednn.qconv2d_pointwise(
            codes.contiguous(memory_format=torch.channels_last), grid.scale, grid.zero_point, self.packed, self.scale,
            self.zeros, self.bias, *self.geometry.arguments, 1.0, 0, _output(dtype), "none", [], "",
        )  # fmt: skip
        return result.to(dtype)


class CpuLinear:
    """A matrix product of uint8 inputs with int8 weights, summed in int32."""

    def __init__(self, weights: Weights) -> None:
        self.scale, self.bias = weights.scale, weights.bias
        self.zeros = torch.zeros(len(weights.scale), dtype=torch.int64)
        self.sums = weights.codes.sum(1, dtype=torch.float32) * weights.scale
        self.packed = torch.ops.onednn.qlinear_prepack(weights.codes, None)

    def __call__(self, x: Tensor, grid: InputGrid, dtype: torch.dtype) -> Tensor:
        """Multiply float [..., in]."""
        return self.multiply(grid.codes(x, -1), grid, dtype)

    def multiply(self, codes: Tensor, grid: InputGrid, dtype: torch.dtype) -> Tensor:
        """Multiply codes, uint8 [..., in]."""
        rows = codes.reshape(-1, codes.shape[-1])
        if isinstance(grid.scale, Tensor):
            result = by_token(
                lambda zero: self._product(rows, 1.0, zero, None, torch.float32), grid, self.sums, self.bias
            ).to(dtype)
        else:
            result = self._product(rows, grid.scale, grid.zero_point, self.bias, dtype)
        return result.reshape(*codes.shape[:-1], -1)

    def _product(
        self, rows: Tensor, scale: float, zero_point: int | Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        result: Tensor = torch.ops.onednn.qlinear_pointwise(
            rows, scale, zero_point, self.packed, self.scale, self.zeros, bias, 1.0, 0, _output(dtype), "none", [], "",
        )  # fmt: skip
        return result.to(dtype)


def by_token(product: Callable[[int], Tensor], grid: InputGrid, sums: Tensor, bias: Tensor | None) -> Tensor:
    """A product with a grid for each row, by one that takes a single zero point for all of them.

    It is given the middle code m, and what a row's own zero point z adds, `(m - z) Σ w`, comes behind it in float: small, because m
    is as near to every z as one number can be.
    Args: product: a zero point -> what the rows' codes less it sum up to, float32 [rows, out]; sums: float32 [out], Σ w.
    """
    scale, zero_point = (torch.as_tensor(part).reshape(-1, 1) for part in (grid.scale, grid.zero_point))
    middle = (grid.top + 1) // 2
    products = torch.addcmul(product(middle), middle - zero_point, sums).mul_(scale)
    return products if bias is None else products.add_(bias)


def _output(dtype: torch.dtype) -> torch.dtype:
    """What an op is asked to put out: oneDNN's convolutions write no float16."""
    return torch.float32 if dtype == torch.float16 else dtype


@cache
def conv_problem(shape: tuple[int, ...], geometry: Geometry, span: Span) -> str | None:
    """What a trial of a weight of this shape finds."""
    return try_conv(CpuConv, shape, geometry, span)


@cache
def linear_problem(shape: tuple[int, ...], span: Span) -> str | None:
    """The same for a matrix."""
    return try_linear(CpuLinear, shape, span)


def scale_sums(sums: Tensor, row: Tensor | None, column: Tensor | None, scale: float, out: Tensor) -> None:
    """Write `(sums + row + column) * scale`, float32 [rows, columns].

    Args: sums: int32 [rows, columns], overwritten; row, column: int32 [rows, 1] and [1, columns].
    """
    for more in (row, column):
        if more is not None:
            sums += more
    torch.mul(sums, scale, out=out)


def product(
    left: Tensor, right: Tensor, row: Tensor | None, column: Tensor | None, scale: float,
    finish: Callable[[Tensor, Tensor | None, Tensor | None, float, Tensor], None] = scale_sums,
) -> Tensor:  # fmt: skip
    """See `backend.Product`. Args: finish: scales the sums of one matrix, see `scale_sums`."""
    left, right = _dense(left), _dense(right)
    floats = floats_are_faster()
    if floats and row is None and column is None and left.shape[2] <= EXACT:
        return torch.bmm(left.float(), right.float()).mul_(scale)
    result = torch.empty(*left.shape[:2], right.shape[2])
    for i, sums in enumerate(sums_by_floats(left, right) if floats else _sums_of_bytes(left, right)):
        finish(sums, _part(row, i), _part(column, i), scale, result[i])
    return result


def _sums_of_bytes(left: Tensor, right: Tensor) -> Iterator[Tensor]:
    """`left @ right`, int32 [rows, columns], one matrix after another in the same place: it is scaled while the cache has it."""
    sums = torch.empty(left.shape[1], right.shape[2], dtype=torch.int32)
    for a, b in zip(left, right, strict=True):
        yield torch._int_mm(a, b, out=sums)


def sums_by_floats(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right`, int32 [n, rows, columns], through float32, which adds up so few products of bytes without rounding.

    Args: left: int8 [n, rows, inner]; right: int8 [n, inner, columns].
    """
    parts = zip(left.split(EXACT, dim=2), right.split(EXACT, dim=1), strict=True)
    sums = (torch.bmm(a.float(), b.float()).to(torch.int32) for a, b in parts)
    return reduce(Tensor.add_, sums)


@cache
def floats_are_faster() -> bool:
    """Whether products of bytes take longer than those of floats that hold the same numbers; no bit of a product depends on it.

    They do where PyTorch has nothing but a plain loop for them: on x86 without VNNI they take ten times as long.
    """
    left, right = torch.ones(1, 256, 64, dtype=torch.int8), torch.ones(1, 64, 256, dtype=torch.int8)
    return _fastest(lambda: sums_by_floats(left, right)) < _fastest(lambda: torch._int_mm(left[0], right[0]))


def _fastest(call: Callable[[], Tensor]) -> float:
    return min(timeit.repeat(call, number=1, repeat=4))


def _part(stack: Tensor | None, index: int) -> Tensor | None:
    return None if stack is None else stack[index]


def float_product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right`, float32 [n, rows, inner] and [n, inner, columns]."""
    # with AVX-512 oneDNN takes half of MKL's time for large ones, with AVX2 more of it
    wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    if not wide or left[0].numel() * right.shape[2] < LARGE or not _has_linear():
        return torch.bmm(left, right)
    result = torch.empty(*left.shape[:2], right.shape[2])
    # of matrices with gaps, as several heads' are, it makes a hundred times slower loops
    left, right = _dense(left), _dense(right)
    for i in range(len(left)):
        result[i] = torch.ops.mkldnn._linear_pointwise(left[i], right[i].mT, None, "none", [], "")
    return result


@cache
def _has_linear() -> bool:
    """Whether this PyTorch has oneDNN's product of float matrices, with the arguments used here."""
    packet = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    expected = ["X", "W", "B", "attr", "scalars", "algorithm"]
    return packet is not None and [argument.name for argument in packet.default._schema.arguments] == expected


def _dense(matrices: Tensor) -> Tensor:
    """Matrices without gaps, by rows or by columns."""
    return matrices if matrices.mT.is_contiguous() else matrices.contiguous()


@cache
def product_problem() -> str | None:
    """What a trial of two matrices finds."""
    return try_product(product)


CPU = Backend(
    missing, CpuConv, CpuLinear, conv_problem, linear_problem, product=product, product_problem=product_problem,
    float_product=float_product,
)  # fmt: skip
