"""Windows of trajectories, and stretches of steps of one image."""

from __future__ import annotations

import pytest
import torch

from tcaq.models.trajectories import Drawn, Trajectories
from tcaq.stages.draw import draw_windows, stretches


def trajectories(timesteps, images=5):
    samples = torch.randn(len(timesteps), images, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    return Trajectories(samples, torch.tensor(timesteps))


@pytest.mark.parametrize("count", [20, 1000])
def test_windows_are_whole_trajectories_where_all_fit(count):
    [part] = draw_windows(trajectories([9, 6, 3, 0]), count, 2, seed=1)
    pairs = sorted(zip(part.calls.tolist(), part.images.tolist(), strict=True))
    assert pairs == [(call, image) for call in range(4) for image in range(5)]


@pytest.mark.parametrize(("count", "wide", "images"), [(8, 2, 4), (11, 2, 5), (15, 3, 5), (1, 2, 1), (3, 2, 1)])
def test_windows_are_of_as_many_images_as_there_is_room_for(count, wide, images):
    [part] = draw_windows(trajectories([9, 6, 3, 0]), count, 2, seed=1)
    own = {image: part.calls[part.images == image].tolist() for image in part.images.tolist()}
    assert len(own) == images
    assert all(set(calls) in [{(start + i) % 4 for i in range(wide)} for start in range(4)] for calls in own.values())


def test_both_halves_of_guidance_are_in_a_window():
    [part] = draw_windows(trajectories([9, 9, 6, 6, 3, 3, 0, 0], 3), 12, 2, seed=0)
    windows = sorted(sorted(part.calls[part.images == image].tolist()) for image in range(3))
    assert windows == [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7]]


def test_no_stretch_goes_over_a_gap():
    part = Drawn(trajectories([9, 6, 3, 0, -3]), torch.tensor([0, 1, 3, 4]), torch.tensor([2, 2, 2, 2]))
    assert stretches(part, 2).tolist() == [[0, 1], [0, 1], [0, 1], [2, 3], [2, 3], [2, 3]]


def test_steps_that_a_gap_leaves_alone_are_in_no_stretch():
    known = trajectories([9, 6, 3, 0, -3])
    part = Drawn(known, torch.tensor([0, 2, 3, 4]), torch.tensor([2, 2, 2, 2]))
    assert set(stretches(part, 2).flatten().tolist()) == {1, 2, 3}
    short = Drawn(known, torch.tensor([0, 2]), torch.tensor([2, 2]))
    assert stretches(short, 2).tolist() == [[0, 0], [0, 0], [1, 1], [1, 1]]


def test_windows_cover_all_steps_about_alike():
    [part] = draw_windows(trajectories(list(range(50, 0, -1)), 96), 1600, 4, seed=0)
    counts = torch.bincount(part.calls, minlength=50)
    assert len(part.images.unique()) == 96
    assert counts.max() - counts.min() <= 2


def test_which_images_are_drawn_follows_the_seed():
    chosen = {
        tuple(draw_windows(trajectories([9, 6, 3, 0], 20), 8, 4, seed)[0].images.unique().tolist()) for seed in range(5)
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
    part = draw_windows(trajectories(list(range(20, 0, -1)), 3), 60, 3, seed=0)[0]
    counts = torch.bincount(stretches(part, 3).flatten(), minlength=60)
    middle = [row for row, call in enumerate(part.calls.tolist()) if 4 < call < 15]
    assert set(counts[middle].tolist()) == {3}
    assert counts.min() == 3
    assert counts.max() == 5
