"""Speed, memory and size of real integer execution, beside float and other tools, and how they change as work grows.

    python benchmarks/speed.py                  tables and memory; half an hour on two cores, nothing beside it
    python benchmarks/speed.py --only memory    one stage of it; the others stay as they were measured
    python benchmarks/speed.py --only table --parts exports --output NEW
                                                one part of the tables; a folder that is kept holds the exports of an earlier run
    OMP_NUM_THREADS=1 python benchmarks/speed.py --models cifar10 --only table --parts ours --widths w4a4 w8a8-symmetric
            --results docs/lab/speed-one-thread.json    one core
    python benchmarks/speed.py --only table --parts brief --results docs/lab/speed-no-vnni.json
                                                what a processor without VNNI is asked
    python benchmarks/speed.py --only growth --widths w4a4 --results benchmarks/results/growth.json
                                                how that changes with batch and size; `--growing fp32,integer` where the
                                                processor does not compute bf16, which takes ten times as long as fp32 there

Two models: the U-Net of google/ddpm-cifar10-32 (35.7 million parameters) with random weights, for which speed does not care, and
the bundled one. Each is quantized without gradients from few images. Then everything is `tcaq bench`: contenders in turn, in one
run, medians. Peers that are not installed (`pip install 'tcaq[bench]'`) say so in the results. `python benchmarks/page.py` writes
docs/results.md with its tables and docs/images/growth.png.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from large import cifar10
from page import ROOT
from quality import tcaq

from tcaq.records import read_json, write_json

RESULTS = ROOT / "benchmarks" / "results" / "speed.json"
WIDTHS = {"w8a8": (8, 8), "w4a8": (4, 8), "w4a6": (4, 6), "w4a4": (4, 4)}
BYTE = {"bits": 8}
SYMMETRIC = {
    "rules": [
        {"match": "*", "kinds": ["conv", "linear"], "weight": {"bits": 8, "signed": True, "symmetric": True}, "input": BYTE},
        {"match": "*", "kinds": ["scores"], "left": {"code": "affine", **BYTE}, "right": BYTE},
        {"match": "*", "kinds": ["mix"], "left": {"code": "unit", **BYTE}, "right": BYTE},
    ]
}  # fmt: skip
"""Everything at eight bits, weights around zero: what integer kernels multiply at once; see docs/integer.md."""
TABLE = {
    "ours": "fp32,fp32-channels-last,bf16,bf16-channels-last,fake,integer,integer-eager,integer-fused,integer-bf16",
    "exports": "fp32,onnx-fp32,onnx,onnx-static,openvino-fp32,openvino,nncf",
    "others": "fp32,fp32-compiled,torchao,quanto",
    "brief": "fp32,fp32-channels-last,fake,integer,integer-eager,integer-fused",
}
"""Contenders that run beside each other; more at once would meet each other in memory."""
ASKED = ("ours", "exports", "others")
"""Of these by default."""
PARTS = {
    "w8a8": ["ours", "brief"],
    "w8a8-symmetric": ["ours", "exports", "others"],
    "w4a8": ["brief"],
    "w4a6": ["ours"],
    "w4a4": ["ours", "exports", "brief"],
}
"""What is measured of each checkpoint; other tools make the same of a model whatever our widths are."""
HELD = "fp32,bf16,integer,integer-fused"
"""Contenders whose memory is measured."""
GROWING = "fp32,bf16,integer,integer-fused"
"""Contenders that are measured as work grows."""
BATCHES = "1,2,4,8,16,32,64"
SIZES = (32, 48, 64, 96, 128)


def prepare(output: Path, widths: Sequence[str]) -> dict[str, tuple[str, dict[str, Path]]]:
    """The float model's name and the checkpoints by width, for each model; what is there is kept."""
    folder = output / "cifar10" / "float"
    if not (folder / "model_index.json").exists():
        cifar10()[0].save_pretrained(folder)
    plan = output / "symmetric.json"
    write_json(plan, SYMMETRIC)
    found = {}
    for name, model in (("cifar10", str(folder)), ("reference", "reference")):
        checkpoints = {width: output / name / width for width in widths}
        for width, checkpoint in checkpoints.items():
            weights, activations = WIDTHS[width.removesuffix("-symmetric")]
            options = ["--preset", "fast", "--samples", 4, "--steps", 8, "--batch", 4, "--no-correction"]
            options += ["--plan", plan] if width.endswith("symmetric") else []
            tcaq(
                "quantize", model, "--output", checkpoint, "--weights", weights, "--activations", activations, *options
            )
        found[name] = (model, checkpoints)
    return found


def bench(checkpoint: Path, model: str, against: str, *options: object) -> Any:
    """One run of `tcaq bench`."""
    result = checkpoint.parent / "bench.json"
    tcaq("bench", checkpoint, "--reference", model, "--against", against, "--json", result, *options)
    return read_json(result)


def table(model: str, checkpoint: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Contenders at a batch of 8, a run for each part of the table."""
    options = ("--batches", 8, "--images", 8, "--repeat", 7, "--work", checkpoint.with_suffix(".bench"))
    asked = [part for part in PARTS[checkpoint.name] if part in args.parts]
    return {part: bench(checkpoint, model, TABLE[part], *options) for part in asked}


def memory(model: str, checkpoint: Path, _: argparse.Namespace) -> Any:
    """Peak memory of sampling one image; other work beside it does no harm."""
    brief = ("--batches", 1, "--repeat", 1, "--images", 1, "--steps", 2)
    return bench(checkpoint, model, HELD, *brief, "--memory")


def growth(model: str, checkpoint: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds a step by batch at the model's own size, and by size at a batch of one."""
    brief = ("--repeat", 3, "--images", 1, "--steps", 1)
    by_size = {size: bench(checkpoint, model, args.growing, *brief, "--batches", 1, "--size", size) for size in SIZES}
    return {
        "batch": bench(checkpoint, model, args.growing, *brief, "--batches", BATCHES),
        "size": {str(size): found for size, found in by_size.items()},
    }


def main() -> None:
    """Measure what is asked for, and write each part when it is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "speed")
    parser.add_argument("--only", nargs="+", choices=STAGES, default=["memory", "table"])
    parser.add_argument("--models", nargs="+", choices=("cifar10", "reference"), default=("cifar10", "reference"))
    parser.add_argument("--widths", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--parts", nargs="+", choices=list(TABLE), default=ASKED, help="of the tables")
    parser.add_argument("--growing", default=GROWING, help="contenders that are measured as work grows")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    results = read_json(args.results) if args.results.exists() else {}
    widths = [width for width in args.widths if set(PARTS[width]) & set(args.parts)]
    for name, (model, checkpoints) in prepare(args.output, widths).items():
        for width, checkpoint in checkpoints.items() if name in args.models else ():
            for stage in args.only:
                if stage != "growth" or width == GROWN:
                    cell = results.setdefault(name, {}).setdefault(width, {})
                    cell[stage] = cell.get(stage, {}) | STAGES[stage](model, checkpoint, args)
                    write_json(args.results, results)
                    print(name, width, stage, flush=True)


STAGES = {"memory": memory, "table": table, "growth": growth}
GROWN = "w4a4"
"""The width whose growth is measured."""

if __name__ == "__main__":
    main()
