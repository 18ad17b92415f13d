"""Collect: sample from the model as it runs now and record every step of every image in one pass."""

from __future__ import annotations

from collections.abc import Sequence

from diffusers import DiffusionPipeline
from torch import Tensor

from tcaq.models.sampler import Trajectories, record
from tcaq.records import Record


def collect(pipe: DiffusionPipeline, seeds: Sequence[int], steps: int) -> Record:
    """Record one batch of trajectories: `samples` [steps, images, ...], `timesteps` [steps], `images` uint8."""
    images, trajectories = record(pipe, seeds, steps)
    return Record({"samples": trajectories.samples, "timesteps": trajectories.timesteps, "images": images})


def trajectories_of(record_: Record) -> Trajectories:
    """The trajectories that a collect record holds."""
    return Trajectories(record_.tensors["samples"], record_.tensors["timesteps"])


def images_of(record_: Record) -> Tensor:
    """The images at the end of the trajectories, uint8 [images, channels, height, width]."""
    return record_.tensors["images"]
