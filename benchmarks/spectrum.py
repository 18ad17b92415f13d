"""Which errors of a prediction reach the image: by spatial frequency and by step.

    python benchmarks/spectrum.py                          how much an error in each band, at each step, changes the final image
    python benchmarks/spectrum.py FOLDER ...               what errors the predictions of quantized models have in each band

Bands are those of `balance` "bands": what averages over squares of 2 x 2, 4 x 4, ... take away, and last the mean of all
positions. The float model is the bundled one. Evaluation seed 7, which no published number uses.
"""

from __future__ import annotations

import argparse
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

SIZE = 0.005
"""Root mean square of an added error: small beside the noise, and far above what rounding in float32 does."""


def only_band(error: Tensor, band: int) -> Tensor:
    """One band of a picture, 0 the finest, scaled to a root mean square of SIZE."""
    fine = torch.nn.functional.interpolate(bands(error)[band], size=error.shape[2:])
    return fine * SIZE / fine.square().mean().sqrt()


@torch.no_grad()
def finish(pipe: DDIMPipeline, x: Tensor, first: int, added: Tensor | float) -> Tensor:
    """Sample on from step number `first`, with something added to the prediction of that step."""
    for number, t in enumerate(pipe.scheduler.timesteps.tolist()[first:]):
        prediction = pipe.unet(x, t).sample + (added if number == 0 else 0.0)
        x = pipe.scheduler.step(prediction, t, x, eta=0.0).prev_sample
    return x


def sensitivity(pipe: DDIMPipeline, trajectories: Trajectories) -> None:
    """A row for every third step: power in the final image for each unit of power in the prediction, mean over images."""
    torch.manual_seed(0)
    for step in range(0, len(trajectories.timesteps), 3):
        x = trajectories.samples[step]
        undisturbed = finish(pipe, x, step, 0.0)
        gains = []
        for band in range(x.shape[-1].bit_length()):
            moved = finish(pipe, x, step, only_band(torch.randn_like(x), band))
            gains.append(float((moved - undisturbed).square().mean() / SIZE**2))
        print(f"t {int(trajectories.timesteps[step]):4d}  " + "  ".join(f"{gain:8.3f}" for gain in gains), flush=True)


def spectra(folder: Path, alphas: Tensor, float_: Tensor, trajectories: Trajectories) -> None:
    """A row for every third step: power of a quantized model's errors in each band, of the part that all images share, and how the
    error follows the image: slope on the float model's idea of the image, as a change of its contrast.

    Args: alphas: the scheduler's cumulative products, by timestep; float_: the float model's predictions on the trajectories.
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
    if not args.folders:
        sensitivity(pipe, trajectories)
        return
    float_ = predict(pipe.unet, trajectories)
    for folder in args.folders:
        print(folder)
        spectra(folder, pipe.scheduler.alphas_cumprod, float_, trajectories)


if __name__ == "__main__":
    main()
