"""Errors by spatial frequency against loops in float64."""

from __future__ import annotations

import pytest
import torch

from tcaq.stages.call import Call
from tcaq.stages.teaching import Lessons, Teaching, at_once, by_band


def slow_bands(error):
    """Bands of one sample, [channels, height, width], by loops over squares."""
    found, level = [], error.double()
    while max(level.shape[1:]) > 1:
        fine, (height, width) = level.clone(), level.shape[1:]
        steps = [min(2, height), min(2, width)]
        coarse = torch.empty(len(level), -(-height // steps[0]), -(-width // steps[1]), dtype=torch.float64)
        for y in range(coarse.shape[1]):
            for x in range(coarse.shape[2]):
                square = (slice(None), slice(y * steps[0], (y + 1) * steps[0]), slice(x * steps[1], (x + 1) * steps[1]))
                coarse[:, y, x] = level[square].mean(dim=(1, 2))
                fine[square] -= coarse[:, y, x, None, None]
        found.append(float(fine.square().sum(0).mean()))
        level = coarse
    return [*found, float(level.square().sum(0).mean())]


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (1, 5), (6, 3), (7, 12)])
def test_bands_are_what_averages_over_squares_take_away(size):
    error = torch.randn(3, 2, *size, generator=torch.Generator().manual_seed(0))
    found = by_band(error, 2.0)
    for sample, row in zip(error, found, strict=True):
        assert row.tolist() == pytest.approx(slow_bands(sample), rel=1e-5, abs=1e-7)


def test_bands_share_the_error_of_a_picture_whose_sides_halve_evenly():
    error = torch.randn(4, 3, 16, 8, generator=torch.Generator().manual_seed(1))
    found = by_band(error, 2.0)
    assert found.shape == (4, 5)
    torch.testing.assert_close(found.sum(dim=1, keepdim=True), at_once(error, 2.0))


def test_an_even_shift_is_all_in_the_last_band_and_a_checkerboard_in_the_first():
    shift = torch.full((1, 1, 8, 8), 0.5)
    board = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(4, 4)[None, None]
    assert by_band(shift, 2.0).tolist() == [[0.0, 0.0, 0.0, 0.25]]
    assert by_band(board, 2.0).tolist() == [[1.0, 0.0, 0.0, 0.0]]


def test_what_is_no_picture_has_one_band():
    tokens = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(2))
    assert torch.equal(by_band(tokens, 2.0), at_once(tokens, 2.0))
    assert by_band(tokens, 2.0).shape == (2, 1)


def test_two_outputs_count_alike_and_their_sizes_are_taken_once(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    targets = [torch.randn(6, 4, 2, generator=generator), 100 * torch.randn(6, 4, 2, generator=generator)]
    call = Call.of((targets[0],), {}, 6)
    teaching, rows = Teaching(call, call, targets, torch.arange(6)), torch.tensor([4, 1])
    outputs = [target[rows] * 1.1 for target in targets]
    sizes = [target.double().square().sum(1).mean() for target in targets]
    expected = sum(
        (output - target[rows]).double().square().sum(1).mean(1) / size
        for output, target, size in zip(outputs, targets, sizes, strict=True)
    )
    for _ in range(2):
        torch.testing.assert_close(teaching.distance(outputs, rows, 2.0)[:, 0].double(), expected)
        monkeypatch.setattr("tcaq.stages.teaching.torch.Tensor.clamp", None)  # what was taken is not taken again


def test_a_stretch_counts_with_the_mean_of_its_errors():
    generator = torch.Generator().manual_seed(3)
    target, outputs = torch.randn(2, 12, 3, 8, 8, generator=generator)
    call, rows = Call.of((target,), {}, 12), torch.tensor([3, 4, 5, 9, 10, 11])
    teaching = Teaching(call, call, [target], torch.arange(12))
    found = teaching.distance([outputs[rows]], rows, 2.0, in_bands=True, stretch=3)
    for stretch, row in zip(rows.split(3), found, strict=True):
        mean = sum((outputs[i].double() - target[i].double()) for i in stretch.tolist()) / 3
        assert row.tolist() == pytest.approx(slow_bands(mean), rel=1e-5)
    assert found.shape == (2, 4)


def test_whole_stretches_are_drawn_each_as_often_as_another():
    call = Call.of((torch.zeros(6, 1),), {}, 6)
    own = torch.tensor([[0, 1, 2], [3, 4, 5], [1, 2, 3]])
    lessons = Lessons((Teaching(call, call, [torch.zeros(6, 1)], torch.arange(6)),), (own,))
    generator, drawn = torch.Generator().manual_seed(0), []
    for _ in range(300):
        number, rows = lessons.draw(8, generator)  # room for two stretches
        assert (number, len(rows)) == (0, 6)
        drawn += rows.reshape(-1, 3).tolist()
    for stretch in own.tolist():
        assert drawn.count(stretch) == pytest.approx(200, abs=45)
