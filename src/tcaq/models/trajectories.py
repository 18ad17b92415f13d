"""Trajectories: what a denoiser was given over sampling runs, call by call and image by image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from tcaq.errors import ModelError, NumericalError
from tcaq.models.architectures import architecture
from tcaq.models.conditioning import Conditioning
from tcaq.models.inputs import Inputs, inputs_of_call


@dataclass(frozen=True)
class Trajectories:
    """The denoiser's inputs over sampling runs.

    A call is one evaluation of the denoiser for each image. Where classifier-free guidance asks for two at a timestep, in one
    batch of twice the size or one after the other, they are two calls; without it a call is a step.

    Attributes: samples: float [calls, images, ...], x_t; timesteps: [calls], as the denoiser received them; conditioning: whatever
        else it was given; weights: None, or float [calls], how much each call counts in calibration.
    """

    samples: Tensor
    timesteps: Tensor
    conditioning: Conditioning = field(default_factory=Conditioning)
    weights: Tensor | None = None

    def __post_init__(self) -> None:
        if not bool(torch.isfinite(self.samples).all()):
            step = int((~torch.isfinite(self.samples)).flatten(1).any(dim=1).nonzero()[0])
            raise NumericalError(
                f"x_t is not finite from step {step} (t = {float(self.timesteps[step]):g}) of a sampling run on"
            )

    @property
    def shares(self) -> Tensor:
        """How much each call counts, float64 [calls], sum 1; alike where nothing else was said."""
        weights = torch.ones(len(self.timesteps)) if self.weights is None else self.weights
        return weights.double() / weights.double().sum()

    @property
    def steps(self) -> Tensor:
        """The position of each call along the sampling schedule, int64 [calls]: calls at one timestep in a row are one step."""
        step: Tensor = torch.unique_consecutive(self.timesteps, return_inverse=True)[1]
        return step

    def calls(self) -> Iterator[Inputs]:
        """The inputs of each call for all images, in order."""
        for call, (x, t) in enumerate(zip(self.samples, self.timesteps, strict=True)):
            yield Inputs(x, t.expand(len(x)), *self.conditioning.at(call))

    def draw(self, calls: Tensor, images: Tensor) -> Inputs:
        """The inputs of one image in each of several calls, int64 [n] both. Raises: UsageError if they make no common batch."""
        return Inputs(self.samples[calls, images], self.timesteps[calls], *self.conditioning.of(calls, images))

    def first(self, images: int) -> Trajectories:
        """Those of the first images."""
        return replace(self, samples=self.samples[:, :images], conditioning=self.conditioning.first(images))

    @staticmethod
    def join(parts: Sequence[Trajectories]) -> Trajectories:
        """Trajectories of several batches, images after images."""
        samples = torch.cat([part.samples for part in parts], dim=1)
        return Trajectories(samples, parts[0].timesteps, Conditioning.join([part.conditioning for part in parts]))

    @staticmethod
    def recorded(calls: Sequence[Inputs]) -> Trajectories:
        """Those of one batch. Raises: NumericalError if an x_t is not finite."""
        samples, timesteps = torch.stack([c.sample for c in calls]), torch.stack([c.timestep[0] for c in calls])
        return Trajectories(samples, timesteps, Conditioning.recorded(calls))


@contextmanager
def recording(denoiser: nn.Module, images: int) -> Iterator[list[Inputs]]:
    """Inside the block what the denoiser is given for each of `images` images is appended to the list, call by call.

    Raises: ModelError if the denoiser is called with a number of rows that is no multiple of the images.
    """
    calls: list[Inputs] = []
    shared = frozenset(architecture(denoiser).shared)

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = inputs_of_call(module, args, kwargs, shared)
        if len(given) % images:
            raise ModelError(
                f"{type(module).__name__} was called with {len(given)} rows for {images} images; calibration needs calls with a "
                "whole number of rows for each image. Leave the feature of the pipeline off that makes others"
            )
        # the halves of guidance lie one behind the other
        calls.extend(Inputs(p.sample.detach().clone(), p.timestep, p.rows, p.whole) for p in given.split(images))

    handle = denoiser.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


@torch.no_grad()
def predict(denoiser: nn.Module, trajectories: Trajectories) -> Tensor:
    """The denoiser's predictions on recorded inputs, float [calls, images, ...]."""
    return torch.stack([inputs(denoiser) for inputs in trajectories.calls()])
