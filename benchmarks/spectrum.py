"""Which errors of a prediction reach the image: by spatial frequency and by step.

    python benchmarks/spectrum.py                          how much an error in each band, at each step, changes the final image
    python benchmarks/spectrum.py FOLDER ...               what errors quantized models make in each band, and what comes of them

Bands are those of `balance` "bands": what averages over squares of 2 x 2, 4 x 4, ... take away, and last the mean of all
positions. The float model is the bundled one. Evaluation seed 7, which no published number uses.

Small errors reach the image through the Jacobian J of all that follows. One pass backwards from random numbers v in place of the
image gives J^T v for every step at once, whose power in a band is, in the mean over v, that of J on errors of this band.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path

import torch
from diffusers import DDIMPipeline
from torch import Tensor

import tcaq
from tcaq.evaluate.sampling import trace
from tcaq.models.trajectories import Trajectories, predict
from tcaq.numerics.bands import bands
from tcaq.reference import load_pipeline
from tcaq.stages.teaching import by_band


def sensitivity(pipe: DDIMPipeline, trajectories: Trajectories) -> Tensor:
    """Power in the final image for each unit of power in a step's prediction, float [steps, images, bands]."""
    backwards = torch.randn(trajectories.samples[0].shape, generator=torch.Generator().manual_seed(0))
    gains = []
    for t, start in zip(trajectories.timesteps.flip(0), reversed(list(trajectories.samples)), strict=True):
        x = start.clone().requires_grad_()
        eps = pipe.unet(x, t).sample
        x_next = pipe.scheduler.step(eps, t, x, eta=0.0).prev_sample
        to_eps, backwards = torch.autograd.grad(x_next, [eps, x], backwards)
        gains.append(gain_of_bands(to_eps))
    return torch.stack(gains[::-1])


def gain_of_bands(gradient: Tensor) -> Tensor:
    """Power of a gradient in each band, for each of the band's dimensions; float [images, bands].

    Args: gradient: float [images, channels, height, width], a power of two high and wide.
    """
    sizes = [band.shape[2] * band.shape[3] for band in bands(gradient)]
    dimensions = torch.tensor([own - less for own, less in pairwise([*sizes, 0])])
    return by_band(gradient, 2.0) * sizes[0] / (dimensions * gradient.shape[1])


def show_sensitivity(gains: Tensor, timesteps: Tensor) -> None:
    """A row for every third step: the mean over images, and their median."""
    for step in range(0, len(gains), 3):
        mean, median = gains[step].mean(dim=0), gains[step].median(dim=0).values
        print(f"t {int(timesteps[step]):4d}  mean {_row(mean)}  median {_row(median)}", flush=True)


def _row(values: Tensor) -> str:
    return "  ".join(f"{value:8.4f}" for value in values.tolist())


def consequences(powers: Tensor, gains: Tensor) -> None:
    """What comes of errors with these powers, float [steps, bands], and the shares of bands and of fifths of the steps in it."""
    for name, gain in (("mean", gains.mean(dim=1)), ("median", gains.median(dim=1).values)):
        parts = powers * gain
        bands_, steps = parts.sum(dim=0) / parts.sum(), [own.sum() / parts.sum() for own in parts.tensor_split(5)]
        print(f"image's error by {name} sensitivity {float(parts.sum()):.2e}  by band {_row(bands_)}  by fifth of the steps "
              f"{_row(torch.stack(steps))}")  # fmt: skip


def spectra(folder: Path, alphas: Tensor, float_: Tensor, trajectories: Trajectories) -> Tensor:
    """A row for every third step: power of a quantized model's errors in each band, of the part that all images share, and how the
    error follows the image: slope on the float model's idea of the image, as a change of its contrast.

    Args: alphas: the scheduler's cumulative products, by timestep; float_: the float model's predictions on the trajectories.
    Returns: the mean power of the errors, float [steps, bands].
    """
    error = predict(tcaq.load(folder).unet, trajectories) - float_
    for step in range(0, len(error), 3):
        a = alphas[int(trajectories.timesteps[step])]
        image = (trajectories.samples[step] - (1 - a).sqrt() * float_[step]) / a.sqrt()
        terms = torch.stack([float_[step].flatten(), image.flatten(), torch.ones(image.numel())], dim=1).double()
        slopes = torch.linalg.lstsq(terms, error[step].flatten().double()[:, None]).solution[:, 0]
        contrast = float(-((1 - a) / a).sqrt() * slopes[1])
        bands = "  ".join(f"{power:.1e}" for power in by_band(error[step], 2.0).mean(dim=0).tolist())
        shared = float(error[step].mean()) ** 2
        print(
            f"t {int(trajectories.timesteps[step]):4d}  {bands}  shared {shared:.1e}  contrast {contrast:+.3f}",
            flush=True,
        )
    return torch.stack([by_band(own, 2.0).mean(dim=0) for own in error])


def main() -> None:
    """The float model's sensitivity, or the errors of each folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--images", type=int, default=32)
    args = parser.parse_args()
    pipe = load_pipeline()
    trajectories = trace(pipe, steps=args.steps, seed=7, images=args.images)
    pipe.scheduler.set_timesteps(args.steps)
    gains = sensitivity(pipe, trajectories)
    if not args.folders:
        show_sensitivity(gains, trajectories.timesteps)
    float_ = predict(pipe.unet, trajectories)
    for folder in args.folders:
        print(folder)
        consequences(spectra(folder, pipe.scheduler.alphas_cumprod, float_, trajectories), gains)


if __name__ == "__main__":
    main()
