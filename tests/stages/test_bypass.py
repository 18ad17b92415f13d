"""What the first layer cuts off goes around the denoiser with the float model's own gain."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DOutput

from tcaq.errors import ModelError
from tcaq.layers.modes import faking, floating
from tcaq.models.bypass import bypass_of
from tcaq.models.denoiser import clock_of
from tcaq.spec.recipe import Bypass, Reconstruction
from tcaq.stages.bypass import apply_bypass, inside, measure_bypass, planted
from tcaq.stages.learn import begin

from .conftest import build, initialise

SPEC = Bypass(reach=2.0, images=3, share=0.02)


def bypassed(scene, gain=1.5, reach=2.0):
    record = measure_bypass(scene.unet, scene.trajectories, SPEC, 4, 0)
    record.tensors["gain"].fill_(gain)
    record.tensors["reach"].fill_(reach)
    apply_bypass(scene.unet, record)
    return bypass_of(scene.unet)


def test_the_gain_of_a_known_denoiser_is_found(scene, monkeypatch):
    timesteps = scene.trajectories.timesteps
    slopes = {float(t): 0.5 + k for k, t in enumerate(timesteps)}

    def forward(sample, timestep):
        return UNet2DOutput(sample=slopes[float(timestep.reshape(-1)[0])] * sample + 3.0)

    monkeypatch.setattr(scene.unet, "forward", forward)
    record = measure_bypass(scene.unet, scene.trajectories, SPEC, 4, 0)
    expected = [slopes[float(t)] for t in timesteps.sort().values]  # group 0 holds the smallest timestep
    torch.testing.assert_close(record.tensors["gain"], torch.tensor(expected), rtol=1e-4, atol=1e-4)
    samples = scene.trajectories.samples
    reach = (2.0 * samples.flatten(1).std(dim=1)).clamp(min=samples[-1].abs().max())
    torch.testing.assert_close(record.tensors["reach"], reach[timesteps.argsort()])


def test_what_the_images_hold_is_never_cut_off(scene):
    samples = scene.trajectories.samples.clone()
    samples[-1, 0, 0, 3, 3] = 7.5
    record = measure_bypass(scene.unet, replace(scene.trajectories, samples=samples), SPEC, 4, 0)
    torch.testing.assert_close(record.tensors["reach"], torch.full((len(samples),), 7.5))


def test_planted_elements_move_outwards_and_all_others_stay():
    samples, reach = torch.randn(3, 2, 1, 8, 8), torch.tensor([0.5, 1.0, 2.0])
    edge, moved = planted(samples, reach, 0.1, torch.Generator().manual_seed(0))
    limit = reach.reshape(3, 1, 1, 1, 1)
    assert bool((edge.abs() <= limit).all())
    changed = moved != edge
    assert 0 < changed.float().mean() < 0.2
    assert torch.equal(edge.abs()[changed], limit.expand_as(edge)[changed])
    further = moved[changed] / edge[changed]
    assert bool(((further >= 1) & (further <= 2)).all())
    inner = ~changed & (samples.abs() <= limit)
    assert torch.equal(edge[inner], samples[inner])


def test_the_grid_reaches_as_far_as_the_record_says(ready):
    bypassed(ready, reach=2.5)
    clock_of(ready.unet).set(500)
    layer, bypass = ready.unet.conv_in, bypass_of(ready.unet)
    torch.testing.assert_close(bypass.high, torch.full((4,), 2.5))
    assert bool(((bypass.low > -2.55) & (bypass.low <= -2.5)).all())
    far = torch.tensor([-9.0, 9.0]).reshape(1, 1, 1, 2)
    torch.testing.assert_close(layer.quantized_input(far), bypass.inside(far))


def test_no_fit_changes_how_far_the_first_layer_reads(ready):
    bypassed(ready)
    layer = ready.unet.conv_in
    assert not begin([layer], Reconstruction(rounding_rate=0), 0.0, rounding=False, scales=True)
    assert begin([ready.unet.conv_out], Reconstruction(rounding_rate=0), 0.0, rounding=False, scales=True)


@torch.no_grad()
def test_the_prediction_grows_by_gain_times_what_is_cut_off(ready):
    bypass = bypassed(ready)
    x, t = 3 * torch.randn(2, 1, 16, 16), torch.tensor(500)
    with faking(ready.unet):
        out = ready.unet(x, t).sample
        clipped = bypass.inside(x)
        assert 0.1 < (clipped != x).float().mean() < 0.9
        assert torch.equal(clipped, bypass.inside(clipped))
        torch.testing.assert_close(out, ready.unet(clipped, t).sample + 1.5 * (x - clipped), rtol=1e-5, atol=1e-5)
        assert torch.equal(out, ready.unet(x, t, return_dict=False)[0])
        assert torch.equal(out, ready.unet(sample=x, timestep=t).sample)


@torch.no_grad()
def test_in_a_mixed_batch_each_sample_has_its_own_gain(ready):
    bypass = bypassed(ready)
    bypass.gain.copy_(torch.arange(len(bypass.gain)) + 1.0)
    x, t = 3 * torch.randn(2, 1, 16, 16), ready.trajectories.timesteps[[0, -1]]
    with faking(ready.unet):
        both = ready.unet(x, t).sample
        alone = torch.cat([ready.unet(x[i : i + 1], t[i]).sample for i in range(2)])
    torch.testing.assert_close(both, alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_more_channels_in_or_out_stay_as_they_are(ready):
    bypass = bypassed(ready)
    clock_of(ready.unet).set(500)
    x = torch.full((1, 1, 4, 4), 5.0)
    out = bypass(x, torch.zeros(1, 2, 4, 4))
    assert float(out[:, 0].min()) == pytest.approx(1.5 * 3.0, abs=0.1)
    assert not out[:, 1].any()


@torch.no_grad()
def test_float_mode_is_not_touched(ready, tiny_pipeline):
    bypassed(ready)
    x, t = 3 * torch.randn(2, 1, 16, 16), torch.tensor(500)
    with floating(ready.unet):
        assert torch.equal(ready.unet(x, t).sample, tiny_pipeline().unet(x, t).sample)


def test_fits_see_what_the_first_layer_reads(ready):
    assert inside(ready.unet, ready.trajectories) is ready.trajectories
    bypassed(ready, reach=1.0)
    trajectories = inside(ready.unet, ready.trajectories)
    seen = torch.stack([inputs.sample for inputs in trajectories.calls()])
    assert float(seen.abs().max()) < 1.01
    within = ready.trajectories.samples.abs() < 1.0
    assert torch.equal(seen[within], ready.trajectories.samples[within])


def test_a_pixel_far_out_does_not_run_away(tiny_pipeline):
    """A denoiser that answers to no pixel beyond its grid, in DDIM: with the bypass the pixel ends where its noise says."""
    scene = build(tiny_pipeline())
    initialise(scene)
    unet, scheduler = scene.unet, scene.pipe.scheduler

    def final(gains):
        bypass = bypassed(scene, reach=3.0)
        bypass.gain.copy_(gains)
        scheduler.set_timesteps(20)
        x = torch.full((1, 1, 1, 1), 6.0)
        for t in scheduler.timesteps:
            clock_of(unet).set(t)
            sigma = (1 - scheduler.alphas_cumprod[t]).sqrt()
            answer = bypass.inside(x) / sigma  # all of x within the grid is taken for noise
            x = scheduler.step(bypass(x, answer), t, x, use_clipped_model_output=False).prev_sample
        return float(x.abs())

    boundaries = clock_of(unet).groups
    gains = torch.ones(boundaries.count)
    scheduler.register_to_config(clip_sample=False)
    assert final(0 * gains) > 50
    assert final(gains) < 6.0


def test_an_unknown_first_layer_is_refused(scene, monkeypatch):
    record = measure_bypass(scene.unet, scene.trajectories, SPEC, 4, 0)
    monkeypatch.setattr("tcaq.stages.bypass.entrance_of", lambda _: None)
    with pytest.raises(ModelError, match="no quantized first layer"):
        apply_bypass(scene.unet, record)
