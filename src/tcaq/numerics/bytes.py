"""Codes of inputs as bytes, which is what integer kernels read."""

from __future__ import annotations

import warnings
from functools import cache

import torch
from torch import Tensor

_MIDDLE, _LAST = 128, 255


def byte_codes(units: Tensor, zero_point: Tensor | int, top: int) -> Tensor:
    """`clamp(round(units) + zero_point, 0, top)` as uint8, in the memory format of `units`.

    Args: units: float32 [...], inputs over their scale, which are overwritten; zero_point: a whole number in [0, 255], or such
        numbers in float32, broadcastable; top: the largest code, at most 255.
    """
    if isinstance(zero_point, int) and units.device.type == "cpu" and _quantizes():
        return _in_one_pass(units.round_(), zero_point, top)
    return _by_signed_bytes(units.round_(), zero_point, top)


def signed_bytes(units: Tensor, zero_point: int, low: int, high: int) -> Tensor:
    """`clamp(round(units) + zero_point, low, high)` as int8, in the memory format of `units`.

    Args: units: float32 [...], which are overwritten; zero_point, low, high: in [-128, 127].
    """
    whole = units.round_()
    if units.device.type == "cpu" and _quantizes():
        codes = _quantized(whole, zero_point, torch.qint8, torch.int8)
        return codes if (low, high) == (-_MIDDLE, _LAST - _MIDDLE) else codes.clamp_(low, high)
    return whole.add_(zero_point).clamp_(low, high).to(torch.int8)


@cache
def _quantizes() -> bool:
    """Whether this PyTorch still quantizes tensors; it says once, which is ignored here, that it will not for ever."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return _in_one_pass(torch.tensor([-1.0, 2.0, 300.0]), 1, _LAST).tolist() == [0, 3, _LAST]
        except (AttributeError, RuntimeError):
            return False


def _in_one_pass(whole: Tensor, zero_point: int, top: int) -> Tensor:
    codes = _quantized(whole, zero_point, torch.quint8, torch.uint8)
    return codes if top == _LAST else codes.clamp_(max=top)


def _quantized(whole: Tensor, zero_point: int, kind: torch.dtype, dtype: torch.dtype) -> Tensor:
    """PyTorch's own quantization adds, clips and converts with vector instructions; whole numbers to bytes of `dtype`.

    It is given whole numbers, because it rounds behind adding the zero point, where halves go another way; and memory in the order
    in which it lies, because it copies what is turned over.
    """
    order = sorted(range(whole.dim()), key=whole.stride, reverse=True)
    quantized = torch.quantize_per_tensor(whole.permute(order), 1.0, zero_point, kind)
    # its bytes where they are: PyTorch has no name for them but one that copies
    codes = torch.empty(0, dtype=dtype).set_(quantized.untyped_storage(), 0, quantized.size(), quantized.stride())
    return codes.permute([order.index(dim) for dim in range(whole.dim())])


def _by_signed_bytes(whole: Tensor, zero_point: Tensor | int, top: int) -> Tensor:
    """PyTorch converts floats to signed bytes with vector instructions, to unsigned ones number by number in nine times as long.

    So codes are moved down by 128, and back by flipping the highest bit of each byte.
    """
    shifted = whole.add_(zero_point - _MIDDLE).clamp_(-_MIDDLE, top - _MIDDLE)
    return shifted.to(torch.int8).view(torch.uint8).bitwise_xor_(_MIDDLE)
