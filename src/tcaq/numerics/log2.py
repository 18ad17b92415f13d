"""Logarithmic quantization of values in (0, 1], for attention probabilities.

`q = clamp(round(-n log2(p / scale)), 0, 2^b - 1)`, `p_hat = scale * 2^(-q / n)`, with n codes per octave: 1 is the usual log2
grid, 2 the one with base sqrt(2) (RepQ-ViT, Li et al. 2023). A code that would fall past the end stands for zero, so the last
code is the zero code: probabilities far below the grid must vanish, not be lifted to its smallest value.
"""

from __future__ import annotations

import torch
from torch import Tensor


def quantize_log2(p: Tensor, scale: Tensor, bits: int, per_octave: int = 1) -> Tensor:
    """Codes of `p >= 0` (float, any shape) as whole numbers in `[0, 2^bits - 1]`; the last code means zero.

    Args: scale: float > 0, broadcastable: the largest representable value; per_octave: codes per halving.
    """
    # p = 0 has exponent infinity: the last code
    return (p / scale).log2_().mul_(-per_octave).round_().clamp_(0, 2**bits - 1)


def dequantize_log2(codes: Tensor, scale: Tensor, bits: int, per_octave: int = 1) -> Tensor:
    """Real values of log2 codes: `scale * 2^(-q / per_octave)`, and zero for the last code."""
    zero = 2**bits - 1
    # in place: attention maps are large, and a new tensor costs a CPU as much as the arithmetic
    values = torch.exp2(codes / -per_octave)
    return torch.nn.functional.threshold(values, 2.0 ** (-(zero - 0.5) / per_octave), 0.0, inplace=True).mul_(scale)


def fake_quantize_log2(p: Tensor, scale: Tensor, bits: int, per_octave: int = 1) -> Tensor:
    """Quantize-dequantize, straight through in `p` (gradient 1)."""
    with torch.no_grad():
        hat = dequantize_log2(quantize_log2(p, scale, bits, per_octave), scale, bits, per_octave)
    if torch.is_grad_enabled() and p.requires_grad:
        return hat + (p - p.detach())  # adds an exact zero, so that gradients do not change values
    return hat


def fake_quantize_log2_rows(p: Tensor, scale: Tensor, last: Tensor, per_octave: Tensor) -> Tensor:
    """The same for grids that differ between samples.

    Args: last: the last code of each, whole numbers in float; per_octave: float; both broadcastable, as `scale` is.
    """
    with torch.no_grad():
        codes = (p / scale).log2_().mul_(-per_octave).round_().clamp_(min=0.0)
        hat = torch.where(codes < last, torch.exp2(codes / -per_octave), torch.zeros_like(codes)).mul_(scale)
    if torch.is_grad_enabled() and p.requires_grad:
        return hat + (p - p.detach())
    return hat
