"""Uniform affine quantization with straight-through rounding.

One convention everywhere: `q = clamp(round(x / scale) + zero_point, low, high)` and `x_hat = (q - zero_point) * scale`,
where `[low, high]` is the code range of the grid (unsigned `[0, 2^b - 1]`, signed `[-2^(b-1), 2^(b-1) - 1]`) and the
zero point is a whole number inside it. Rounding is to nearest, ties to even, as in torch, oneDNN and ONNX.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tcaq.errors import UsageError

BITS = range(2, 9)


def code_range(bits: int, signed: bool) -> tuple[int, int]:
    """Smallest and largest code of a `bits`-wide grid.

    Raises: UsageError if bits is outside 2..8.
    """
    if bits not in BITS:
        raise UsageError(f"{bits} bits were asked for; a grid has {BITS.start} to {BITS.stop - 1} bits")
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def qparams(low: Tensor, high: Tensor, bits: int, signed: bool, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero point that cover the range `[low, high]`, which is first widened to hold zero.

    A symmetric grid has its zero point in the middle code (0 if signed), so that it spends as many codes on either
    side. A one-sided symmetric range on an unsigned grid (min >= 0) starts at zero instead: it would waste half its
    codes otherwise.

    Args: low, high: float tensors of one shape.
    Returns: scale (> 0) and zero point (whole numbers), both float32 of that shape.
    """
    code_low, code_high = code_range(bits, signed)
    low, high = low.float().clamp(max=0.0), high.float().clamp(min=0.0)
    tiny = torch.finfo(torch.float32).tiny
    if not symmetric:
        scale = ((high - low) / (code_high - code_low)).clamp(min=tiny)
        zero_point = (code_low - torch.round(low / scale)).clamp(code_low, code_high)
        return scale, zero_point
    reach = torch.maximum(-low, high)
    middle = 0 if signed else 2 ** (bits - 1)
    scale = (reach / (code_high - middle)).clamp(min=tiny)
    zero_point = torch.full_like(scale, middle)
    if not signed:
        one_sided = low == 0
        scale = torch.where(one_sided, (high / code_high).clamp(min=tiny), scale)
        zero_point = torch.where(one_sided, torch.zeros_like(zero_point), zero_point)
    return scale, zero_point


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    """Codes of `x` as whole numbers in x's float dtype; scale and zero point broadcast against x."""
    return (torch.round(x / scale) + zero_point).clamp(low, high)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Real values of codes; all arguments broadcast."""
    return (codes - zero_point) * scale


class _FakeQuantize(torch.autograd.Function):
    """Quantize-dequantize whose rounding passes gradients straight through, in few passes over memory.

    d x_hat / d x is 1 where the rounded value is inside the range and 0 outside; d x_hat / d scale is
    `q - zero_point - x / scale` inside and the clipped code minus the zero point outside (LSQ, Esser et al. 2020,
    eq. 3).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, low: int | Tensor, high: int | Tensor
    ) -> Tensor:
        units = x / scale
        codes = torch.round(units)
        # two one-sided clamps with tensors for bounds run in a fifth of the time of one with both
        clipped = codes.clamp(min=low - zero_point).clamp_(max=high - zero_point)
        inside = codes == clipped
        # the slope reuses the memory of `units`: see the remark in `fake_quantize`
        slope = units.masked_fill_(~inside, 0.0).neg_().add_(clipped) if ctx.needs_input_grad[1] else None
        ctx.shape = scale.shape
        ctx.save_for_backward(inside, slope)
        return clipped.mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        inside, slope = ctx.saved_tensors
        to_x = grad * inside if ctx.needs_input_grad[0] else None
        to_scale = None if slope is None else (grad * slope).sum_to_size(ctx.shape)
        return to_x, to_scale, None, None, None


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, low: int | Tensor, high: int | Tensor) -> Tensor:
    """`dequantize(quantize(x))` in float, differentiable in x and scale (straight through the rounding).

    Args: x: float [...]; scale, zero_point: float, broadcastable against x; low, high: code range, as tensors where it differs
        between samples: float, broadcastable as well.
    """
    if torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad):
        result: Tensor = _FakeQuantize.apply(x, scale, zero_point, low, high)  # type: ignore[no-untyped-call]
        return result
    # in place: on a CPU this is bound by memory, and each further tensor costs as much as the arithmetic
    return (x / scale).round_().clamp_(min=low - zero_point).clamp_(max=high - zero_point).mul_(scale)
