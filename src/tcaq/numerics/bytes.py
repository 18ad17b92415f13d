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
    """PyTorch's own quantization adds, clips and converts with vector instructions.

    It is given whole numbers, because it rounds behind adding the zero point, where halves go another way.
    """
    quantized = torch.quantize_per_tensor(whole, 1.0, zero_point, torch.quint8)
    # its bytes where they are: PyTorch has no name for them but one that copies
    codes = torch.empty(0, dtype=torch.uint8)
    codes.set_(quantized.untyped_storage(), 0, quantized.size(), quantized.stride())
    return codes if top == _LAST else codes.clamp_(max=top)


def _by_signed_bytes(whole: Tensor, zero_point: Tensor | int, top: int) -> Tensor:
    """PyTorch converts floats to signed bytes with vector instructions, to unsigned ones number by number in nine times as long.

    So codes are moved down by 128, and back by flipping the highest bit of each byte.
    """
    shifted = whole.add_(zero_point - _MIDDLE).clamp_(-_MIDDLE, top - _MIDDLE)
    return shifted.to(torch.int8).view(torch.uint8).bitwise_xor_(_MIDDLE)
