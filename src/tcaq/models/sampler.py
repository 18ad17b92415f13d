"""Sample from a pipeline with stock diffusers, and record what its denoiser was given."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from tcaq.errors import NumericalError
from tcaq.layers.hold import holding_weights
from tcaq.models.denoiser import bind, find_denoiser
from tcaq.models.seeds import generators


@dataclass(frozen=True)
class Trajectories:
    """The denoiser's inputs over sampling runs.

    Attributes: samples: float [steps, images, channels, height, width], x_t; timesteps: [steps], as the denoiser received them;
        weights: None, or float [steps], how much each step counts in calibration.
    """

    samples: Tensor
    timesteps: Tensor
    weights: Tensor | None = None

    def __post_init__(self) -> None:
        if not bool(torch.isfinite(self.samples).all()):
            step = int((~torch.isfinite(self.samples)).flatten(1).any(dim=1).nonzero()[0])
            raise NumericalError(
                f"x_t is not finite from step {step} (t = {float(self.timesteps[step]):g}) of a sampling run on"
            )

    @property
    def shares(self) -> Tensor:
        """How much each step counts, float64 [steps], sum 1; alike where nothing else was said."""
        weights = torch.ones(len(self.timesteps)) if self.weights is None else self.weights
        return weights.double() / weights.double().sum()

    @staticmethod
    def join(parts: Sequence[Trajectories]) -> Trajectories:
        """Trajectories of several batches, images after images."""
        return Trajectories(torch.cat([part.samples for part in parts], dim=1), parts[0].timesteps)


def sample(pipe: DiffusionPipeline, seeds: Sequence[int], steps: int, **options: Any) -> Tensor:
    """One batch of images, each from its own seed.

    Returns: uint8 [images, channels, height, width]. `options` go to the pipeline's call.
    """
    accepted = inspect.signature(pipe.__call__).parameters
    if "batch_size" in accepted:
        options["batch_size"] = len(seeds)
    pipe.set_progress_bar_config(disable=True)
    with holding_weights(find_denoiser(pipe)[1]):
        result = pipe(generator=generators(seeds), num_inference_steps=steps, output_type="np", **options)
    images = torch.from_numpy(result.images).permute(0, 3, 1, 2)
    return images.mul(255).round().to(torch.uint8)


def batches(seeds: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """The seeds in batches of at most `size`."""
    for start in range(0, len(seeds), size):
        yield seeds[start : start + size]


@contextmanager
def recording(denoiser: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Inside the block every (x_t, t) that the denoiser is given is appended to the list."""
    calls: list[tuple[Tensor, Tensor]] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = bind(module, args, kwargs)
        calls.append(
            (cast(Tensor, given["sample"]).detach().clone(), torch.as_tensor(given["timestep"]).reshape(-1)[:1])
        )

    handle = denoiser.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def record(pipe: DiffusionPipeline, seeds: Sequence[int], steps: int) -> tuple[Tensor, Trajectories]:
    """Sample one batch and record its trajectories in the same pass.

    Returns: images, uint8 [images, channels, height, width], and the trajectories of every step.
    """
    with recording(find_denoiser(pipe)[1]) as calls:
        images = sample(pipe, seeds, steps)
    return images, Trajectories(torch.stack([x for x, _ in calls]), torch.cat([t for _, t in calls]))


@torch.no_grad()
def predict(denoiser: nn.Module, trajectories: Trajectories) -> Tensor:
    """The denoiser's predictions on recorded inputs, float [steps, images, ...]."""
    pairs = zip(trajectories.samples, trajectories.timesteps, strict=True)
    return torch.stack([denoiser(x, t).sample for x, t in pairs])
