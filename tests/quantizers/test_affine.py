"""The activation quantizer against a loop over samples."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tcaq.numerics.affine import fake_quantize
from tcaq.quantizers.affine import AffineQuantizer
from tcaq.quantizers.clock import StepClock
from tcaq.spec.grid import AffineGrid
from tcaq.spec.steps import StepGroups

TIMESTEPS = torch.tensor([999, 0, 400, 0])
ROWS = [2, 0, 1, 0]


def made(bits: int = 4, signed: bool = False) -> AffineQuantizer:
    clock = StepClock(StepGroups(boundaries=(100.0, 700.0)))
    clock.set(TIMESTEPS)
    quantizer = AffineQuantizer(AffineGrid(bits=bits, signed=signed), clock)
    quantizer.set_rows(torch.tensor([0.1, 0.25, 0.6]), torch.tensor([1.0, -2.0, 3.0] if signed else [3.0, 7.0, 9.0]))
    return quantizer


def sample_by_sample(quantizer: AffineQuantizer, x: Tensor, gain: Tensor | None) -> Tensor:
    """x / r on the sample's own grid, times r."""
    r = torch.tensor(1.0) if gain is None else gain[0]
    parts = []
    for sample, row in zip(x, ROWS, strict=True):
        scale, zero = quantizer.scale[row], float(quantizer.zero_point[row])
        codes = (torch.round(sample / (scale * r)) + zero).clamp(quantizer.low, quantizer.high)
        parts.append((codes - zero) * (scale * r))
    return torch.stack(parts)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("gained", [False, True])
def test_mixed_timesteps_equal_a_loop_over_samples(bits: int, signed: bool, gained: bool) -> None:
    torch.manual_seed(0)
    quantizer = made(bits, signed)
    x = torch.randn(4, 5, 6, 6)
    gain = torch.tensor([1.0, 2.0, 1.5, 9.0, 1.0]).reshape(1, 5, 1, 1) if gained else None
    assert torch.equal(quantizer(x, gain), sample_by_sample(quantizer, x, gain))


def test_a_batch_at_one_timestep_equals_its_samples() -> None:
    torch.manual_seed(0)
    quantizer = made()
    x = torch.randn(4, 7, 3)
    quantizer.clock.set(400)
    assert torch.equal(quantizer(x), fake_quantize(x, quantizer.scale[1], torch.tensor(7.0), 0, 15))


def test_the_dtype_of_the_input_is_kept() -> None:
    x = torch.randn(4, 3, dtype=torch.bfloat16)
    assert made()(x).dtype == torch.bfloat16


def test_learned_step_sizes_are_folded_into_the_scale() -> None:
    torch.manual_seed(0)
    quantizer = made()
    x = torch.randn(4, 5, 6, 6)
    before = quantizer(x)
    (gain,) = quantizer.begin_learning()
    assert torch.equal(quantizer(x), before)
    quantizer(x).square().sum().backward()
    assert gain.grad is not None
    assert (gain.grad != 0).all()
    with torch.no_grad():
        gain.copy_(torch.tensor([0.2, -0.1, 0.05]))
    learned = quantizer(x).detach()
    quantizer.end_learning()
    torch.testing.assert_close(
        quantizer.scale, torch.tensor([0.1, 0.25, 0.6]) * torch.tensor([0.2, -0.1, 0.05]).exp(), rtol=1e-6, atol=0
    )
    assert torch.equal(quantizer(x), learned)
    assert list(quantizer.parameters()) == []


def test_given_scales_are_followed_after_step_sizes_were_learned() -> None:
    torch.manual_seed(0)
    quantizer, x = made(), torch.randn(4, 5)
    quantizer.begin_learning()
    quantizer.end_learning()
    scale = torch.tensor([0.2, 0.3, 0.4], requires_grad=True)
    quantizer.follow(scale)
    followed = quantizer(x)
    followed.sum().backward()
    assert scale.grad is not None
    quantizer.log_gain = None
    quantizer.set_rows(scale.detach(), quantizer.zero_point)
    torch.testing.assert_close(followed.detach(), quantizer(x))


def test_groups_that_no_sample_is_in_get_no_gradient() -> None:
    torch.manual_seed(0)
    quantizer = made()
    (gain,) = quantizer.begin_learning()
    quantizer.clock.set(torch.tensor([999, 0]))
    quantizer(torch.randn(2, 9)).square().sum().backward()
    assert gain.grad is not None
    assert (gain.grad != 0).tolist() == [True, False, True]


def test_the_state_round_trips_strictly_and_holds_no_clock() -> None:
    quantizer, fresh = made(), AffineQuantizer(AffineGrid(bits=4), StepClock(StepGroups(boundaries=(100.0, 700.0))))
    state = quantizer.state_dict()
    assert {name: value.dtype for name, value in state.items()} == {"scale": torch.float32, "zero_point": torch.int16}
    fresh.load_state_dict(state, strict=True)
    assert torch.equal(fresh.scale, quantizer.scale)
    assert torch.equal(fresh.zero_point, quantizer.zero_point)
