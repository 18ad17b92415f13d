"""Rows of samples for a page, one row a model, as images inside the page itself."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from io import BytesIO

from torch import Tensor
from torch.nn.functional import interpolate

from tcaq.report.grid import grid_image

STRIP_WIDTH = 1024
"""Pixels a strip of samples may be wide; the text column of the page is about as wide."""
TILE = 128
"""Pixels beyond which samples are shrunk, so that the page stays small."""
STRIPS = 3


def strips(models: Sequence[tuple[str, Tensor]], most: int = STRIPS) -> list[list[dict[str, str]]]:
    """At most `most` blocks of rows, one row a model (label, images [N, C, H, W]); all images of a column come from one seed.

    Returns: for each row its `label`, its `source` as a data URI and its `alt` text.
    """
    count = min(len(images) for _, images in models)
    if count == 0:
        return []
    shown = [(label, shrunk(images[:count])) for label, images in models]
    width = shown[0][1].shape[-1]
    scale = max(1, 64 // width)
    columns = min(count, max(1, STRIP_WIDTH // (scale * (width + 2))))
    starts = range(0, min(count - count % columns, most * columns), columns)
    return [
        [
            {
                "label": label,
                "alt": f"{columns} samples of {label}, number {start + 1} to {start + columns}",
                "source": data_uri(images[start : start + columns], columns, scale),
            }
            for label, images in shown
        ]
        for start in starts
    ]


def shrunk(images: Tensor) -> Tensor:
    """Images no wider than a tile."""
    if images.ndim != 4 or images.shape[-1] <= TILE:
        return images
    size = (round(images.shape[-2] * TILE / images.shape[-1]), TILE)
    small = interpolate(images.float(), size=size, mode="bilinear", antialias=True, align_corners=False)
    return small.round().clamp(0, 255).to(images.dtype)


def data_uri(images: Tensor, columns: int, scale: int) -> str:
    """A grid of images as the source of an `img`."""
    buffer = BytesIO()
    grid_image(images, columns, scale, transparent=True).save(buffer, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
