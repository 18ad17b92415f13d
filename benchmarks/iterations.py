"""What more iterations for each unit are worth: `full`, and with 2 000 and 20 000 iterations a unit, at W4A4 in one run.

    python benchmarks/iterations.py --device cuda --calibration-batch 96
                                        twelve minutes on an H200; on a processor the last row takes most of a day

20 000 iterations a unit are the field's default. Quantizes the bundled model three times where `--device` says, samples and
measures each as `quality.py` does, and writes its results after each. What stopped goes on.
"""

from __future__ import annotations

import argparse
import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from model import add_model, flags
from on_gpu import device_name, distances, evaluated
from page import ROOT
from protocol import add_protocol, stored
from quality import LONGER, cells, commit
from spread import BLOCKS, error
from torch import tensor

from tcaq.cli import app
from tcaq.cli.models import open_float, placed
from tcaq.recipes.quantize import RUN_FOLDER
from tcaq.records import write_json
from tcaq.runs import Run

RESULTS = ROOT / "benchmarks" / "results" / "iterations.json"
ROWS = ("tcaq-w4a4", *LONGER)


def quantized(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Make a row's checkpoint; how, and what that took."""
    where = ["--device", args.device, "--batch", args.calibration_batch]
    options = [*cells("full")[name], *map(str, [*flags(args), *where])]
    said = io.StringIO()
    with redirect_stdout(said):
        app(["quantize", args.model, "--output", str(args.output / name), *options, "--json"], standalone_mode=False)
    made = json.loads(said.getvalue())
    return {
        "command": f"tcaq quantize {args.model} {' '.join(options)}",
        "device": device_name(args.device),
        "quantize_seconds": round(made["seconds"], 1),
        "quantize_peak_memory": made["peak_memory"],
        "stages": stages(args.output / name),
        "commit": args.commit or commit(),
    }


def stages(folder: Path) -> dict[str, float]:
    """Seconds of each stage of a quantization."""
    seconds: dict[str, float] = {}
    for step, cost in Run.read(folder / RUN_FOLDER).timings().items():
        stage = "/".join(part for part in step.split("/")[:2] if "-" not in part)
        seconds[stage] = round(seconds.get(stage, 0.0) + cost["seconds"], 2)
    return seconds


def main() -> None:
    """Quantize all rows, then sample them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "iterations")
    add_model(parser)
    add_protocol(parser, num=5000)
    parser.add_argument("--batch", type=int, default=250, help="images at a time")
    parser.add_argument("--calibration-batch", type=int, default=32, help="a GPU waits less for one of all 96 images")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--quantize-only", action="store_true", help="make the checkpoints and no more")
    parser.add_argument("--commit", help="of the code, where git does not know it")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    how = {"model": args.model, "num": args.num, "steps": args.steps, "seed": args.seed, "blocks": BLOCKS}
    results = stored(args.results, how)
    for name in args.only:
        if name not in results["cells"]:
            results["cells"][name] = quantized(name, args)
            write_json(args.results, results)
        print(name, results["cells"][name]["quantize_seconds"], flush=True)
    if args.quantize_only:
        return
    plain = tensor(distances(placed(open_float(args.model), args.device), args))
    for name in args.only:
        row = results["cells"][name]
        row |= evaluated(name, args)
        ratio = tensor(row.pop("left_out")) / plain
        row["error"] = error(ratio)
        write_json(args.results, results)
        print(name, row["evaluation"]["ratio"]["fd"], row["error"], flush=True)


if __name__ == "__main__":
    main()
