"""What the presets cost: seconds and peak memory of quantizing the bundled model to W4A4 by `fast`, `quick` and `full`.

    python benchmarks/presets.py --output build/presets
    python benchmarks/presets.py --output build/presets --only fast quick

Run it with nothing beside it. A preset whose folder is finished is read, not run again.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any, get_args

from machine import machine
from page import ROOT
from quality import tcaq

from tcaq.recipes.presets import Preset
from tcaq.records import read_json, write_json
from tcaq.runs import Run

RESULTS = ROOT / "benchmarks" / "results" / "presets.json"


def measure(preset: str, folder: Path) -> dict[str, Any]:
    """Quantize by one preset; seconds by stage."""
    made = json.loads(tcaq("quantize", "reference", "--output", folder, "--preset", preset, "--json"))
    stages: dict[str, float] = {}
    for name, cost in Run.read(folder / "run").timings().items():
        stage = "/".join(name.split("/")[:2]) if name.startswith(("collect", "reconstruct")) else name.split("/")[0]
        stages[stage] = round(stages.get(stage, 0.0) + cost["seconds"], 1)
    return {"seconds": round(made["seconds"], 1), "peak_memory": made["peak_memory"], "stages": stages}


def main() -> None:
    """Measure the presets that are asked for and write each when it is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "presets")
    parser.add_argument("--only", nargs="+", choices=get_args(Preset), default=get_args(Preset))
    args = parser.parse_args()
    results = read_json(RESULTS) if RESULTS.exists() else {}
    for preset in args.only:
        threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
        results[preset] = {**measure(preset, args.output / preset), "threads": threads, "machine": machine()}
        write_json(RESULTS, results)
        print(preset, json.dumps(results[preset]), flush=True)


if __name__ == "__main__":
    main()
