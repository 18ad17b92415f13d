"""Whole trajectories, and stretches of steps of one image."""

from __future__ import annotations

import pytest
import torch

from tcaq.models.trajectories import Drawn, Trajectories
from tcaq.stages.draw import draw_whole, stretches


def trajectories(timesteps, images=5):
    samples = torch.randn(len(timesteps), images, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    return Trajectories(samples, torch.tensor(timesteps))


@pytest.mark.parametrize(("count", "images"), [(8, 2), (11, 2), (1, 1), (1000, 5)])
def test_whole_trajectories_have_every_call_of_each_image_once(count, images):
    [part] = draw_whole(trajectories([9, 6, 3, 0]), count, seed=1)
    pairs = list(zip(part.calls.tolist(), part.images.tolist(), strict=True))
    chosen = sorted(set(part.images.tolist()))
    assert len(chosen) == images
    assert sorted(pairs) == sorted((call, image) for call in range(4) for image in chosen)


def test_which_images_are_drawn_follows_the_seed():
    chosen = {
        tuple(draw_whole(trajectories([9, 6, 3, 0], 20), 8, seed)[0].images.unique().tolist()) for seed in range(5)
    }
    assert len(chosen) == 5


def slow_stretches(part, kinds, length):
    """By loops: every start from which a stretch reaches a step, shifted into the trajectory."""
    found = []
    for image in sorted(set(part.images.tolist())):
        for kind in sorted(set(kinds)):
            own = [
                (int(call), row)
                for row, (call, other) in enumerate(zip(part.calls, part.images, strict=True))
                if other == image and kinds[int(call)] == kind
            ]
            rows = [row for _, row in sorted(own)]
            for start in range(1 - length, len(rows)):
                first = min(max(start, 0), max(0, len(rows) - length))
                found.append([rows[min(first + i, len(rows) - 1)] for i in range(length)])
    return found


@pytest.mark.parametrize("length", [1, 2, 3, 6])
@pytest.mark.parametrize(
    ("timesteps", "kinds"),
    [([9, 6, 3, 0], [0, 0, 0, 0]), ([9, 9, 6, 6, 3, 3], [0, 1, 0, 1, 0, 1]), ([9, 6, 6, 3, 3, 0], [0, 0, 1, 0, 1, 0])],
)
def test_stretches_are_steps_in_a_row_of_one_image_and_one_half_of_guidance(timesteps, kinds, length):
    known = trajectories(timesteps)
    calls, images = torch.arange(len(timesteps)).repeat(2), torch.tensor([4, 1]).repeat_interleave(len(timesteps))
    order = torch.randperm(len(calls), generator=torch.Generator().manual_seed(2))
    part = Drawn(known, calls[order], images[order])
    assert stretches(part, length).tolist() == slow_stretches(part, kinds, length)


def test_the_ends_of_a_trajectory_are_in_no_fewer_stretches_than_its_middle():
    part = draw_whole(trajectories(list(range(20, 0, -1)), 3), 60, seed=0)[0]
    counts = torch.bincount(stretches(part, 3).flatten(), minlength=60)
    middle = [row for row, call in enumerate(part.calls.tolist()) if 4 < call < 15]
    assert set(counts[middle].tolist()) == {3}
    assert counts.min() == 3
    assert counts.max() == 5
