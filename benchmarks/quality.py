"""Image quality of the bundled model after quantization: the recipes at four bit widths, and what each part adds.

    python benchmarks/quality.py --output build/quality             every cell, hours on two cores
    python benchmarks/quality.py --output build/quality --only tcaq-w4a4 minmax-w4a4
    python benchmarks/quality.py --table                             only write docs/results.md from the committed results

Each cell is a `tcaq quantize` and a `tcaq evaluate`; both resume, so the study can be stopped at any moment. The float samples are
made once and shared. Calibration seed 0, evaluation seed 1: they never share noise. Several of these commands may run side by side
on different cells, each with its share of the cores (OMP_NUM_THREADS): results are read again before each is written.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from machine import machine

from tcaq.records import read_json, write_json

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "quality.json"
PRESETS = ROOT / "benchmarks" / "results" / "presets.json"
PAGE = ROOT / "docs" / "results.md"
BITS = {"w8a8": (8, 8), "w6a6": (6, 6), "w4a8": (4, 8), "w4a4": (4, 4)}
PARTS = {
    "no-bypass": ["--no-bypass"],
    "no-tcr": ["--no-tcr"],
    "no-daq": ["--no-daq"],
    "no-par": ["--rounds", "0"],
    "no-network": ["--no-network"],
    "no-correction": ["--no-correction"],
    "none": ["--no-bypass", "--no-tcr", "--no-daq", "--rounds", "0", "--no-network", "--no-correction"],
}
ABLATED = ("w6a6", "w4a4")


def cells(preset: str) -> dict[str, list[str]]:
    """The options of `tcaq quantize` for every cell, by its name."""
    table: dict[str, list[str]] = {}
    for bits, (weights, activations) in BITS.items():
        width = ["--weights", str(weights), "--activations", str(activations)]
        table[f"minmax-{bits}"] = ["--recipe", "minmax", "--preset", preset, *width]
        table[f"tcaq-{bits}"] = ["--recipe", "tcaq", "--preset", preset, *width]
        if bits in ABLATED:
            table |= {f"{part}-{bits}": [*table[f"tcaq-{bits}"], *flags] for part, flags in PARTS.items()}
    return table


def tcaq(*args: object) -> str:
    """Run the command; its progress goes to the terminal, its standard output is returned."""
    command = [sys.executable, "-c", "from tcaq.cli import app; app()", *map(str, args)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def measure(name: str, options: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """Quantize and evaluate one cell; both go on where they stopped."""
    folder = args.output / name
    made = json.loads(tcaq("quantize", "reference", "--output", folder, *options, "--json"))
    scores = args.output / f"{name}.json"
    protocol = ["--num", args.num, "--steps", args.steps, "--seed", args.seed, "--work", args.output / "samples"]
    tcaq("evaluate", folder, "--reference", "reference", *protocol, "--json", scores)
    values = read_json(scores)
    values["paired"]["sqnr_per_step"] = [
        [row["timestep"], round(row["sqnr"], 2)] for row in values["paired"]["sqnr_per_step"]
    ]
    return {
        "command": f"tcaq quantize reference {' '.join(options)}",
        "quantize_seconds": round(made["seconds"], 1),
        "quantize_peak_memory": made["peak_memory"],
        "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
        "evaluation": values,
    }


def row(name: str, cell: dict[str, Any]) -> str:
    """A line of a table."""
    scores = cell["evaluation"]
    pair = scores["paired"]
    return (
        f"| {name} | {scores['quantized']['fd']:.2f} | {scores['ratio']['fd']:.3f} | {scores['quantized']['kid']:.5f} "
        f"| {pair['psnr']:.2f} | {pair['ssim']:.3f} | {pair['fd_to_float']:.2f} "
        f"| {cell['quantize_seconds'] / 60:.1f} | {cell['threads']} | {cell['quantize_peak_memory'] / 2**30:.2f} |"
    )


def page(results: dict[str, Any]) -> str:
    """docs/results.md."""
    done: dict[str, Any] = results["cells"]
    first = next(iter(done.values()))["evaluation"]
    head = (
        "| cell | FD | ratio | KID | PSNR dB | SSIM | FD to float | quantizing, min | threads | peak, GiB |\n"
        "|---|---|---|---|---|---|---|---|---|---|"
    )
    lines = [
        "# Results",
        "",
        "Written by `python benchmarks/quality.py`; do not edit by hand. The numbers are in `benchmarks/results/quality.json`.",
        "",
        f"Bundled model, DDIM {results['steps']} steps, {first['num']} images, evaluation seed {first['seed']}, "
        f"calibration seed 0, preset `{results['preset']}`, Fréchet distance (FD) and KID in the feature space of the bundled "
        f"classifier. Float model: FD {first['float']['fd']:.2f}, KID {first['float']['kid']:.5f}. Machine: {results['machine']}.",
        "",
        "`ratio` is FD over the float model's; `FD to float` is the distance between both models' images. "
        "PSNR and SSIM compare images of the same seed.",
        "",
        head,
        *(row(name, done[name]) for name in cells("") if name in done),
        "",
    ]
    if (results["preset"], first["num"] >= 2000, results["steps"]) != ("full", True, 50):
        lines += [
            "**Preliminary.** The protocol is the preset `full`, 50 steps and at least 2000 images; this run is smaller.",
            "",
        ]
    missing = [name for name in cells("") if name not in done]
    if missing:
        lines += [f"Not measured yet: {', '.join(missing)}.", ""]
    return "\n".join(lines + (costs(read_json(PRESETS)) if PRESETS.exists() else []))


def costs(presets: dict[str, Any]) -> list[str]:
    """The part of the page about time and memory of the presets."""
    rows = [
        f"| `{name}` | {cost['seconds'] / 60:.1f} | {cost['peak_memory'] / 2**30:.2f} | {cost['threads']} "
        f"| {', '.join(f'{stage} {seconds:.0f}' for stage, seconds in cost['stages'].items())} |"
        for name, cost in presets.items()
    ]
    return [
        "## What the presets cost",
        "",
        "Written from `benchmarks/results/presets.json`, which `python benchmarks/presets.py` makes: the bundled model at "
        f"W4A4, nothing else running. Machine: {next(iter(presets.values()))['machine']}.",
        "",
        "| preset | minutes | peak, GiB | threads | seconds by stage |",
        "|---|---|---|---|---|",
        *rows,
        "",
    ]


def stored(args: argparse.Namespace) -> dict[str, Any]:
    """The results so far; none where they are of another protocol, whose cells do not belong into one table."""
    protocol = {
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
    """Measure the cells that are asked for and write results and page after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "quality")
    parser.add_argument("--preset", default="full")
    parser.add_argument("--num", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=list(cells("")), default=list(cells("")))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only write the page from the results")
    args = parser.parse_args()
    if not args.table:
        for name in args.only:
            cell = measure(name, cells(args.preset)[name], args)
            results = stored(args)
            results["cells"][name] = cell
            write_json(args.results, results)
            print(row(name, cell), flush=True)
    PAGE.write_text(page(read_json(args.results)))


if __name__ == "__main__":
    main()
