"""Sample and measure the checkpoints of the quality study on a GPU, where they take seconds, not a quarter of an hour each.

    python benchmarks/quality.py --output build/quality --quantize-only         on a processor, where many small steps are no slower
    python benchmarks/on_gpu.py --output build/quality --num 5000 2000 --results build/evaluated.json
    python benchmarks/quality.py --output build/quality --evaluated build/evaluated.json
    python benchmarks/spread.py --output build/quality --evaluated build/evaluated.json

The protocol is that of `quality.py`, with larger batches. Beside each evaluation the results hold the Fréchet distance without each
block of images, from which `spread.py` has its standard errors. Several processes work side by side, for one waits for Python most
of the time.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as processes
from model import add_model, flags
from orphan import end_with_parent
from page import ROOT
from quality import cells, scored
from spread import left_out

import tcaq
from tcaq.checkpoint import INDEX
from tcaq.cli import app
from tcaq.cli.models import open_float, placed
from tcaq.records import read_json, write_json


def work(todo: Any, done: Any, float_ready: Any, args: argparse.Namespace) -> None:
    """Measure one cell after another until none is left."""
    end_with_parent()
    while (name := todo.get()) is not None:
        float_ready.wait()
        began, found = time.monotonic(), {}
        try:
            for num in sorted(args.num, reverse=True):
                found[num] = evaluated(name, argparse.Namespace(**vars(args) | {"num": num}))
        except Exception as error:  # one cell that fails must not end the others
            found["error"] = f"{type(error).__name__}: {error}"
        done.put((name, found, time.monotonic() - began))


def evaluated(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """What `tcaq evaluate` says of one cell, and the distance without each block."""
    folder, scores = args.output / name, args.output / f"{name}-{args.num}.json"
    protocol = ["--num", args.num, "--steps", args.steps, "--seed", args.seed, "--work", args.output / "samples"]
    protocol += ["--batch", args.batch, "--device", args.device, *flags(args), "--json", scores]
    with contextlib.redirect_stdout(None):
        app(list(map(str, ["evaluate", folder, "--reference", args.model, *protocol])), standalone_mode=False)
    return {"evaluation": scored(read_json(scores)), "left_out": distances(tcaq.load(folder), args)}


def distances(pipe: Any, args: argparse.Namespace) -> list[float]:
    """The Fréchet distance without each block."""
    values: list[float] = left_out(placed(pipe, args.device), args, args.batch).tolist()
    return values


def main() -> None:
    """Start the processes, sample the float model meanwhile, and write the results after each cell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "quality")
    add_model(parser)
    parser.add_argument("--num", type=int, nargs="+", default=[2000], help="images; results for each number")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--batch", type=int, default=250, help="images at a time")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--jobs", type=int, default=3, help="processes")
    parser.add_argument("--only", nargs="+", choices=list(cells("")), default=list(cells("")))
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "evaluated.json")
    args = parser.parse_args()
    names = [name for name in args.only if (args.output / name / INDEX).is_file()]
    context = processes.get_context("spawn")
    todo, done, float_ready = context.Queue(), context.Queue(), context.Event()
    for item in [*names, *[None] * args.jobs]:
        todo.put(item)
    crew = [context.Process(target=work, args=(todo, done, float_ready, args), daemon=True) for _ in range(args.jobs)]
    for process in crew:
        process.start()
    results: dict[str, Any] = {
        "model": args.model, "steps": args.steps, "seed": args.seed, "device": device_name(args.device),
        "float": {}, "cells": {},
    }  # fmt: skip
    float_pipe = placed(open_float(args.model), args.device)
    for num in sorted(args.num, reverse=True):
        results["float"][num] = distances(float_pipe, argparse.Namespace(**vars(args) | {"num": num}))
    float_ready.set()
    for _ in names:
        name, found, seconds = done.get()
        results["cells"][name] = found
        write_json(args.results, results)
        print(name, round(seconds), found.get("error", ""), flush=True)


def device_name(device: str) -> str:
    """The name of the GPU."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


if __name__ == "__main__":
    main()
