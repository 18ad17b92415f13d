"""Grids put every pixel where it belongs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tcaq.errors import UsageError
from tcaq.report.grid import GAP, grid_image, side_by_side
from tests.report.conftest import images


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("count", "columns", "scale"), [(5, 2, 1), (5, 3, 2), (2, 8, 3)])
def test_every_pixel_of_a_grid(channels: int, count: int, columns: int, scale: int) -> None:
    given = images(count, channels)
    used, rows = min(columns, count), -(-count // columns)
    expected = np.full(((rows * (6 + GAP) - GAP) * scale, (used * (7 + GAP) - GAP) * scale, channels), 255)
    opaque = np.zeros(expected.shape[:2])
    for n in range(count):
        for y in range(6 * scale):
            for x in range(7 * scale):
                at = n // columns * (6 + GAP) * scale + y, n % columns * (7 + GAP) * scale + x
                expected[at] = given[n, :, y // scale, x // scale]
                opaque[at] = 255
    picture = grid_image(given, columns, scale)
    assert picture.mode == ("L" if channels == 1 else "RGB")
    np.testing.assert_array_equal(np.asarray(picture).reshape(expected.shape), expected)
    clear = np.asarray(grid_image(given, columns, scale, transparent=True))
    np.testing.assert_array_equal(clear[..., :-1], expected)
    np.testing.assert_array_equal(clear[..., -1], opaque)


@pytest.mark.parametrize(
    "wrong",
    [torch.zeros(2, 1, 4, 4), torch.zeros(2, 4, 4, dtype=torch.uint8), torch.zeros(0, 1, 4, 4, dtype=torch.uint8),
     torch.zeros(2, 2, 4, 4, dtype=torch.uint8)],
)  # fmt: skip
def test_what_is_no_set_of_images_is_refused(wrong: torch.Tensor) -> None:
    with pytest.raises(UsageError, match=r"uint8 images \[N, C, H, W\].*given torch"):
        grid_image(wrong, 2)


@pytest.mark.parametrize(("columns", "scale"), [(0, 1), (1, 0)])
def test_columns_and_scale_start_at_one(columns: int, scale: int) -> None:
    with pytest.raises(UsageError, match=f"given {columns} and {scale}"):
        grid_image(images(), columns, scale)


def test_rows_side_by_side_hold_each_models_first_images() -> None:
    models = [("float", images(5, seed=1)), ("a longer name", images(5, seed=2))]
    picture = np.asarray(side_by_side(models, columns=3, scale=2))
    strips = [np.asarray(grid_image(value[:3], 3, 2)) for _, value in models]
    height, width = strips[0].shape
    assert picture.shape[0] == 2 * height + 2 * GAP
    for top, strip in zip((0, height + 2 * GAP), strips, strict=True):
        np.testing.assert_array_equal(picture[top : top + height, -width:], np.repeat(strip[..., None], 3, axis=2))
        label = picture[top : top + height, :-width]
        assert label.min() < 128  # something is written there
        assert (label[:, -4:] == 255).all()  # and ends before the images


def test_side_by_side_needs_a_row() -> None:
    with pytest.raises(UsageError, match="no rows"):
        side_by_side([], 3)
