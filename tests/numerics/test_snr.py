"""Ratios and the rule of step-aware mixed precision against closed forms and loops."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler

from tcaq.numerics.snr import as_noise, forward_snr, narrowest, noise_snr, variance_of_noise


def test_the_forward_process_has_its_ratio_in_closed_form() -> None:
    share = torch.tensor([0.5, 0.8, 0.0, 0.99], dtype=torch.float64)
    torch.testing.assert_close(forward_snr(share), torch.tensor([1.0, 4.0, 0.0, 99.0], dtype=torch.float64))


@pytest.mark.parametrize("t", [0, 1, 400, 999])
def test_it_is_the_power_of_both_parts_of_a_noisy_image(t: int) -> None:
    scheduler = DDIMScheduler(num_train_timesteps=1000)
    one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    signal = scheduler.add_noise(one, zero, torch.tensor([t])).double()
    noise = scheduler.add_noise(zero, one, torch.tensor([t])).double()
    expected = float(signal.square() / noise.square())
    assert float(forward_snr(scheduler.alphas_cumprod[t])) == pytest.approx(expected, rel=2e-3)


def test_the_ratio_of_predictions_is_one_of_norms_unless_squared() -> None:
    noise = torch.tensor([[3.0, 4.0], [1.0, 0.0]])[:, None]
    error = torch.tensor([[0.0, 0.5], [2.0, 0.0]])[:, None]
    assert noise_snr(noise, error, squared=False).tolist() == [10.0, 0.5]
    assert noise_snr(noise, error, squared=True).tolist() == [100.0, 0.25]
    assert bool((noise_snr(noise, torch.zeros_like(error), squared=False) > 1e9).all())


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_every_kind_of_prediction_gives_the_noise_that_was_added(kind: str) -> None:
    torch.manual_seed(0)
    scheduler, t = DDIMScheduler(), torch.tensor([20, 500, 900])
    image, noise = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    x = scheduler.add_noise(image, noise, t)
    prediction = {"epsilon": noise, "sample": image, "v_prediction": scheduler.get_velocity(image, noise, t)}[kind]
    found = as_noise(prediction, x, scheduler.alphas_cumprod[t].double(), kind)  # type: ignore[arg-type]
    torch.testing.assert_close(found, noise, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_variance_of_noise_is_that_of_predictions_turned_into_noise(kind: str) -> None:
    generator, share = torch.Generator().manual_seed(0), torch.tensor([0.02, 0.5, 0.98], dtype=torch.float64)
    prediction = torch.randn(3, 200_000, generator=generator, dtype=torch.float64)
    found = as_noise(prediction, torch.full_like(prediction, 0.3), share, kind)  # type: ignore[arg-type]
    expected = variance_of_noise(share, kind)  # type: ignore[arg-type]
    torch.testing.assert_close(found.var(dim=1), expected, rtol=0.02, atol=0.0)


def test_the_narrowest_width_that_is_enough_equals_a_loop() -> None:
    torch.manual_seed(0)
    snr, least = torch.rand(3, 200).cumsum(0), torch.rand(200) * 3
    for step, found in enumerate(narrowest(snr, least).tolist()):
        assert found == next((w for w in range(3) if snr[w, step] > least[step]), 2)
    assert narrowest(torch.tensor([[1.0], [5.0]]), torch.tensor([1.0])).tolist() == [1]  # equal is not above
    assert narrowest(torch.tensor([[math.inf], [math.inf]]), torch.tensor([1e9])).tolist() == [0]
