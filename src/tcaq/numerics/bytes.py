"""Codes of inputs as bytes, which is what integer kernels read."""

from __future__ import annotations

import torch
from torch import Tensor

_MIDDLE = 128


def byte_codes(units: Tensor, zero_point: Tensor | int, top: int) -> Tensor:
    """`clamp(round(units) + zero_point, 0, top)` as uint8, in the memory format of `units`.

    PyTorch turns floats into signed bytes with vector instructions and into unsigned ones number by number, in nine times as long.
    So codes are moved down by 128, and back by flipping the highest bit of each byte.

    Args: units: float32 [...], inputs over their scale, which are overwritten; zero_point: a whole number in [0, 255], or such
        numbers in float32, broadcastable; top: the largest code, at most 255.
    """
    shifted = units.round_().add_(zero_point - _MIDDLE).clamp_(-_MIDDLE, top - _MIDDLE)
    return shifted.to(torch.int8).view(torch.uint8).bitwise_xor_(_MIDDLE)
