"""How much of a difference between cells of the quality study is chance: the jackknife over evaluation images.

    python benchmarks/spread.py --output build/quality
    python benchmarks/spread.py --output build/parts --model benchmarks/models/garments-dit --guidance 1.5 --num 500 --steps 20 \\
        --results benchmarks/results/parts-spread.json

Reads the images that `quality.py` sampled and left in its folder. They are cut into 40 blocks, the same seeds in each for the
float model and every cell; the Fréchet distances are taken again with each block left out. From how they vary follows the
standard error of each ratio, and of each cell's difference to the whole recipe at the same width, where most of the chance is
shared. The calibration's own chance (another seed, other roundings) is not in it. `page.py` shows both.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from model import add_model, conditions
from page import ROOT
from protocol import add_protocol, stored
from quality import cells
from torch import Tensor

import tcaq
from tcaq.cli.models import executed, open_float
from tcaq.cli.options import Execution
from tcaq.evaluate.features import load_features
from tcaq.evaluate.metrics import Moments, frechet_distance
from tcaq.evaluate.sampling import sample_for_evaluation
from tcaq.records import read_json, write_json

RESULTS = ROOT / "benchmarks" / "results" / "spread.json"
BLOCKS = 40


def left_out(pipe: Any, args: argparse.Namespace, batch: int = 32) -> Tensor:
    """The Fréchet distance without each block, float64 [blocks]."""
    how = {"num": args.num, "steps": args.steps, "seed": args.seed, "batch": batch, "conditions": conditions(args)}
    images = sample_for_evaluation(pipe, args.output / "samples", **how).images
    extractor = load_features("reference")
    real = extractor.statistics
    return torch.tensor(
        [
            frechet_distance(rest.mean, rest.covariance, real.mean, real.covariance)
            for rest in without_each_block(extractor.extract(images, 100))
        ],
        dtype=torch.float64,
    )


def sampled(asked: set[str], args: argparse.Namespace) -> dict[str, Tensor]:
    """The distances of the float model, as `float`, and of those cells that were sampled here."""
    folders = {name: args.output / name for name in asked if (args.output / f"{name}.json").exists()}
    found = {"float": left_out(open_float(args.model), args)}
    return found | {
        name: left_out(executed(tcaq.load(folder), args.execution), args) for name, folder in folders.items()
    }


def measured(args: argparse.Namespace) -> dict[str, Tensor]:
    """The same of what `on_gpu.py` sampled."""
    found, num = read_json(args.evaluated), str(args.num)
    values = {"float": found["float"][num]} | {
        n: cell[num]["left_out"] for n, cell in found["cells"].items() if num in cell
    }
    return {name: torch.tensor(distances, dtype=torch.float64) for name, distances in values.items()}


def without_each_block(features: Tensor) -> Iterator[Moments]:
    """Moments of features [N, D] without the first block of them, without the second one, and so on."""
    whole = Moments.of(features)
    for part in map(Moments.of, features.tensor_split(BLOCKS)):  # blocks differ by one image at most
        yield Moments(whole.count - part.count, whole.total - part.total, whole.outer - part.outer)


def error(values: Tensor) -> float:
    """Standard error of what `values` are the leave-one-block-out estimates of."""
    return float(((len(values) - 1) * values.var(correction=0)).sqrt())


def main() -> None:
    """Every cell that is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "quality")
    add_model(parser)
    add_protocol(parser)
    parser.add_argument("--execution", type=Execution, choices=list(Execution), default=Execution.FAKE)
    parser.add_argument("--only", nargs="+", choices=list(cells("")), help="cells; others keep what they have")
    parser.add_argument("--evaluated", type=Path, help="what `on_gpu.py` measured, in place of the images")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    how = {"blocks": BLOCKS, "num": args.num, "steps": args.steps, "seed": args.seed}
    results = stored(args.results, how)
    asked = set(args.only or cells(""))
    asked |= {f"tcaq-{name.rpartition('-')[2]}" for name in asked}  # what they are compared with
    there = measured(args) if args.evaluated else sampled(asked, args)
    ratios = {name: there[name] / there["float"] for name in cells("") if name in asked and name in there}
    for name, ratio in ratios.items():
        whole = ratios.get(f"tcaq-{name.rpartition('-')[2]}")
        cell = {"error": error(ratio)}
        if whole is not None and whole is not ratio:
            cell |= {"more": float((ratio - whole).mean()), "error of more": error(ratio - whole)}
        results["cells"][name] = cell
        print(name, {key: round(value, 4) for key, value in cell.items()}, flush=True)
    write_json(args.results, results)


if __name__ == "__main__":
    main()
