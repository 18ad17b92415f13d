"""Weight codes as signed bytes, which is what integer matrix units multiply.

A weight is `(code - zero_point) * scale`. The whole number `n = code - zero_point` has up to nine bits where the zero point is
not in the middle, and some processors add neighbouring products in 16 bits and clip the sum. So n is written as `Σ factor_p *
plane_p + rest`, with planes of signed bytes in a window that the processor handles exactly, and one number `rest` for each
output channel. The products with `rest` need the sum of the inputs alone, which is one more output channel whose weights are
all 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

BYTE = (-128, 127)
HALF = (-64, 63)


@dataclass(frozen=True)
class SignedCodes:
    """Whole numbers n [out, ...] in parts: `n = Σ factors[p] * planes[p] + rest`.

    Attributes: planes: int8 [out, ...] each; factors: one for each plane; rest: int16 [out].
    """

    planes: tuple[Tensor, ...]
    factors: tuple[int, ...]
    rest: Tensor

    @property
    def has_rest(self) -> bool:
        """Whether any channel needs the sum of its inputs."""
        return bool((self.rest != 0).any())

    @property
    def extremes(self) -> tuple[int, int]:
        """Smallest and largest number that meets an input, the ones of the summing channel included."""
        low = min(int(plane.min()) for plane in self.planes)
        high = max(int(plane.max()) for plane in self.planes)
        return min(low, 0), max(high, int(self.has_rest))

    def whole(self) -> Tensor:
        """n, int16 [out, ...]."""
        parts = zip(self.factors, self.planes, strict=True)
        total = sum((factor * plane.to(torch.int16) for factor, plane in parts), self._rows(self.planes[0]))
        return torch.as_tensor(total)

    def _rows(self, like: Tensor) -> Tensor:
        return self.rest.reshape(-1, *[1] * (like.dim() - 1))


def signed_codes(n: Tensor) -> Iterator[SignedCodes]:
    """The ways to write n, int16 [out, ...] with at most 256 values a channel, cheapest first.

    Whole bytes; then bytes of seven bits, whose products with any byte can be added in pairs within 16 bits; where a channel
    has more than 128 values, as twice a number of seven bits plus a last bit.
    """
    yield _one_plane(n, BYTE)
    reach = n.flatten(1).amax(1) - n.flatten(1).amin(1)
    if int(reach.max()) <= HALF[1] - HALF[0]:
        yield _one_plane(n, HALF)
    else:
        yield _two_planes(n)


def _one_plane(n: Tensor, window: tuple[int, int]) -> SignedCodes:
    rest = _shift(n, window)
    return SignedCodes((_less(n, rest).to(torch.int8),), (1,), rest)


def _two_planes(n: Tensor) -> SignedCodes:
    rest = _shift(n, BYTE)
    byte = _less(n, rest)
    half = torch.div(byte, 2, rounding_mode="floor")
    return SignedCodes((half.to(torch.int8), (byte - 2 * half).to(torch.int8)), (2, 1), rest)


def _less(n: Tensor, rest: Tensor) -> Tensor:
    return n - rest.reshape(-1, *[1] * (n.dim() - 1))


def _shift(n: Tensor, window: tuple[int, int]) -> Tensor:
    """What to take off each channel so that it fits the window: 0 where it fits as it is."""
    rows = n.flatten(1)
    above = (rows.amax(1) - window[1]).clamp(min=0)
    below = (rows.amin(1) - window[0]).clamp(max=0)
    return (above + below).to(torch.int16)
