"""Images of integer execution beside those of the fake-quantized model, and beside what rounding alone does to the latter.

    python benchmarks/integer.py build/quality/tcaq-w8a8 build/quality/tcaq-w4a4

Each argument is a folder that `tcaq quantize reference` wrote; its name is the row's. Two comparisons of each:

- Fréchet distances by `tcaq evaluate`, once as it is and once with `--execution integer`: same seeds, same float images.
- PSNR between images of the same seeds: integer against fake, and fake against fake with PyTorch's own float convolutions in the
  place of oneDNN's, which differ in nothing but the order of their sums. Where a value lies on the edge between two codes, the last
  bit decides, and a code of few bits is a large step; so two runs that add in another order part, whoever is right. The second
  figure is what the first can be measured by.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from diffusers import DiffusionPipeline
from machine import machine
from page import ROOT
from protocol import add_protocol, stored
from quality import tcaq
from torch import Tensor

import tcaq as package
from tcaq.evaluate.metrics import psnr
from tcaq.evaluate.sampling import PURPOSE
from tcaq.models.sampler import batches, sample
from tcaq.models.seeds import image_seeds
from tcaq.records import read_json, write_json

RESULTS = ROOT / "benchmarks" / "results" / "integer.json"


def images(pipe: DiffusionPipeline, args: argparse.Namespace) -> Tensor:
    """Images of the evaluation's first seeds, in [0, 1]."""
    seeds = image_seeds(PURPOSE, args.seed, 0, args.pairs)
    return torch.cat([sample(pipe, part, args.steps) for part in batches(seeds, 32)]) / 255


def likeness(folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """Mean PSNR to the fake-quantized model's images, dB."""
    pipe = package.load(folder)
    fake = images(pipe, args)
    with torch.backends.mkldnn.flags(enabled=False):
        reordered = images(pipe, args)
    package.lower(pipe)
    return {"integer": _mean(images(pipe, args), fake), "reordered": _mean(reordered, fake)}


def _mean(found: Tensor, expected: Tensor) -> float:
    return mean(psnr(found, expected).clamp(max=100.0).tolist())


def distances(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Scores of both executions."""
    found = {}
    for execution in ("fake", "integer"):
        scores = args.output / f"{folder.name}-{execution}.json"
        protocol = ["--num", args.num, "--steps", args.steps, "--seed", args.seed, "--work", args.output / "samples"]
        tcaq("evaluate", folder, "--reference", "reference", *protocol, "--execution", execution, "--json", scores)
        values = read_json(scores)
        found[execution] = {name: values["paired"][name] for name in ("psnr", "fd_to_float")}
        found[execution]["ratio"] = values["ratio"]["fd"]
    return found


def main() -> None:
    """Compare each checkpoint and write the results after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "quality")
    add_protocol(parser)
    parser.add_argument("--pairs", type=int, default=128)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    how = {"num": args.num, "pairs": args.pairs, "steps": args.steps, "seed": args.seed, "machine": machine()}
    stored(args.results, how)  # refuses before anything is measured
    for folder in args.folders:
        cell = {"to fake": likeness(folder, args), "distances": distances(folder, args)}
        results = stored(args.results, how)
        results["cells"][folder.name] = cell
        write_json(args.results, results)
        print(folder.name, cell, flush=True)


if __name__ == "__main__":
    main()
