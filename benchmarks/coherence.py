"""What errors of a quantized model's predictions have in common from step to step, and which steps' errors the images show.

    python benchmarks/coherence.py FOLDER ...                on the float model's trajectories, each step by itself
    python benchmarks/coherence.py --windows FOLDER ...      sampling with the float model, and the quantized one in some steps only

The float model is the bundled one, DDIM, 50 steps. Evaluation seed 7, which no published number uses.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path

import torch
from diffusers import DDIMPipeline
from protocol import add_protocol
from torch import Tensor

import tcaq
from tcaq.evaluate.sampling import PURPOSE, trace
from tcaq.models.denoiser import find_denoiser
from tcaq.models.sampler import record
from tcaq.models.seeds import image_seeds
from tcaq.models.trajectories import predict
from tcaq.reference import load_pipeline

EDGES = (0, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1)
"""Where windows of sampling steps begin and end, as parts of all steps."""


def correlation(errors: Tensor, lag: int) -> Tensor:
    """Of the errors at each step with those `lag` steps later, float64 [steps - lag]; errors [steps, ...]."""
    rows = errors.double().flatten(1)
    return torch.cosine_similarity(rows[:-lag], rows[lag:], dim=1)


def coherence(errors: Tensor, length: int) -> Tensor:
    """Power of the sum of errors over each `length` steps, over that of errors that had nothing in common, float64 [n]."""
    parts = errors.double().flatten(1).split(length)
    return torch.stack([part.sum(dim=0).square().sum() / part.square().sum() for part in parts])


def show_coherence(exact: Tensor, errors: Tensor) -> None:
    """A row for each fifth of the steps."""
    signal, noise = (part.double().flatten(1).square().mean(dim=1) for part in (exact, errors))
    fifth = len(errors) // 5
    for part in range(5):
        own = slice(part * fifth, (part + 1) * fifth)
        snr = 10 * torch.log10(signal[own] / noise[own]).mean()
        alike = " ".join(f"{float(correlation(errors[own], lag).mean()):5.2f}" for lag in (1, 2, 4))
        sums = float(coherence(errors[own], fifth)[0])
        print(
            f"  fifth {part + 1}: {float(snr):5.1f} dB  correlation 1, 2, 4 steps on {alike}  sum {sums:5.2f}",
            flush=True,
        )


@torch.no_grad()
def sampled(exact: DDIMPipeline, quantized: DDIMPipeline, start: Tensor, steps: int, window: range) -> Tensor:
    """Images of start noise, gray levels: with the quantized model's predictions at the steps in `window`."""
    scheduler, x = exact.scheduler, start
    scheduler.set_timesteps(steps)
    for number, t in enumerate(scheduler.timesteps):
        prediction = (quantized if number in window else exact).unet(x, t).sample
        x = scheduler.step(prediction, t, x, eta=0.0).prev_sample
    return 127.5 * (x.clamp(-1, 1) + 1)


def show_windows(exact: DDIMPipeline, quantized: DDIMPipeline, start: Tensor, steps: int) -> None:
    """Squared error of the images, in gray levels, with each window quantized alone and with all of them."""
    wanted = sampled(exact, quantized, start, steps, range(0))
    edges = [round(edge * steps) for edge in EDGES]
    for window in [range(*pair) for pair in pairwise(edges)] + [range(steps)]:
        error = (sampled(exact, quantized, start, steps, window) - wanted).square().flatten(1).mean(dim=1)
        print(
            f"  steps {window.start:2d} to {window.stop:2d}: mean {float(error.mean()):6.1f}  median {float(error.median()):6.1f}",
            flush=True,
        )


def main() -> None:
    """Print either table for each folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--windows", action="store_true")
    add_protocol(parser, num=16, seed=7)
    args = parser.parse_args()
    if args.steps < 25:
        parser.error(f"--steps {args.steps}: a fifth of the steps needs 5 for errors 4 steps apart; take at least 25")
    exact = load_pipeline()
    if args.windows:
        start = record(exact, image_seeds(PURPOSE, args.seed, 0, args.num), args.steps)[1].samples[0]
    else:
        trajectories = trace(exact, steps=args.steps, seed=args.seed, images=args.num)
        predictions = predict(find_denoiser(exact)[1], trajectories)
    for folder in args.folders:
        quantized = tcaq.load(folder)
        print(folder.name, flush=True)
        if args.windows:
            show_windows(exact, quantized, start, args.steps)
        else:
            show_coherence(predictions, predict(find_denoiser(quantized)[1], trajectories) - predictions)


if __name__ == "__main__":
    main()
