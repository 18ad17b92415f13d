"""Pixels that run away: how a quantized model answers to a pixel of x_t that lies far out, and what becomes of such pixels.

    python benchmarks/runaway.py build/quality/tcaq-w4a4

FOLDER is what `tcaq quantize reference` wrote. First table: the slope of predicted noise at random pixels of calibration inputs
that are moved from 1.5 standard deviations to the size given, times sigma_t, so that 1 takes all of the pixel for noise; float and
quantized. Second table: in every collection of the run's calibration images, elements of the last x_t beyond 1.3 times the largest
of the float model's.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from tcaq import load
from tcaq.models.denoiser import find_denoiser
from tcaq.models.sampler import Trajectories
from tcaq.reference import load_pipeline
from tcaq.runs import Run
from tcaq.stages.collect import trajectories_of

SIZES = (2.5, 3.5, 4.5, 6.0, 10.0)
START, SHARE, IMAGES, BEYOND = 1.5, 1e-3, 16, 1.3


@torch.no_grad()
def response(denoiser: nn.Module, x: Tensor, timestep: Tensor, size: float) -> float:
    """Slope of the prediction where elements are moved from START to `size` standard deviations."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(x.shape, generator=generator) < SHARE
    sign = torch.randint(0, 2, x.shape, generator=generator) * 2.0 - 1.0
    near, far = (torch.where(chosen, s * x.std() * sign, x) for s in (START, size))
    answer, step = (denoiser(far, timestep).sample - denoiser(near, timestep).sample)[chosen], (far - near)[chosen]
    return float((answer * step).sum() / step.square().sum())


def collected(run: Run, name: str) -> Trajectories:
    """One collection of a run."""
    return Trajectories.join([trajectories_of(record) for _, record in run.results(name)])


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    pipe, run = load_pipeline(), Run.read(args.folder / "run")
    models = [find_denoiser(p)[1].eval() for p in (pipe, load(args.folder))]
    original = collected(run, "collect/0")
    print("| t |", *(f" {size} |" for size in SIZES))
    for step in range(0, len(original.timesteps), 7):
        timestep, x = original.timesteps[step], original.samples[step, :IMAGES]
        sigma = float((1 - pipe.scheduler.alphas_cumprod[int(timestep)]).sqrt())
        cells = (" / ".join(f"{sigma * response(m, x, timestep, size):.2f}" for m in models) for size in SIZES)
        print(f"| {int(timestep)} |", *(f" {cell} |" for cell in cells), flush=True)
    largest = original.samples[-1].abs().max()
    for name in (name for name in run.finished() if name.startswith("collect/")):
        last = collected(run, name).samples[-1].abs()
        over = last > BEYOND * largest
        touched = int(over.flatten(1).any(1).sum())
        print(f"| {name} | {int(over.sum())} in {touched} of {len(last)} images | {float(last.max()):.1f} |")


if __name__ == "__main__":
    main()
