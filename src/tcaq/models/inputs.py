"""What a denoiser is given: x_t, t, and whatever else conditions it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from tcaq.errors import ModelError
from tcaq.models.denoiser import bind
from tcaq.models.device import device_of, moved
from tcaq.models.nested import leaves, rebuilt

PLAIN = bool | int | float | str
IGNORED = ("return_dict",)
"""Arguments that change the form of an answer, not the answer."""


@dataclass(frozen=True)
class Inputs:
    """The arguments of one forward pass over some rows.

    Attributes: sample: float [rows, ...], x_t; timestep: [rows]; rows: tensors with a row for each sample, by path (an image's text
        embedding, its class label); whole: what all rows share, by path (position ids, flags).
    """

    sample: Tensor
    timestep: Tensor
    rows: Mapping[str, Tensor] = field(default_factory=dict)
    whole: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.sample)

    def __getitem__(self, index: Tensor | slice) -> Inputs:
        """Some of the rows."""
        rows = {path: value[index] for path, value in self.rows.items()}
        return Inputs(self.sample[index], self.timestep[index], rows, self.whole)

    def split(self, size: int) -> list[Inputs]:
        """In parts of at most `size` rows."""
        return [self[slice(start, start + size)] for start in range(0, len(self), size)]

    def __call__(self, denoiser: nn.Module) -> Tensor:
        """Run the denoiser where it is; its prediction there, float [rows, ...]."""
        device = device_of(denoiser)
        given = {path: moved(value, device) for path, value in {**self.rows, **self.whole}.items()}
        sample, timestep = self.sample.to(device), self.timestep.to(device)
        return prediction(denoiser(sample, timestep=timestep, **rebuilt(given)))


def prediction(output: Any) -> Tensor:
    """The tensor in what a denoiser puts out: the tensor itself, `.sample`, or the first of a tuple."""
    if isinstance(output, Tensor):
        return output
    return cast(Tensor, output[0] if isinstance(output, tuple) else output.sample)


def inputs_of_call(
    denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shared: frozenset[str]
) -> Inputs:  # fmt: skip
    """The arguments of a forward pass that a pipeline makes.

    Args: shared: names of arguments that have no row for each sample, whatever their size.
    Raises: ModelError if an argument is neither tensor nor plain value, or the denoiser takes no sample first.
    """
    given = bind(denoiser, args, kwargs)
    first = next(iter(inspect.signature(denoiser.forward).parameters))
    sample, timestep = given.pop(first), torch.as_tensor(given.pop("timestep"))
    if not isinstance(sample, Tensor):
        raise ModelError(f"the first argument of {type(denoiser).__name__}.forward, {first!r}, is no tensor of samples")
    found = {path: value for path, value in leaves(given) if value is not None and path not in IGNORED}
    rows = {path: value for path, value in found.items() if is_row(path, value, len(sample), shared)}
    for path, value in found.items():
        if not isinstance(value, Tensor | PLAIN):
            raise ModelError(
                f"{type(denoiser).__name__} was given {path!r}, a {type(value).__name__}: only tensors and plain values can be "
                "recorded for calibration. Leave this feature of the pipeline off"
            )
    whole = {path: value for path, value in found.items() if path not in rows}
    return Inputs(sample, timestep.reshape(-1).expand(len(sample)), rows, whole)


def is_row(path: str, value: Any, rows: int, shared: frozenset[str]) -> bool:
    """Whether a leaf has a row for each of `rows` samples."""
    if not isinstance(value, Tensor) or value.dim() == 0 or len(value) != rows:
        return False
    return shared.isdisjoint(path.split("."))
