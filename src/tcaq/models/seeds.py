"""Seeds per image: results depend on neither batch size nor process count, and purposes never share noise."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

import torch


def image_seeds(purpose: str, seed: int, start: int, stop: int) -> list[int]:
    """One seed for each image index in [start, stop); the same index of another purpose or seed has another seed."""
    names = (f"{purpose}/{seed}/{index}" for index in range(start, stop))
    return [int.from_bytes(sha256(name.encode()).digest()[:7], "big") for name in names]


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator an image."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]
