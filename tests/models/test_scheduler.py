"""Noise-aware schedulers against diffusers' own, and against the variance that the sampler intended."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, EulerDiscreteScheduler

import tcaq
from tcaq.models.scheduler import noise_aware

COUNT = 400_000


def step(scheduler, eps, t, x, seed=0):
    options = {"eta": 1.0} if isinstance(scheduler, DDIMScheduler) else {}
    return scheduler.step(eps, t, x, generator=torch.Generator().manual_seed(seed), **options).prev_sample


def made(kind, noise=None, **config):
    scheduler = kind(clip_sample=False, **config)
    if noise is not None:
        scheduler = noise_aware(scheduler, [500.0], [noise, noise / 2])
    scheduler.set_timesteps(20)
    return scheduler


@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler])
def test_without_noise_it_is_diffusers_own_bit_for_bit(kind):
    x, eps = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8)
    plain, aware = made(kind), made(kind, 0.0)
    assert type(aware) is not kind
    for t in plain.timesteps[:-1]:
        assert torch.equal(step(aware, eps, t, x), step(plain, eps, t, x))


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler])
def test_with_noise_the_step_has_the_variance_that_was_intended(kind, variance_type):
    if kind is DDIMScheduler and variance_type == "fixed_large":
        pytest.skip("DDIM has one variance")
    config = {} if kind is DDIMScheduler else {"variance_type": variance_type}
    noise, generator = 0.4, torch.Generator().manual_seed(5)
    plain, aware = made(kind, **config), made(kind, noise, **config)
    x, e = torch.full((COUNT, 1, 1, 1), 0.3), torch.full((COUNT, 1, 1, 1), 0.2)
    for t, brought in ((plain.timesteps[12], noise), (plain.timesteps[5], noise / 2)):
        assert (float(t) < 500) == (brought == noise)
        hat = e + brought**0.5 * torch.randn(e.shape, generator=generator)
        intended, found = step(plain, e, t, x, 1), step(aware, hat, t, x, 2)
        # draws of N(m, v): the sample variance is known to about sqrt(2 / COUNT) of itself
        assert float(found.var()) == pytest.approx(float(intended.var()), rel=0.01)
        assert float(found.mean()) == pytest.approx(float(intended.mean()), abs=5 * float(intended.std()) / COUNT**0.5)
        assert float(step(plain, hat, t, x, 2).var()) > 1.01 * float(intended.var())  # what is avoided


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler])
def test_noise_in_other_predictions_counts_as_the_noise_that_it_stands_for(kind, prediction):
    """The variance that a step has when its prediction is disturbed is the one that was intended."""
    noise, generator = 1e-3, torch.Generator().manual_seed(5)
    plain = made(kind, prediction_type=prediction)
    aware = made(kind, noise, prediction_type=prediction)
    x, e = torch.full((COUNT, 1, 1, 1), 0.3), torch.full((COUNT, 1, 1, 1), 0.2)
    t = plain.timesteps[12]
    hat = e + noise**0.5 * torch.randn(e.shape, generator=generator)
    share = aware.alphas_cumprod[int(t)]
    assert float(aware.brought(t)) == pytest.approx(
        noise * float(share if prediction[0] == "v" else share / (1 - share))
    )
    intended, found = step(plain, e, t, x, 1), step(aware, hat, t, x, 2)
    assert float(found.var()) == pytest.approx(float(intended.var()), rel=0.01)


def test_ddim_without_eta_adds_nothing_either_way():
    x, eps = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8)
    plain, aware = made(DDIMScheduler), made(DDIMScheduler, 0.5)
    t = plain.timesteps[3]
    assert torch.equal(aware.step(eps, t, x).prev_sample, plain.step(eps, t, x).prev_sample)


def test_other_schedulers_stay_as_they_are():
    scheduler = EulerDiscreteScheduler()
    assert noise_aware(scheduler, [], [0.1]) is scheduler


def test_it_is_saved_and_loaded_with_a_pipeline(tiny_pipeline, tmp_path, caplog):
    unet = tiny_pipeline().unet
    pipe = DDPMPipeline(unet, noise_aware(DDPMScheduler(variance_type="fixed_large"), [500.0], [0.25, 0.5]))
    pipe.save_pretrained(tmp_path)
    loaded = DDPMPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is tcaq.NoiseAwareDDPMScheduler
    assert loaded.scheduler.config.variance_type == "fixed_large"
    assert [float(loaded.scheduler.brought(t)) for t in (0, 499, 500, 999)] == [0.25, 0.25, 0.5, 0.5]
    assert not caplog.records
    # diffusers' DDIMPipeline makes a scheduler of its own class from the config: it must at least work
    DDIMPipeline(unet, noise_aware(DDIMScheduler(), [500.0], [0.25, 0.5])).save_pretrained(tmp_path / "ddim")
    assert DDIMPipeline.from_pretrained(tmp_path / "ddim")(num_inference_steps=2, output_type="np").images.shape == (
        1,
        16,
        16,
        1,
    )
