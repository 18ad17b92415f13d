"""Quantize a model of your own and look at the result: float images above, quantized ones below, in one PNG.

    python examples/own_model.py                                  # the bundled model, offline, about a minute
    python examples/own_model.py path/or/hub-id --output mine     # any pipeline; text-to-image ones take the built-in prompts

The recipe here needs no gradients. Leave `fast` and `--weights 8` behind once this works: `full` at 4 bits is what `tcaq` is for.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import tcaq
from tcaq.models.load import load_pipeline
from tcaq.models.sampler import sample
from tcaq.models.seeds import image_seeds
from tcaq.reference import load_pipeline as load_reference
from tcaq.report.grid import grid_image


def main() -> None:
    """Quantize, load what was saved, and sample both models from the same seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="reference")
    parser.add_argument("--output", type=Path, default=Path("build/own-model"))
    parser.add_argument("--weights", type=int, default=8)
    parser.add_argument("--activations", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--num", type=int, default=8)
    args = parser.parse_args()
    pipe = load_reference() if args.model == "reference" else load_pipeline(args.model)
    seeds = image_seeds("sample", 0, 0, args.num)
    original = sample(pipe, seeds, args.steps)
    recipe = tcaq.preset_recipe(
        "tcaq", "fast", weights=args.weights, activations=args.activations, correction=None,
        calibration={"images": args.num, "steps": args.steps, "batch": args.num},
    )  # fmt: skip
    tcaq.quantize(pipe, recipe, args.output, on_progress=lambda stage, done, total, _: print(f"{stage} {done}/{total}"))
    quantized = sample(tcaq.load(args.output), seeds, args.steps)
    picture = args.output / "float-and-quantized.png"
    grid_image(torch.cat([original, quantized]), columns=args.num).save(picture)
    print(f"{picture}: float above, W{args.weights}A{args.activations} below")


if __name__ == "__main__":
    main()
