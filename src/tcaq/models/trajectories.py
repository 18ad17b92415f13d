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
from tcaq.models.conditioning import Conditioning, same
from tcaq.models.inputs import Inputs, inputs_of_call
from tcaq.models.store import Store


@dataclass(frozen=True)
class Trajectories:
    """The denoiser's inputs over sampling runs.

    A call is one evaluation of the denoiser for each image. Where classifier-free guidance asks for two at a timestep, in one
    batch of twice the size or one after the other, they are two calls; without it a call is a step.

    Attributes: samples: float [calls, images, ...], x_t; timesteps: [calls], as the denoiser received them; conditioning: whatever
        else it was given; weights: None, or float [calls], how much each call counts in calibration; window: None, or two float
        [calls], within which the calls and draws made of these trajectories see x_t.
    """

    samples: Tensor
    timesteps: Tensor
    conditioning: Conditioning = field(default_factory=Conditioning)
    weights: Tensor | None = None
    window: tuple[Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        for step, x in enumerate(self.samples):  # one by one: all together may not fit into memory
            if not bool(torch.isfinite(x).all()):
                t = float(self.timesteps[step])
                raise NumericalError(f"x_t is not finite from step {step} (t = {t:g}) of a sampling run on")

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
        for call in range(len(self.samples)):
            yield self.call(call)

    def call(self, number: int) -> Inputs:
        """The inputs of one call for all images."""
        x, t = self.samples[number], self.timesteps[number]
        return Inputs(self._within(x, torch.tensor([number])), t.expand(len(x)), *self.conditioning.at(number))

    def draw(self, calls: Tensor, images: Tensor) -> Inputs:
        """The inputs of one image in each of several calls, int64 [n] both. Raises: UsageError if they make no common batch."""
        x = self._within(self.samples[calls, images], calls)
        return Inputs(x, self.timesteps[calls], *self.conditioning.of(calls, images))

    def _within(self, x: Tensor, calls: Tensor) -> Tensor:
        """x_t of some calls as it is seen: float [n, ...] for int64 [n] or [1]."""
        if self.window is None:
            return x
        low, high = (bound[calls].to(x.dtype).reshape(-1, *[1] * (x.dim() - 1)) for bound in self.window)
        return torch.minimum(torch.maximum(x, low), high)

    def first(self, images: int) -> Trajectories:
        """Those of the first images."""
        return replace(self, samples=self.samples[:, :images], conditioning=self.conditioning.first(images))

    @staticmethod
    def join(parts: Sequence[Trajectories], store: Store | None = None) -> Trajectories:
        """Trajectories of several batches, images after images. Args: store: where they are put (None: memory)."""
        store, first = store or Store(), parts[0].samples
        images = sum(part.samples.shape[1] for part in parts)
        calls = zip(*(part.samples for part in parts), strict=True)
        samples = store.gather((x for call in calls for x in call), (len(first), images, *first.shape[2:]), first)
        conditioning = Conditioning.join([part.conditioning for part in parts], store)
        return Trajectories(samples, parts[0].timesteps, conditioning)

    @staticmethod
    def recorded(calls: Sequence[Inputs], store: Store | None = None) -> Trajectories:
        """Those of one batch. Args: store: see `join`. Raises: NumericalError if an x_t is not finite."""
        first = calls[0].sample
        samples = (store or Store()).gather((c.sample for c in calls), (len(calls), *first.shape), first)
        return Trajectories(samples, torch.stack([c.timestep[0] for c in calls]), Conditioning.recorded(calls))


@dataclass(frozen=True)
class Drawn:
    """Some of the recorded inputs, one image of one call each, put together only where they are needed.

    Attributes: calls, images: int64 [n].
    """

    trajectories: Trajectories
    calls: Tensor
    images: Tensor

    def __len__(self) -> int:
        return len(self.calls)

    def __getitem__(self, index: Tensor | slice) -> Inputs:
        """The inputs of some of the rows. Raises: UsageError if they make no common batch."""
        return self.trajectories.draw(self.calls[index], self.images[index])

    def __call__(self, denoiser: nn.Module) -> Tensor:
        """Run the denoiser on all of them; its prediction, float [n, ...]."""
        return self[:](denoiser)

    @property
    def timestep(self) -> Tensor:
        """The rows' timesteps, [n]."""
        return self.trajectories.timesteps[self.calls]

    def split(self, size: int) -> list[Drawn]:
        """In parts of at most `size` rows."""
        pairs = zip(self.calls.split(size), self.images.split(size), strict=True)
        return [replace(self, calls=calls, images=images) for calls, images in pairs]


@contextmanager
def recording(denoiser: nn.Module, images: int, store: Store | None = None) -> Iterator[list[Inputs]]:
    """Inside the block what the denoiser is given for each of `images` images is appended to the list, call by call.

    Args: store: where it is put (None: memory), each distinct value of what conditions the denoiser once.
    Raises: ModelError if the denoiser is called with a number of rows that is no multiple of the images.
    """
    calls: list[Inputs] = []
    shared, store = frozenset(architecture(denoiser).shared), store or Store()
    known: dict[str, list[Tensor]] = {}

    def once(path: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.detach().cpu()
        values = known.setdefault(path, [])
        found = next((other for other in values if same(other, value)), None)
        if found is None:
            values.append(found := store.keep(value))
        return found

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = inputs_of_call(module, args, kwargs, shared)
        if len(given) % images:
            raise ModelError(
                f"{type(module).__name__} was called with {len(given)} rows for {images} images; calibration needs calls with a "
                "whole number of rows for each image. Leave the feature of the pipeline off that makes others"
            )
        # the halves of guidance lie one behind the other
        for part in given.split(images):
            rows, whole = ({path: once(path, v) for path, v in found.items()} for found in (part.rows, part.whole))
            calls.append(Inputs(store.keep(part.sample.detach().cpu()), part.timestep.cpu(), rows, whole))

    handle = denoiser.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


@torch.no_grad()
def predict(
    denoiser: nn.Module, trajectories: Trajectories, calls: Sequence[int] | None = None, batch: int | None = None
) -> Tensor:  # fmt: skip
    """The denoiser's predictions on recorded inputs, float [calls, images, ...], on the CPU.

    Args: calls: which ones (None: all); batch: images at a time (None: all).
    """
    numbers = range(len(trajectories.samples)) if calls is None else calls
    size = batch or trajectories.samples.shape[1]
    calls_ = (trajectories.call(number).split(size) for number in numbers)
    return torch.stack([torch.cat([part(denoiser).cpu() for part in parts]) for parts in calls_])
