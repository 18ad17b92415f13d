"""A picture in bands of spatial frequencies."""

from __future__ import annotations

from torch import Tensor, nn


def bands(picture: Tensor) -> list[Tensor]:
    """What an average over squares of 2 x 2 takes away, again and again, from the finest band to the mean over all positions.

    Args: picture: float [batch, channels, height, width].
    Returns: float [batch, channels, ...] each; a band is half as high and wide as the one before it (rounded up), and their sum,
        each repeated to the size of the picture, is the picture.
    """
    found = []
    while max(size := picture.shape[2:]) > 1:
        halves = [min(2, side) for side in size]
        coarse = nn.functional.avg_pool2d(picture, halves, ceil_mode=True)
        spread = coarse.repeat_interleave(halves[0], dim=2).repeat_interleave(halves[1], dim=3)
        found.append(picture - spread[..., : size[0], : size[1]])
        picture = coarse
    return [*found, picture]
