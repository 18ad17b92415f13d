"""How black are the backgrounds? Gray levels of real images and of the samples that an evaluation left.

python benchmarks/background.py build/quality/samples/*
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from tcaq.reference.data import load_images
from tcaq.runs import Run


def describe(name: str, images: Tensor) -> None:
    """Print a row for uint8 images [N, 1, H, W]: levels of the three rows at top and bottom, and of all pixels."""
    values = images.float()
    border = torch.cat([values[:, :, :3], values[:, :, -3:]], dim=2)
    dark = ((values > 0) & (values <= 12)).float().mean()
    print(
        f"{name:30s} border mean {border.mean():6.2f}  mean {values.mean():6.2f}  "
        f"exactly black {(values == 0).float().mean():.3f}  levels 1 to 12 {dark:.3f}"
    )


def sampled(folder: Path) -> Tensor:
    """The images of a folder, each once, uint8 [N, C, H, W]: beside a batch, smaller ones of its first images may lie."""
    largest: dict[str, Tensor] = {}
    for item, record in Run.read(folder).results("images"):
        start, images = item.split("-")[0], record.tensors["images"]
        if start not in largest or len(images) > len(largest[start]):
            largest[start] = images
    return torch.cat(list(largest.values()))


def main() -> None:
    """Describe the test images, then each folder of samples."""
    describe("test images", load_images("test")[0])
    for folder in map(Path, sys.argv[1:]):
        describe(folder.name, sampled(folder))


if __name__ == "__main__":
    main()
