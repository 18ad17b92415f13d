"""Sampled images as one picture: a plain grid, or one row a model under the same seeds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from tcaq.errors import UsageError

GAP = 2
"""Pixels between images, before scaling."""
PAPER = 255
INK = 34


def grid_image(images: Tensor, columns: int, scale: int = 2, *, transparent: bool = False) -> Image.Image:
    """Images in reading order on white, each pixel `scale` pixels wide.

    Args: images, uint8 [N, C, H, W] with C 1 (gray) or 3 (RGB); columns: images in a row; scale: at least 1;
        transparent: nothing between the images instead of white (an alpha channel more).
    Raises: UsageError for another dtype or shape, no images, or fewer than one column.
    """
    _check(images, columns, scale)
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    used = min(columns, count)
    cell_height, cell_width = height + GAP, width + GAP
    # the last channel is opacity, dropped below if not asked for
    canvas = torch.full((channels + 1, rows * cell_height - GAP, used * cell_width - GAP), PAPER, dtype=torch.uint8)
    canvas[-1] = 0
    for index, image in enumerate(images.cpu()):
        top, left = index // columns * cell_height, index % columns * cell_width
        canvas[:-1, top : top + height, left : left + width] = image
        canvas[-1, top : top + height, left : left + width] = 255
    large = canvas.repeat_interleave(scale, dim=1).repeat_interleave(scale, dim=2)
    bands = [Image.fromarray(band.numpy()) for band in large]
    mode = ("L" if channels == 1 else "RGB") + ("A" if transparent else "")
    return Image.merge(mode, bands if transparent else bands[:-1])


def side_by_side(rows: Sequence[tuple[str, Tensor]], columns: int, scale: int = 2) -> Image.Image:
    """The first `columns` images of each model, one labelled row a model; images in a column share their seed.

    Args: rows: label and images, uint8 [N, C, H, W], of each model.
    Returns: an RGB picture, labels on the left.
    Raises: UsageError as `grid_image`, or if there is no row.
    """
    if not rows:
        raise UsageError("side_by_side got no rows; give at least one (label, images)")
    strips = [grid_image(images[:columns], columns, scale).convert("RGB") for _, images in rows]
    font = ImageFont.load_default(size=7 * scale)
    margin = max(int(font.getlength(label)) for label, _ in rows) + 6 * scale
    gap = GAP * scale
    size = margin + max(strip.width for strip in strips), sum(strip.height + gap for strip in strips) - gap
    canvas = Image.new("RGB", size, (PAPER,) * 3)
    draw, top = ImageDraw.Draw(canvas), 0
    for (label, _), strip in zip(rows, strips, strict=True):
        canvas.paste(strip, (margin, top))
        draw.text((0, top + strip.height / 2), label, fill=(INK,) * 3, font=font, anchor="lm")
        top += strip.height + gap
    return canvas


def _check(images: Tensor, columns: int, scale: int) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or len(images) == 0 or images.shape[1] not in (1, 3):
        raise UsageError(
            f"a grid takes uint8 images [N, C, H, W] with N at least 1 and C 1 or 3, "
            f"given {images.dtype} {list(images.shape)}"
        )
    if columns < 1 or scale < 1:
        raise UsageError(f"columns and scale of a grid must be at least 1, given {columns} and {scale}")
