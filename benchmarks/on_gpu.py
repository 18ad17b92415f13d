"""The study of image quality on one GPU: many cells side by side, each process working through several of them.

    python benchmarks/on_gpu.py --jobs 12 --num 2000 5000 --only tcaq-w4a4 minmax-w4a4

What a process needs to begin (PyTorch, the GPU's libraries) takes as long as a cell does, so that `quality.py`, which begins anew
for each command, would wait most of the time. Commands and protocol are its own, with larger batches. Beside each evaluation the
results hold the Fréchet distance without each block of images, from which `spread.py` has its standard errors.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import time
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as processes
from machine import machine
from model import add_model
from page import ROOT
from quality import cells, measure
from spread import left_out

import tcaq
from tcaq.cli import app
from tcaq.cli.models import open_float, placed
from tcaq.records import write_json

CALIBRATION = ("--batch", "96")
"""Images at a time: all of the preset's, for a GPU is as fast with them as with a third."""


def command(*args: object) -> str:
    """Run a command in this process; its standard output."""
    written = io.StringIO()
    with contextlib.redirect_stdout(written):
        app(list(map(str, args)), standalone_mode=False)
    return written.getvalue()


def work(todo: Any, done: Any, float_ready: Any, args: argparse.Namespace) -> None:
    """Measure one cell after another until none is left."""

    quantized: dict[tuple[object, ...], str] = {}

    def run(verb: str, *options: object) -> str:
        if verb == "evaluate":
            float_ready.wait()
            return command(verb, *options)
        if options not in quantized:
            quantized[options] = command(verb, *options)
        return quantized[options]

    while (name := todo.get()) is not None:
        began, found = time.monotonic(), {}
        try:
            for num in sorted(args.num, reverse=True):
                args_of = argparse.Namespace(**vars(args) | {"num": num})
                found[num] = measure(name, [*cells(args.preset)[name], *CALIBRATION], args_of, run)
                found[num]["left_out"] = distances(tcaq.load(args.output / name), args_of)
                found[num]["device_peak_memory"] = torch.cuda.max_memory_allocated()
        except Exception as error:  # one cell that fails must not end the others
            found["error"] = f"{type(error).__name__}: {error}"
        done.put((name, found, time.monotonic() - began))


def distances(pipe: Any, args: argparse.Namespace) -> list[float]:
    """The Fréchet distance without each block."""
    values: list[float] = left_out(placed(pipe, args.device), args, args.batch).tolist()
    return values


def main() -> None:
    """Start the processes, sample the float model meanwhile, and write the results after each cell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "on-gpu")
    add_model(parser)
    parser.add_argument("--preset", default="full")
    parser.add_argument("--num", type=int, nargs="+", default=[2000], help="images; results for each number")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--batch", type=int, default=250, help="images at a time in evaluation")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--jobs", type=int, default=8, help="processes")
    parser.add_argument("--only", nargs="+", choices=list(cells("")), default=list(cells("")))
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "on-gpu.json")
    args = parser.parse_args()
    context = processes.get_context("spawn")
    todo, done, float_ready = context.Queue(), context.Queue(), context.Event()
    for name in [*args.only, *[None] * args.jobs]:
        todo.put(name)
    crew = [context.Process(target=work, args=(todo, done, float_ready, args), daemon=True) for _ in range(args.jobs)]
    for process in crew:
        process.start()
    protocol = {
        "model": args.model, "guidance": args.guidance, "preset": args.preset, "steps": args.steps, "seed": args.seed,
        "machine": machine(), "float": {}, "cells": {},
    }  # fmt: skip
    float_pipe = placed(open_float(args.model), args.device)
    for num in sorted(args.num, reverse=True):
        protocol["float"][num] = distances(float_pipe, argparse.Namespace(**vars(args) | {"num": num}))
    float_ready.set()
    for _ in args.only:
        name, found, seconds = done.get()
        protocol["cells"][name] = {**found, "wall": round(seconds, 1)}
        write_json(args.results, protocol)
        print(name, round(seconds), found.get("error", ""), flush=True)


if __name__ == "__main__":
    main()
