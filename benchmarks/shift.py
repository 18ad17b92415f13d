"""Does a quantized model shift whole images? Mean and gain of the error in predicted noise at each step.

    python benchmarks/shift.py build/explore/fast-base build/explore/fast-balanced

Bundled model, trajectories of the float model, evaluation seed 7. The mean error of an image is given in standard deviations of the
mean of white noise in an image of that size: white noise of rounding stays far below 1, a shift of all pixels does not.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from tcaq import load
from tcaq.models.denoiser import find_denoiser
from tcaq.models.sampler import predict, record
from tcaq.models.seeds import image_seeds
from tcaq.reference import load_pipeline


def line(name: str, values: torch.Tensor) -> None:
    """A row of the table."""
    print(f"  {name:22s}", *(f"{value:7.3f}" for value in values.tolist()))


def main() -> None:
    """Print the rows of each checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--num", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    original = load_pipeline()
    _, trajectories = record(original, image_seeds("evaluation", args.seed, 0, args.num), args.steps)
    expected = predict(find_denoiser(original)[1], trajectories)
    line("timestep", trajectories.timesteps)
    for checkpoint in args.checkpoints:
        error = predict(find_denoiser(load(checkpoint))[1], trajectories) - expected
        means = error.mean(dim=(2, 3, 4)) * error[0, 0].numel() ** 0.5
        gain = (error * expected).sum(dim=(1, 2, 3, 4)) / expected.square().sum(dim=(1, 2, 3, 4))
        print(checkpoint)
        line("mean error", means.mean(dim=1))
        line("its spread over images", means.std(dim=1))
        line("gain minus 1", gain)
        line("rms error", error.square().mean(dim=(1, 2, 3, 4)).sqrt())


if __name__ == "__main__":
    main()
