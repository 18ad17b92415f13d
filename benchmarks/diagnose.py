"""Where does a quantized model lose its images? Give it the float model back for some steps, or for one unit, and sample again.

    python benchmarks/diagnose.py build/explore/quick-base steps
    python benchmarks/diagnose.py build/explore/quick-base units

Bundled model, evaluation seed 7 (no published number uses it). What is given back and changes the distance most, costs most.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from protocol import add_protocol
from torch import nn

from tcaq import load
from tcaq.evaluate.features import DataStatistics, load_features
from tcaq.evaluate.metrics import Moments, frechet_distance, psnr
from tcaq.layers.insert import replace
from tcaq.models.denoiser import find_denoiser
from tcaq.models.sampler import sample
from tcaq.models.seeds import image_seeds
from tcaq.models.units import execution_order
from tcaq.reference import load_pipeline, load_statistics

EDGES = (0, 50, 100, 200, 400, 600, 800, 1000)


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("what", choices=["steps", "units"])
    add_protocol(parser, num=200, steps=20, seed=7)
    return parser.parse_args()


class Scorer:
    """Samples from a pipeline and prints how far its images are from the data and from the float model's images."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.extractor = args, load_features("reference")
        self.data = load_statistics()
        self.float_images = self.sampled(load_pipeline())
        self.float_moments = Moments.of(self.extractor.extract(self.float_images))
        self.float_fd = distance(self.float_moments, self.data)

    def sampled(self, pipe: DiffusionPipeline) -> torch.Tensor:
        """Images, uint8 [num, 1, 32, 32]."""
        return sample(pipe, image_seeds("evaluation", self.args.seed, 0, self.args.num), self.args.steps)

    def line(self, name: str, pipe: DiffusionPipeline) -> None:
        """A row of the table."""
        images = self.sampled(pipe)
        own = Moments.of(self.extractor.extract(images))
        ratio, apart = distance(own, self.data) / self.float_fd, distance(own, self.float_moments)
        fidelity = psnr(images, self.float_images).mean()
        print(f"{name:44s} ratio {ratio:6.3f}  to float {apart:6.3f}  PSNR {fidelity:5.2f}", flush=True)


def distance(a: Moments, b: DataStatistics) -> float:
    """Fréchet distance between two sets of features."""
    return frechet_distance(a.mean, a.covariance, b.mean, b.covariance)


def switching(quantized: nn.Module, float_: nn.Module, chosen: Callable[[float], bool]) -> None:
    """Have the quantized denoiser hand over to the float one at the timesteps that are chosen."""
    original = quantized.forward

    def forward(sample: torch.Tensor, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        at = float(torch.as_tensor(timestep).reshape(-1)[0])
        return (float_ if chosen(at) else original)(sample, timestep, *args, **kwargs)

    quantized.forward = forward


def by_steps(args: argparse.Namespace, scorer: Scorer) -> None:
    """Quantize only a part of the steps, then all but that part."""
    for low, high in pairwise(EDGES):
        pipe, original = load(args.checkpoint), load_pipeline()
        switching(find_denoiser(pipe)[1], find_denoiser(original)[1], lambda t, a=low, b=high: not a <= t < b)
        scorer.line(f"only {low} <= t < {high} quantized", pipe)
        pipe = load(args.checkpoint)
        switching(find_denoiser(pipe)[1], find_denoiser(original)[1], lambda t, a=low, b=high: a <= t < b)
        scorer.line(f"all but {low} <= t < {high} quantized", pipe)


def by_units(args: argparse.Namespace, scorer: Scorer) -> None:
    """Give the float model's unit back, one at a time."""
    pipe = load(args.checkpoint)
    denoiser = find_denoiser(pipe)[1]
    with torch.no_grad():
        units = execution_order(denoiser, lambda: denoiser(torch.zeros(1, 1, 32, 32), 0))
    for unit in units:
        pipe, original = load(args.checkpoint), load_pipeline()
        replace(find_denoiser(pipe)[1], unit.name, find_denoiser(original)[1].get_submodule(unit.name))
        scorer.line(f"float {unit.name}", pipe)


def main() -> None:
    """Print the table."""
    args = arguments()
    scorer = Scorer(args)
    print(f"float model: FD {scorer.float_fd:.3f}")
    scorer.line("all quantized", load(args.checkpoint))
    (by_steps if args.what == "steps" else by_units)(args, scorer)


if __name__ == "__main__":
    main()
