"""Collect: sample from the model as it runs now and record every step of every image in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from tcaq.models.conditioning import Argument, Conditioning
from tcaq.models.sampler import record
from tcaq.models.store import Store
from tcaq.models.trajectories import Trajectories
from tcaq.records import Record
from tcaq.spec.conditions import Conditions

GIVEN = "given"


def collect(
    pipe: DiffusionPipeline, seeds: Sequence[int], steps: int, conditions: Conditions | None = None, first: int = 0,
    store: Store | None = None,
) -> Record:  # fmt: skip
    """Record one batch of trajectories: `samples` [calls, images, ...], `timesteps` [calls], `images` uint8.

    What conditional models are given beside is `given|path|number`, each distinct value once; which call was given which of
    them, and what is no tensor, is in the meta.

    Args: store: where all of it is put (None: memory).
    """
    images, trajectories = record(pipe, seeds, steps, conditions, first, store)
    tensors = {"samples": trajectories.samples, "timesteps": trajectories.timesteps, "images": images}
    meta: dict[str, Any] = {}
    for path, argument in trajectories.conditioning.arguments.items():
        plain: list[Any] = [None if isinstance(value, Tensor) else value for value in argument.values]
        meta[path] = {"index": argument.index.tolist(), "by_image": argument.by_image, "plain": plain}
        for number, value in enumerate(argument.values):
            if isinstance(value, Tensor):
                tensors[f"{GIVEN}|{path}|{number}"] = value
    return Record(tensors, {GIVEN: meta} if meta else {})


def trajectories_of(record_: Record) -> Trajectories:
    """The trajectories that a collect record holds."""
    arguments = {}
    for path, entry in record_.meta.get(GIVEN, {}).items():
        values = [record_.tensors.get(f"{GIVEN}|{path}|{i}", plain) for i, plain in enumerate(entry["plain"])]
        arguments[path] = Argument(tuple(values), torch.tensor(entry["index"]), entry["by_image"])
    return Trajectories(record_.tensors["samples"], record_.tensors["timesteps"], Conditioning(arguments))


def images_of(record_: Record) -> Tensor:
    """The images at the end of the trajectories, uint8 [images, channels, height, width]."""
    return record_.tensors["images"]
