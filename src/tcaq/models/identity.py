"""Parts of a run's identity that belong to the pipeline around the denoiser."""

from __future__ import annotations

import math
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from tcaq.models.denoiser import find_denoiser
from tcaq.models.load import weights_hash

TOLD_APART = ("DDIMScheduler", "DDPMScheduler")
"""Schedulers whose configs differ in their fields; others may share one."""
DECODERS = ("vae", "vqvae", "safety_checker", "feature_extractor")
"""Parts that come after the last step: images are made by them, trajectories are not, save those that start from a picture."""


def sampler_identity(pipe: DiffusionPipeline) -> dict[str, Any]:
    """The scheduler's config, with its class where the config would not tell."""
    name = type(pipe.scheduler).__name__
    config = {k: _json(v) for k, v in sorted(pipe.scheduler.config.items()) if not k.startswith("_")}
    return config if name in TOLD_APART else config | {"class": name}


def _json(value: Any) -> Any:
    """A setting as JSON knows it, which has no infinity."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def conditioners(pipe: DiffusionPipeline, decoders: bool = False) -> dict[str, Any]:
    """Hashes of the networks that make conditions, such as text encoders, under one key; empty where there are none.

    Args: decoders: those that make images, too: where images count, or pictures are encoded by them.
    """
    left_out = (find_denoiser(pipe)[0], *(() if decoders else DECODERS))
    networks = {name: part for name, part in sorted(pipe.components.items()) if isinstance(part, nn.Module)}
    found = {name: weights_hash(part) for name, part in networks.items() if name not in left_out}
    return {"conditioners": found} if found else {}
