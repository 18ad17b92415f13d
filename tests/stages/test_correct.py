"""The error by which the strength of a correction is chosen."""

from __future__ import annotations

import pytest
import torch

from tcaq.stages.correct import typical_error


def test_a_typical_error_is_the_geometric_mean_over_images_of_their_squares() -> None:
    images = torch.full((3, 1, 2, 2), 100, dtype=torch.uint8)
    others = images.clone()
    others[0] += 2
    others[1] += 4
    others[2] -= 100  # one that became something else: a plain mean would be 3 340
    assert typical_error(images, others) == pytest.approx((4 * 16 * 10_000) ** (1 / 3))


def test_equal_images_have_the_smallest_error_there_is() -> None:
    images = torch.arange(8, dtype=torch.uint8).reshape(2, 1, 2, 2)
    assert typical_error(images, images) == pytest.approx(1e-6)
    assert typical_error(images, images + 1) == pytest.approx(1.0)
