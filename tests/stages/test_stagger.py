"""Staggered step sizes: which rows change, by how much, and that errors of neighbouring steps have less in common."""

from __future__ import annotations

import math

import pytest
import torch

from tcaq.numerics.affine import fake_quantize
from tcaq.spec.recipe import Stagger
from tcaq.stages.scale import affine_operands
from tcaq.stages.stagger import stagger, turns


@pytest.mark.parametrize("stride", [1, 2, 3, 5])
def test_neighbours_are_far_apart_whatever_the_stride(stride):
    taken = turns(50, 0.15)[::stride].log() / 0.15
    assert taken.abs().max() <= 1 + 1e-6
    # of a range of 2, on which the multiples of the golden ratio lie evenly
    assert (taken.diff().abs() > 0.1).all()
    assert taken.mean().abs() < 0.2
    assert taken.std() == pytest.approx(2 / math.sqrt(12), rel=0.2)


def test_a_single_group_keeps_its_step_size():
    assert turns(1, 0.15).tolist() == [1.0]


def test_narrow_rows_change_and_given_or_wide_ones_stay(ready):
    given = next(quantizer for quantizer in operands(ready.unet).values() if quantizer.grid.bits == 4)
    given.given = True
    before = {name: (q.scale.clone(), q.zero_point.clone()) for name, q in operands(ready.unet).items()}
    stagger(ready.unet, Stagger(spread=0.2, bits=4))
    changed = 0
    for name, quantizer in operands(ready.unet).items():
        scale, zero_point = before[name]
        narrow = quantizer.grid.bits <= 4 and quantizer is not given
        assert torch.equal(quantizer.scale, scale * turns(len(scale), 0.2) if narrow else scale)
        assert torch.equal(quantizer.zero_point, zero_point)
        changed += narrow
    assert changed > 10
    assert changed < len(before)


def operands(unet):
    return {f"{name}|{operand}": quantizer for name, operand, quantizer, _ in affine_operands(unet)}


def test_what_hardly_changes_is_rounded_differently_from_step_to_step():
    """A value that drifts slowly, on one grid for all steps and on staggered ones: the mean error over steps gets smaller."""
    generator = torch.Generator().manual_seed(0)
    steps, scale = 50, torch.full((50, 1), 0.4)
    x = torch.randn(1, 4096, generator=generator) + 0.02 * torch.randn(steps, 4096, generator=generator).cumsum(0)
    zero, errors = torch.full((50, 1), 8.0), []
    for own in (scale, scale * turns(steps, 0.15)[:, None]):
        errors.append(fake_quantize(x, own, zero, 0, 15) - x)
    alike, staggered = (error.unfold(0, 5, 1).mean(-1).square().mean() for error in errors)
    single = [error.square().mean() for error in errors]
    assert staggered < 0.75 * alike  # of five steps in a row
    assert single[1] < 1.1 * single[0]  # of each by itself
