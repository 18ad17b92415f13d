"""Try variants of a recipe, cheaply: a row each, on seeds that no published number uses.

    python benchmarks/explore.py --preset fast base '{}' no-tcr '{"tcr": null}' tcr-1 '{"tcr": {"strength": 1.0}}'

    python benchmarks/explore.py --model benchmarks/models/garments-dit --guidance 1.5 linear '{"tcr": {"kinds": ["linear"]}}'

Arguments come in pairs: a name, and the changes to the recipe as JSON. Calibration seed 0, evaluation seed 7.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from model import add_model, conditions
from protocol import add_protocol

from tcaq import load, preset_recipe, quantize
from tcaq.cli.models import open_float
from tcaq.evaluate.features import load_features
from tcaq.evaluate.protocol import Protocol, evaluate
from tcaq.models.prompting import resolve_conditions


def main() -> None:
    """Quantize and evaluate each variant; all of it resumes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="+", metavar="NAME CHANGES")
    add_model(parser)
    parser.add_argument("--preset", default="quick")
    parser.add_argument("--output", type=Path, default=Path("build/explore"))
    add_protocol(parser, num=200, steps=20, seed=7)
    args = parser.parse_args()
    asked = conditions(args)
    protocol = Protocol(
        load_features("reference"), args.output / "samples", args.num, args.steps, args.seed,
        conditions=resolve_conditions(open_float(args.model), asked),
    )  # fmt: skip
    for name, changes in zip(args.variants[::2], args.variants[1::2], strict=True):
        began = time.monotonic()
        folder = args.output / f"{args.preset}-{name}"
        base = {"calibration": {"steps": args.steps, "conditions": asked and asked.model_dump(mode="json")}}
        recipe = preset_recipe("tcaq", args.preset, **base).changed(json.loads(changes))
        quantize(open_float(args.model), recipe, folder)
        spent = time.monotonic() - began
        scores = evaluate(open_float(args.model), load(folder), protocol)[0]
        pair = scores.paired
        sqnr = [step.sqnr for step in pair.sqnr_per_step]
        print(
            f"{name:24s} ratio {scores.ratio.fd:6.3f}  FD {scores.quantized.fd:6.2f}  to float {pair.fd_to_float:6.2f}  "
            f"PSNR {pair.psnr:5.2f}  SQNR first {sqnr[0]:5.2f} mean {sum(sqnr) / len(sqnr):5.2f} last {sqnr[-1]:5.2f}  "
            f"{spent:5.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
