"""What keeping freed memory is worth: a denoiser step with the C library's defaults, and with `keep_freed_memory`.

    python benchmarks/allocator.py CHECKPOINT

Each measurement is a process of its own; both kinds take turns, and the median of each counts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from machine import machine

import tcaq
from tcaq.allocator import keep_freed_memory
from tcaq.records import write_json
from tcaq.reference.load import load_pipeline

RESULTS = Path(__file__).parent / "results" / "allocator.json"
BATCH, REPEATS, ROUNDS = 32, 7, 5


@torch.inference_mode()
def seconds(denoiser: torch.nn.Module) -> float:
    """Median seconds of a step."""
    noise = torch.randn(BATCH, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    denoiser(noise, 500)
    times = []
    for _ in range(REPEATS):
        began = perf_counter()
        denoiser(noise, 500)
        times.append(perf_counter() - began)
    return median(times)


def measure(checkpoint: str, keep: bool) -> dict[str, float]:
    """Seconds of a float and of a fake-quantized step in this process."""
    if keep:
        keep_freed_memory()
    return {"float": seconds(load_pipeline().unet), "quantized": seconds(tcaq.load(checkpoint).unet)}


def main() -> None:
    """Take turns and write the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--here", choices=["default", "kept"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        print(json.dumps(measure(args.checkpoint, args.here == "kept")))
        return
    times: dict[str, list[dict[str, float]]] = {"default": [], "kept": []}
    for _ in range(ROUNDS):
        for kind, rows in times.items():
            command = [sys.executable, __file__, args.checkpoint, "--here", kind]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            rows.append(json.loads(out.splitlines()[-1]))
    result = {
        model: {kind: round(median(row[model] for row in rows), 4) for kind, rows in times.items()}
        for model in ("float", "quantized")
    }
    threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    write_json(RESULTS, {"machine": machine(), "threads": threads, "batch": BATCH, "seconds": result})
    for model, row in result.items():
        print(
            f"{model}: {row['default']:.3f} s by default, {row['kept']:.3f} s kept ({row['kept'] / row['default']:.2f})"
        )


if __name__ == "__main__":
    main()
