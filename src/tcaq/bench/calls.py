"""What is timed: the first call that a pipeline makes of its denoiser."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from tcaq.export.example import first_arguments
from tcaq.models.denoiser import bind, find_denoiser
from tcaq.models.nested import mapped
from tcaq.spec.conditions import Conditions

Arguments = Mapping[str, Any]
"""Of the denoiser's `forward`, by name."""
TIMESTEP = "timestep"


def call_of(pipe: DiffusionPipeline, images: int, size: int | None, conditions: Conditions | None) -> Arguments:
    """The arguments for a number of images; with guidance in one batch, two rows an image.

    Args: pipe: the float one; size: height and width in pixels (None: the model's own); conditions: what it is asked for.
    Raises: UsageError if the pipeline makes images of one size alone.
    """
    denoiser = find_denoiser(pipe)[1]
    if size is not None and conditions is not None:
        conditions = conditions.model_copy(update={"height": size, "width": size})
    given = bind(denoiser, *first_arguments(pipe, images, conditions))
    if size is not None and conditions is None:
        first = next(iter(inspect.signature(denoiser.forward).parameters))
        shape = (*given[first].shape[:2], size, size)
        given[first] = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return given


def ready(denoiser: nn.Module, arguments: Arguments) -> Callable[[], object]:
    """The call, its floating-point arguments in the denoiser's dtype, ready to be made again and again."""
    dtype = getattr(denoiser, "dtype", torch.float32)

    def cast(path: str, value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point() and path != TIMESTEP
        return value.to(dtype) if floating else value

    given = mapped(arguments, cast)
    return lambda: denoiser(**given)
