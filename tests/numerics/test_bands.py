import pytest
import torch
from torch import Tensor

from tcaq.numerics.bands import bands


def repeated(band: Tensor, times: int, size: tuple[int, int]) -> Tensor:
    return band.repeat_interleave(times, dim=2).repeat_interleave(times, dim=3)[..., : size[0], : size[1]]


@pytest.mark.parametrize("size", [(8, 8), (8, 4), (7, 5), (1, 1)])
def test_the_bands_of_a_picture_sum_to_it(size: tuple[int, int]) -> None:
    picture = torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = bands(picture)
    total = sum(repeated(band, 2**level, size) for level, band in enumerate(found))
    assert found[-1].shape[2:] == (1, 1)
    assert torch.allclose(torch.as_tensor(total), picture, rtol=0, atol=1e-12)


def test_each_band_holds_what_its_squares_differ_in() -> None:
    checkers = torch.ones(1, 1, 8, 8)
    checkers[..., ::2, 1::2] = checkers[..., 1::2, ::2] = -1.0
    halves = torch.ones(1, 1, 8, 8)
    halves[..., 4:] = -1.0
    powers = [
        [float(band.square().sum()) for band in bands(picture)] for picture in (checkers, halves, checkers * 0 + 3)
    ]
    assert powers == [[64, 0, 0, 0], [0, 0, 4, 0], [0, 0, 0, 9]]
