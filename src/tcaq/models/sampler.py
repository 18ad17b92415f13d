"""Sample from a pipeline with stock diffusers, and record what its denoiser was given."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from tcaq.errors import ModelError
from tcaq.layers.hold import holding_weights
from tcaq.models.denoiser import find_denoiser
from tcaq.models.prompting import call_options, resolve_conditions
from tcaq.models.seeds import generators
from tcaq.models.store import Store
from tcaq.models.trajectories import Trajectories, predict, recording
from tcaq.spec.conditions import Conditions

__all__ = ["Trajectories", "batches", "predict", "record", "recording", "sample"]

HALVES = ("BFloat16", "Half")
"""How torch names half precision where an operation does not know it."""


def sample(
    pipe: DiffusionPipeline, seeds: Sequence[int], steps: int, conditions: Conditions | None = None, first: int = 0,
    **options: Any,
) -> Tensor:  # fmt: skip
    """One batch of images, each from its own seed.

    Args: conditions: prompts, labels, guidance and size (None: the defaults, if it is conditional); first: number of the first
        image, which decides on its prompt; options: more arguments of the pipeline's call.
    Returns: uint8 [images, channels, height, width].
    Raises: ModelError if the pipeline cannot sample in its dtype.
    """
    asked = resolve_conditions(pipe, conditions)
    options = call_options(pipe, asked, range(first, first + len(seeds))) | options
    if "batch_size" in inspect.signature(pipe.__call__).parameters:
        options["batch_size"] = len(seeds)
    shown = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(**shown | {"disable": True})
    try:
        with holding_weights(find_denoiser(pipe)[1]):
            result = pipe(generator=generators(seeds), num_inference_steps=steps, output_type="np", **options)
    except (TypeError, RuntimeError) as error:
        if not any(half in str(error) for half in HALVES):
            raise
        raise ModelError(
            f"diffusers' {type(pipe).__name__} does not run in half precision ({error}); load it in float32"
        ) from error
    finally:
        pipe.set_progress_bar_config(**shown)
    images = torch.from_numpy(result.images).permute(0, 3, 1, 2)
    return images.mul(255).round().to(torch.uint8)


def batches(seeds: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """The seeds in batches of at most `size`."""
    for start in range(0, len(seeds), size):
        yield seeds[start : start + size]


def record(
    pipe: DiffusionPipeline, seeds: Sequence[int], steps: int, conditions: Conditions | None = None, first: int = 0,
    store: Store | None = None,
) -> tuple[Tensor, Trajectories]:  # fmt: skip
    """Sample one batch and record its trajectories in the same pass; arguments as in `sample`.

    Args: store: where they are put (None: memory).
    Returns: images, uint8 [images, channels, height, width], and the trajectories of every step.
    """
    with recording(find_denoiser(pipe)[1], len(seeds), store) as calls:
        images = sample(pipe, seeds, steps, conditions, first)
    return images, Trajectories.recorded(calls, store)
