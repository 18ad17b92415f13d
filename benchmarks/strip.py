"""The picture at the head of the README: images of the same seeds from the float model and from cells of the quality study.

    python benchmarks/strip.py --output build/quality

Reads the images that `quality.py` sampled and left in its folder, and samples those that are not there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from page import ROOT

import tcaq
from tcaq.evaluate.sampling import sample_for_evaluation
from tcaq.reference import load_pipeline
from tcaq.report.grid import side_by_side

PICTURE = ROOT / "docs" / "images" / "samples.png"
CELLS = {"TCAQ-DM W4A4": "tcaq-w4a4", "min-max W4A4": "minmax-w4a4"}
COLUMNS = 16
BATCH = 32
"""Of the study, whose first whole batch is read: a smaller number of images would be a batch of its own, and sampled."""


def main() -> None:
    """Draw the first images of each, a row a model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "quality")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    how = {"num": BATCH, "steps": args.steps, "seed": args.seed, "batch": BATCH}
    pipes = {"float": load_pipeline()} | {label: tcaq.load(args.output / name) for label, name in CELLS.items()}
    rows = [
        (label, sample_for_evaluation(pipe, args.output / "samples", **how).images) for label, pipe in pipes.items()
    ]
    side_by_side(rows, COLUMNS).save(PICTURE)


if __name__ == "__main__":
    main()
