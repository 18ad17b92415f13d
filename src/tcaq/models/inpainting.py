"""What inpainting pipelines start from: pictures, and masks of what is to be painted anew."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image

from tcaq.errors import UsageError
from tcaq.models.seeds import generators, image_seeds
from tcaq.spec.pictures import Picture

LEAST, MOST = 0.25, 0.75
"""Edges of a hole, in parts of the picture's."""


def opened(picture: Picture) -> Image.Image:
    """A picture in RGB. Raises: UsageError if it has changed since it was chosen, or is none."""
    path = picture.check()
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except OSError as error:  # no picture, or a part of one
        raise UsageError(f"{path} holds no picture that can be read: {error}") from error


def masks(sizes: Sequence[tuple[int, int]], images: Sequence[int]) -> list[Image.Image]:
    """A mask for each image of these numbers, white where it is to be painted: a rectangle that depends on the number alone.

    Args: sizes: width and height of each image's picture.
    """
    seeds = [image_seeds("masks", 0, number, number + 1)[0] for number in images]
    return [_hole(size, generator) for size, generator in zip(sizes, generators(seeds), strict=True)]


def _hole(size: tuple[int, int], generator: torch.Generator) -> Image.Image:
    draws = torch.rand(4, generator=generator).tolist()
    edges = [max(1, round(length * (LEAST + (MOST - LEAST) * draws[i]))) for i, length in enumerate(size)]
    corner = [round((length - edge) * draws[2 + i]) for i, (length, edge) in enumerate(zip(size, edges, strict=True))]
    mask = Image.new("L", size, 0)
    mask.paste(255, (corner[0], corner[1], corner[0] + edges[0], corner[1] + edges[1]))
    return mask
