"""Integer execution on an NVIDIA GPU beside float: milliseconds a step, peak memory, and what is left of the fake model's output.

    python benchmarks/gpu.py                              two minutes on an H100
    TRITON_INTERPRET=1 python benchmarks/gpu.py --tiny    a small model without a GPU, to see that all of it runs

The configuration of google/ddpm-cifar10-32 (35.7 million parameters) with random weights, for which speed does not care,
quantized by `minmax` from one image, at W8A8 and W4A4. A step is one call of the U-Net, from event to event on the GPU after
three that are not counted, the median of 20; so what the processor takes to launch it is in it. Layers are timed as they lie in
CUDA graphs, without that. TF32 is off but where a row is named for it. Writes its results after every row.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from shutil import rmtree
from statistics import median
from typing import Any

import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from large import cifar10, randomised
from machine import machine
from page import ROOT
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear

import tcaq
from tcaq.evaluate.metrics import psnr
from tcaq.integer.cuda import CUDA
from tcaq.integer.cuda_triton import TRITON, TritonConv, TritonLinear
from tcaq.integer.layer import IntegerLayer
from tcaq.integer.lower import BACKENDS
from tcaq.layers.hold import holding_weights
from tcaq.models.sampler import sample
from tcaq.records import write_json

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
RESULTS = ROOT / "benchmarks" / "results" / "gpu.json"
WIDTHS = {"w8a8": 8, "w4a4": 4}
FLOATS = {
    "fp32": (torch.float32, False, torch.contiguous_format),
    "fp32-tf32": (torch.float32, True, torch.contiguous_format),
    "bf16": (torch.bfloat16, False, torch.contiguous_format),
    "bf16-channels-last": (torch.bfloat16, False, torch.channels_last),
}
"""Dtype, whether TF32 is on, and how images lie in memory."""
QUANTIZED = {
    "fake": (None, "plan", torch.float32),
    "int_mm": (CUDA, "plan", torch.float32),
    "triton": (TRITON, "plan", torch.float32),
    "triton-fused": (TRITON, "fused", torch.float32),
    "triton-bf16-fused": (TRITON, "fused", torch.bfloat16),
}
"""Kernels, what becomes of attention's products, and the dtype between the layers."""


def small() -> DDIMPipeline:
    """A model with every kind of layer, small enough for the interpreter."""
    unet = randomised(
        lambda: UNet2DModel(
            sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )
    )  # fmt: skip
    return DDIMPipeline(unet, DDIMScheduler())


@contextmanager
def tf32(on: bool) -> Iterator[None]:
    """Whether float32 products may round their factors to 10 bits."""
    parts = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [part.fp32_precision for part in parts]
    for part in parts:
        part.fp32_precision = "tf32" if on else "ieee"
    yield
    for part, value in zip(parts, before, strict=True):
        part.fp32_precision = value


def wait() -> None:
    """For the GPU to be done."""
    if GPU:
        torch.cuda.synchronize()


def milliseconds(call: Callable[[], object], reps: int) -> list[float]:
    """Of each call, after three."""
    for _ in range(3 if GPU else 1):
        call()
    wait()
    if not GPU:
        found = []
        for _ in range(reps):
            began = time.perf_counter()
            call()
            found.append(1e3 * (time.perf_counter() - began))
        return found
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(reps + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    wait()
    return [start.elapsed_time(end) for start, end in pairwise(marks)]


def microseconds(call: Callable[[], object], count: int = 20) -> float:
    """Of one call among many in a row, by a CUDA graph, so that launching takes nothing."""
    if not GPU:
        return 1e3 * median(milliseconds(call, 1))
    call()
    wait()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            call()
    return 1e3 * median(milliseconds(graph.replay, 5)) / count


def given(unet: nn.Module, batch: int, dtype: torch.dtype, form: torch.memory_format = torch.contiguous_format) -> Any:
    """Inputs of a step."""
    size = unet.config.sample_size
    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    return x.to(DEVICE, dtype).contiguous(memory_format=form), torch.tensor(481)  # where DDIMPipeline has it


@torch.no_grad()
def measured(unet: nn.Module, inputs: Any, reps: int) -> dict[str, float]:
    """A row: milliseconds a step, the slowest and fastest, and GiB, of the model alone and at most."""
    x, when = inputs
    if GPU:
        torch.cuda.empty_cache()
        held = torch.cuda.memory_allocated()
        unet(x, when)  # what choosing blocks takes is not counted
        torch.cuda.reset_peak_memory_stats()
    times = milliseconds(lambda: unet(x, when).sample, reps)
    row = {"ms": median(times), "fastest": min(times), "slowest": max(times)}
    if GPU:
        row |= {"held_gib": held / 2**30, "peak_gib": torch.cuda.max_memory_allocated() / 2**30}
    return {name: round(value, 4) for name, value in row.items()}


def lowered(folder: Path, name: str) -> tuple[DDIMPipeline, list[str]]:
    """A checkpoint's pipeline on the device, as a row of QUANTIZED says, and what became of its layers."""
    backend, products, dtype = QUANTIZED[name]
    pipe = tcaq.load(folder, dtype=dtype).to(DEVICE)
    if backend is None:
        return pipe, []
    BACKENDS[DEVICE] = (backend if GPU else replace(backend, missing=lambda: None),)
    return pipe, [line[:300] for line in tcaq.lower(pipe, products=products).summary().splitlines()]


def decibels(found: Tensor, expected: Tensor) -> float:
    """Signal to noise."""
    noise = (found.float() - expected.float()).square().mean()
    return round(float(10 * torch.log10(expected.float().var() / noise.clamp(min=1e-20))), 2)


def layers(unet: nn.Module, inputs: Any) -> list[dict[str, Any]]:
    """A row for each shape of an integer layer: microseconds of codes and product, and of PyTorch's float layers."""
    met: dict[Any, tuple[str, IntegerLayer, Tensor, int]] = {}

    def remember(name: str) -> Any:
        def hook(layer: IntegerLayer, args: Any, _: Any) -> None:
            x, kernel = args[0], layer._kernel
            key = (kernel.matrix.out, kernel.matrix.taps, getattr(kernel, "geometry", None), x.shape, x.stride())
            met[key] = (name, layer, x, met[key][3] + 1 if key in met else 1)

        return hook

    handles = [m.register_forward_hook(remember(n)) for n, m in unet.named_modules() if isinstance(m, IntegerLayer)]
    unet(*inputs)
    for handle in handles:
        handle.remove()
    return sorted((layer_row(*found) for found in met.values()), key=lambda row: -row["us"] * row["count"])


def layer_row(name: str, layer: IntegerLayer, x: Tensor, count: int) -> dict[str, Any]:
    """See `layers`."""
    kernel: TritonConv | TritonLinear = layer._kernel
    matrix, conv = kernel.matrix, isinstance(kernel, TritonConv)
    result = layer(x)
    operations = 2 * matrix.taps * matrix.channels * result.numel()
    row: dict[str, Any] = {
        "layer": name,
        "count": count,
        "input": list(x.shape),
        "out": matrix.out,
        "taps": matrix.taps,
    }
    row["us"] = microseconds(lambda: layer(x))
    saved, last = matrix.multiply, []
    matrix.multiply = lambda *arguments: last.append(arguments)
    row["codes_us"] = microseconds(lambda: layer(x))
    matrix.multiply = saved
    row["product_us"] = microseconds(lambda: matrix.multiply(*last[0]))
    shape = (matrix.out, matrix.channels, *kernel.kernel) if conv else (matrix.out, matrix.channels)
    for dtype, label in ((torch.float32, "tf32"), (torch.bfloat16, "bf16")):
        weight, y = torch.randn(shape, device=DEVICE, dtype=dtype), x.to(dtype)
        geometry = kernel.geometry.arguments if conv else ()
        with tf32(True):
            row[f"{label}_us"] = microseconds(
                (lambda w=weight, y=y, g=geometry: conv2d(y, w, None, *g))
                if conv
                else (lambda w=weight, y=y: linear(y, w))
            )
    row |= {key: round(value, 2) for key, value in row.items() if isinstance(value, float)}
    row["product_gops"] = round(operations / row["product_us"] / 1e3)
    row["blocks"] = [list(choice.values()) for choice in matrix._chosen.values()]
    return row


def profile(unet: nn.Module, inputs: Any) -> dict[str, Any]:
    """Where the GPU's time in one step goes: milliseconds of the programs that take most, and of all."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as recording

    with recording(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(5):
            unet(*inputs)
        wait()
    rows = [(event.key, event.self_device_time_total / 5e3, event.count // 5) for event in recorded.key_averages()]
    rows.sort(key=lambda row: -row[1])
    return {
        "busy_ms": round(sum(row[1] for row in rows), 3),
        "most": [(k[:90], round(t, 3), n) for k, t, n in rows[:14]],
    }


class Report:
    """What was found so far; each part is written when it is there, and left out when time is up."""

    def __init__(self, path: Path, limit: float) -> None:
        self.path, self.limit, self.began = path, limit, time.monotonic()
        device = torch.cuda.get_device_name() if GPU else "none"
        self.found: dict[str, Any] = {"gpu": device, "machine": machine(), "torch": torch.__version__, "parts": {}}

    def add(self, name: str, make: Callable[[], Any]) -> Any:
        """One part. An error is its result, so that the others are measured all the same."""
        if time.monotonic() - self.began > self.limit:
            print(f"{name}: left out, {self.limit} s are over", flush=True)
            return None
        began = time.monotonic()
        try:
            value = make()
        except Exception as error:
            value = {"error": f"{type(error).__name__}: {error}"[:2000]}
        self.found["parts"][name] = value
        self.found["seconds"] = round(time.monotonic() - self.began, 1)
        write_json(self.path, self.found)
        print(
            f"{name} ({time.monotonic() - began:.1f} s): {value if isinstance(value, dict) else len(value)}", flush=True
        )
        return value


def floats(report: Report, pipe: DDIMPipeline, batches: list[int], reps: int) -> None:
    """Rows of FLOATS."""
    for name, (dtype, fast, form) in FLOATS.items():
        unet = pipe.unet.to(DEVICE).to(dtype=dtype, memory_format=form)
        with tf32(fast):
            for batch in batches:
                report.add(
                    f"{name}/{batch}", lambda b=batch, u=unet, d=dtype, f=form: measured(u, given(u, b, d, f), reps)
                )


@torch.no_grad()
def quantized(report: Report, folder: Path, width: str, batches: list[int], reps: int, steps: int) -> None:
    """Rows of QUANTIZED, the fake model's first, with which the others are compared."""
    expected: dict[str, Tensor] = {}
    for name, (backend, _, dtype) in QUANTIZED.items():
        made: list[DDIMPipeline] = []

        def make(name: str = name, made: list[DDIMPipeline] = made) -> dict[str, Any]:
            pipe, said = lowered(folder, name)
            made.append(pipe)
            return {"layers": said}

        report.add(f"{width}/{name}/lower", make)
        if not made:
            continue
        pipe, unet = made[0], made[0].unet
        # a fake model samples with its weights at hand, too
        with tf32(False), holding_weights(unet):
            for batch in batches:
                report.add(
                    f"{width}/{name}/{batch}", lambda b=batch, u=unet, d=dtype: measured(u, given(u, b, d), reps)
                )
            report.add(f"{width}/{name}/fidelity", lambda p=pipe, d=dtype: fidelity(p, d, expected, steps))
            if backend is TRITON and (name == "triton" or dtype == torch.bfloat16):
                middle = given(unet, batches[len(batches) // 2], dtype)
                report.add(f"{width}/{name}/layers", lambda u=unet, i=middle: layers(u, i))
                if GPU:
                    report.add(f"{width}/{name}/profile", lambda u=unet, i=middle: profile(u, i))


def fidelity(pipe: DDIMPipeline, dtype: torch.dtype, expected: dict[str, Tensor], steps: int) -> dict[str, Any]:
    """Decibels to the fake model, whose output is remembered: of one prediction, and of images."""
    found = {"prediction": pipe.unet(*given(pipe.unet, 8, dtype)).sample.float()}
    if dtype == torch.float32:  # the pipeline puts out no images in bfloat16
        found["images"] = sample(pipe, range(8 if GPU else 1), steps).float() / 255
    if not expected:
        expected.update(found)
        return {"std": {name: round(float(value.std()), 4) for name, value in found.items()}}
    result: dict[str, Any] = {"prediction_sqnr": decibels(found["prediction"], expected["prediction"])}
    if "images" in found:
        ratios = psnr(found["images"], expected["images"])
        result["image_psnr"] = [round(float(value), 2) for value in (ratios.mean(), ratios.min())]
    return result


def table(parts: dict[str, Any]) -> str:
    """Layers of the last measured table, widest first."""
    keys = (
        "us",
        "codes_us",
        "product_us",
        "product_gops",
        "tf32_us",
        "bf16_us",
        "count",
        "out",
        "taps",
        "input",
        "layer",
    )
    lines = []
    for name, rows in parts.items():
        if name.endswith("layers") and isinstance(rows, list):
            lines += [name, "  ".join(keys)] + ["  ".join(str(row[key]) for key in keys) for row in rows]
    return "\n".join(lines)


def quantize(pipe: DDIMPipeline, bits: int, folder: Path) -> dict[str, Any]:
    """Write a checkpoint, on the CPU."""
    calibration = {"images": 1, "steps": 2, "batch": 1}
    recipe = tcaq.preset_recipe("minmax", "fast", weights=bits, activations=bits, calibration=calibration)
    rmtree(folder, ignore_errors=True)
    tcaq.quantize(pipe, recipe, folder)
    return {"recipe": recipe.program}


def main() -> None:
    """Quantize on the CPU, measure on the GPU, print and write everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--limit", type=float, default=150.0, help="seconds after which no part begins")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "gpu")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if not GPU and not (args.tiny and os.environ.get("TRITON_INTERPRET") == "1"):
        raise SystemExit("PyTorch finds no CUDA device; TRITON_INTERPRET=1 and --tiny run without one")
    batches, reps, steps = ([2], 1, 1) if args.tiny else ([8, 64, 256], 20, 10)
    make = small if args.tiny else lambda: cifar10()[0]
    report = Report(args.results, args.limit)
    floats(report, make(), batches, reps)
    for width, bits in WIDTHS.items():
        folder = args.output / ("tiny" if args.tiny else "cifar10") / width
        report.add(f"{width}/quantize", lambda b=bits, f=folder: quantize(make(), b, f))
        quantized(report, folder, width, batches, reps, steps)
    print(table(report.found["parts"]))
    print(f"{report.found['seconds']} s; {args.results}")


if __name__ == "__main__":
    main()
