"""Try variants of a recipe on the bundled model, cheaply: a row each, on seeds that no published number uses.

    python benchmarks/explore.py --preset fast base '{}' no-tcr '{"tcr": null}' tcr-1 '{"tcr": {"strength": 1.0}}'

Arguments come in pairs: a name, and the changes to the recipe as JSON. Calibration seed 0, evaluation seed 7.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from tcaq import load, preset_recipe, quantize
from tcaq.evaluate.features import load_features
from tcaq.evaluate.protocol import Protocol, evaluate
from tcaq.reference import load_pipeline


def main() -> None:
    """Quantize and evaluate each variant; all of it resumes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="+", metavar="NAME CHANGES")
    parser.add_argument("--preset", default="quick")
    parser.add_argument("--output", type=Path, default=Path("build/explore"))
    parser.add_argument("--num", type=int, default=200)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    protocol = Protocol(load_features("reference"), args.output / "samples", args.num, args.steps, args.seed)
    for name, changes in zip(args.variants[::2], args.variants[1::2], strict=True):
        began = time.monotonic()
        folder = args.output / f"{args.preset}-{name}"
        base = {"calibration": {"steps": args.steps}}
        quantize(load_pipeline(), preset_recipe("tcaq", args.preset, **base).changed(json.loads(changes)), folder)
        spent = time.monotonic() - began
        scores = evaluate(load_pipeline(), load(folder), protocol)[0]
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
