"""Image quality of the bundled model after quantization: every recipe at four bit widths, what each part of ours adds, the first
and last recipe at others, widths by layer, and what other calibration images change.

    python benchmarks/quality.py --output build/quality             every cell, a day on two cores
    python benchmarks/quality.py --output build/quality --only tcaq-w4a4 minmax-w4a4
    python benchmarks/quality.py --output build/parts --model benchmarks/models/garments-dit --guidance 1.5 --preset quick \
        --num 500 --steps 20 --results benchmarks/results/parts.json --only tcaq-w4a4 no-tcr-w4a4    the second model

Each cell is a `tcaq quantize` and a `tcaq evaluate`; both resume, so the study can be stopped at any moment. The float samples are
made once and shared. Calibration seed 0 (in `seed-*` another), evaluation seed 1: they never share noise. Several of these
commands may run side by side on different cells, each with its share of the cores (OMP_NUM_THREADS): results are read again before
each is written.
Then `python benchmarks/page.py` writes docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from machine import machine
from model import add_model, flags
from page import ROOT, row
from protocol import add_protocol

from tcaq.recipes.registry import RECIPES
from tcaq.records import read_json, write_json

RESULTS = ROOT / "benchmarks" / "results" / "quality.json"
BITS = {"w8a8": (8, 8), "w6a6": (6, 6), "w4a8": (4, 8), "w4a4": (4, 4)}
PARTS = {
    "no-bypass": ["--no-bypass"],
    "no-tcr": ["--no-tcr"],
    "no-daq": ["--no-daq"],
    "no-stagger": ["--no-stagger"],
    "no-par": ["--rounds", "0"],
    "no-network": ["--no-network"],
    "no-correction": ["--no-correction"],
    "none": ["--no-bypass", "--no-stagger", "--no-tcr", "--no-daq", "--rounds", "0", "--no-network", "--no-correction"],
}
ABLATED = ("w6a6", "w4a4")
LONGER = {f"iterations-{count}-w4a4": str(count) for count in (2000, 20000)}
"""More iterations for each unit than the preset's; 20 000 are the field's default, and many hours on the bundled model."""
RESEEDED = {f"seed-{seed}-w4a4": str(seed) for seed in (1, 2)}
"""Other calibration images and draws."""
NARROW = {"w4a6": (4, 6), "w3a4": (3, 4), "w2a4": (2, 4), "w4a3": (4, 3)}
"""For the first and the last recipe only: the widest inputs that run as fast as W4A4 where there is VNNI, and widths at which no
published system gives images."""

LAYERED = ("w3a4", "w4a4")
"""Widths of weights and of inputs by layer, in the size of one width for all."""
BY_LAYER = [option for name in ("--layer-bits", "--input-bits") for option in (name, "2,3,4,5,6,8")]


def cells(preset: str) -> dict[str, list[str]]:
    """The options of `tcaq quantize` for every cell, by its name."""
    table: dict[str, list[str]] = {}
    for bits, (weights, activations) in (BITS | NARROW).items():
        width = ["--weights", str(weights), "--activations", str(activations)]
        recipes = RECIPES if bits in BITS else ("minmax", "tcaq")
        table |= {f"{recipe}-{bits}": ["--recipe", recipe, "--preset", preset, *width] for recipe in recipes}
        if bits in ABLATED:
            table |= {f"{part}-{bits}": [*table[f"tcaq-{bits}"], *flags] for part, flags in PARTS.items()}
    table |= {f"layers-{bits}": [*table[f"tcaq-{bits}"], *BY_LAYER] for bits in LAYERED}
    table |= {name: [*table["tcaq-w4a4"], "--seed", seed] for name, seed in RESEEDED.items()}
    return table | {name: [*table["tcaq-w4a4"], "--iterations", count] for name, count in LONGER.items()}


def tcaq(*args: object) -> str:
    """Run the command; its progress goes to the terminal, its standard output is returned."""
    command = [sys.executable, "-c", "from tcaq.cli import app; app()", *map(str, args)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def measure(name: str, options: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """Quantize and evaluate one cell; both go on where they stopped."""
    cell = quantized(name, options, args)
    if args.evaluated:
        elsewhere = read_json(args.evaluated)
        own = elsewhere["cells"][name][str(args.num)]
        return cell | {"sampled": elsewhere["device"], "evaluation": own["evaluation"]}
    where = {"sampled": "the processor, in integers"} if args.execution == "integer" else {}
    return cell | where | {"evaluation": evaluated(name, args)}


def quantized(name: str, options: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """How a cell's checkpoint was made, and what that took; makes it if it is not there."""
    options = [*options, *map(str, flags(args))]
    made = json.loads(tcaq("quantize", args.model, "--output", args.output / name, *options, "--json"))
    return {
        "command": f"tcaq quantize {args.model} {' '.join(options)}",
        "quantize_seconds": round(made["seconds"], 1),
        "quantize_peak_memory": made["peak_memory"],
        "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
        "commit": commit(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
    }


def evaluated(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """What `tcaq evaluate` says of a cell."""
    scores = args.output / f"{name}.json"
    protocol = ["--num", args.num, "--steps", args.steps, "--seed", args.seed, "--work", args.output / "samples"]
    protocol += ["--execution", args.execution]
    tcaq("evaluate", args.output / name, "--reference", args.model, *protocol, *flags(args), "--json", scores)
    return scored(read_json(scores))


def scored(values: dict[str, Any]) -> dict[str, Any]:
    """What `tcaq evaluate` wrote, with the noise by step in fewer characters."""
    values["paired"]["sqnr_per_step"] = [
        [row["timestep"], round(row["sqnr"], 2)] for row in values["paired"]["sqnr_per_step"]
    ]
    return values


def commit() -> str:
    """The code that is running, as git names it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def stored(args: argparse.Namespace) -> dict[str, Any]:
    """The results so far; none where they are of another protocol, whose cells do not belong into one table."""
    protocol = {
        "model": args.model,
        "guidance": args.guidance,
        "preset": args.preset,
        "steps": args.steps,
        "num": args.num,
        "seed": args.seed,
        "machine": machine(),
    }
    results = read_json(args.results) if args.results.exists() else {}
    same = all(results.get(key) == value for key, value in protocol.items())
    return dict(results) if same else {**protocol, "cells": {}}


def main() -> None:
    """Measure the cells that are asked for and write the results after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "quality")
    add_model(parser)
    parser.add_argument("--preset", default="full")
    add_protocol(parser)
    every = [name for name in cells("") if name not in LONGER]  # which `iterations.py` measures
    parser.add_argument("--only", nargs="+", choices=every, default=every)
    parser.add_argument("--execution", choices=("fake", "integer"), default="fake")
    parser.add_argument("--quantize-only", action="store_true", help="make the checkpoints and no more")
    parser.add_argument("--evaluated", type=Path, help="what `on_gpu.py` measured, in place of sampling")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    for name in args.only:
        if args.quantize_only:
            quantized(name, cells(args.preset)[name], args)
            continue
        cell = measure(name, cells(args.preset)[name], args)
        results = stored(args)
        results["cells"][name] = cell
        write_json(args.results, results)
        print(row(name, cell), flush=True)


if __name__ == "__main__":
    main()
