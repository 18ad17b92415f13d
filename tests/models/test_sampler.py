"""Recorded trajectories must be what diffusers' own scheduler would produce, and seeds must belong to images."""

from __future__ import annotations

import pytest
import torch
from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline, DDIMScheduler, DiffusionPipeline
from torch import nn

from tcaq.errors import ModelError, NumericalError
from tcaq.models.denoiser import attach_clock, bind, clock_of, find_denoiser
from tcaq.models.prompting import resolve_conditions
from tcaq.models.sampler import Trajectories, predict, record, recording, sample
from tcaq.models.seeds import image_seeds
from tcaq.spec.steps import StepGroups


def test_trajectories_replay_under_the_scheduler(tiny_pipeline):
    pipe = tiny_pipeline()
    images, trajectories = record(pipe, image_seeds("calibration", 0, 0, 3), 6)
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(6)
    assert torch.equal(trajectories.timesteps, scheduler.timesteps)
    eps = predict(pipe.unet, trajectories)
    for k, t in enumerate(trajectories.timesteps):
        following = scheduler.step(eps[k], t, trajectories.samples[k]).prev_sample
        if k + 1 < len(eps):
            assert torch.equal(following, trajectories.samples[k + 1])
    expected = (following / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
    assert torch.equal(images, expected)


def test_noise_belongs_to_the_image_not_to_the_batch(tiny_pipeline):
    pipe = tiny_pipeline()
    together = record(pipe, image_seeds("evaluation", 3, 0, 4), 2)[1].samples[0]
    apart = [record(pipe, image_seeds("evaluation", 3, i, i + 1), 2)[1].samples[0] for i in range(4)]
    assert torch.equal(together, torch.cat(apart))


def test_purposes_and_seeds_never_share_noise():
    seeds = [s for p in ("calibration", "evaluation", "sample") for n in (0, 1) for s in image_seeds(p, n, 0, 500)]
    assert len(set(seeds)) == len(seeds)
    assert image_seeds("calibration", 0, 3, 5) == image_seeds("calibration", 0, 0, 9)[3:5]


def test_clock_follows_the_timestep_however_it_is_passed(tiny_pipeline):
    unet = tiny_pipeline().unet
    attach_clock(unet, StepGroups(boundaries=(100.0, 500.0)))
    x = torch.zeros(2, 1, 16, 16)
    for call, expected in (
        (lambda: unet(x, 99), [0]),
        (lambda: unet(x, timestep=torch.tensor(100)), [1]),
        (lambda: unet(x, torch.tensor([700, 3])), [2, 0]),
    ):
        with torch.no_grad():
            call()
        assert clock_of(unet).group.tolist() == expected


def test_non_finite_trajectory_names_the_step():
    samples = torch.zeros(3, 1, 1, 2, 2)
    samples[1, 0, 0, 1, 0] = float("nan")
    with pytest.raises(NumericalError, match=r"step 1 \(t = 500\)"):
        Trajectories(samples, torch.tensor([900, 500, 100]))


def test_pipeline_without_denoiser_is_named():
    class Bare(DiffusionPipeline):
        def __init__(self, scheduler):
            super().__init__()
            self.register_modules(scheduler=scheduler)

    with pytest.raises(ModelError, match=r"Bare has no denoiser.*scheduler"):
        find_denoiser(Bare(DDIMScheduler()))


def test_sample_shapes_and_recording_leaves_no_hook(tiny_pipeline):
    pipe = tiny_pipeline()
    images = sample(pipe, [1, 2], 2)
    assert images.shape == (2, 1, 16, 16)
    assert images.dtype == torch.uint8
    with recording(pipe.unet, 1):
        pass
    assert not pipe.unet._forward_pre_hooks


def test_unknown_denoiser_signature_is_refused():
    with pytest.raises(ModelError, match="takes no `timestep`"):
        attach_clock(nn.Linear(2, 2), StepGroups())


def test_a_compiled_denoiser_is_refused_with_what_to_do(tiny_pipeline):
    pipe = tiny_pipeline()
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    with pytest.raises(ModelError, match=r"quantize before torch\.compile"):
        attach_clock(pipe.unet, StepGroups())
    with pytest.raises(ModelError, match=r"quantize before torch\.compile"):
        bind(pipe.unet, (torch.zeros(1, 1, 16, 16), 5), {})


def test_sampling_leaves_the_progress_bar_as_it_was(tiny_pipeline):
    pipe = tiny_pipeline()
    pipe.set_progress_bar_config(desc="mine")
    sample(pipe, [1], 1)
    assert pipe._progress_bar_config == {"desc": "mine"}


def test_labels_are_for_models_that_know_classes(tiny_pipeline):
    unet = tiny_pipeline().unet
    assert resolve_conditions(ConsistencyModelPipeline(unet, CMStochasticIterativeScheduler())).labels == ()
