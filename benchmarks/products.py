"""What a convolution takes in float and on each integer backend of this processor, in GOP/s.

    OMP_NUM_THREADS=1 python benchmarks/products.py

Layers of the U-Nets of DDPM CIFAR-10 and of the bundled model, batch 8, from float inputs to float outputs: making codes is part of
it. Weights and inputs are random, zero points of weights off the middle, as those of most layers are. Medians of process time,
contenders in turn, one thread, so that other work on the machine matters little. Behind docs/lab/integer.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from statistics import median
from time import process_time

import torch
from torch import Tensor, nn

from tcaq.allocator import keep_freed_memory
from tcaq.integer.backend import Backend
from tcaq.integer.build import NoKernel, integer_layer
from tcaq.integer.cpu import CPU
from tcaq.integer.native.avx2_kernels import AVX2, AVX2_NARROW, AVX2_WIDE
from tcaq.integer.native.kernels import COMPILED
from tcaq.integer.native.vnni_kernels import VNNI, VNNI_WIDE
from tcaq.layers.conv import QuantizedConv2d
from tcaq.quantizers.clock import StepClock
from tcaq.spec.grid import AffineGrid
from tcaq.spec.plan import LayerGrids
from tcaq.spec.steps import StepGroups

SHAPES = [
    (3, 128, 32, 3),
    (128, 128, 32, 3),
    (256, 256, 16, 3),
    (256, 256, 8, 3),
    (512, 256, 16, 3),
    (256, 128, 32, 1),
    (32, 32, 32, 3),
    (96, 96, 8, 3),
]
"""Channels in and out, size of the image, of the kernel."""
WIDTHS = [(4, 4), (4, 8), (6, 6), (8, 8)]
BACKENDS = {
    "oneDNN": CPU, "oneDNN, compiled glue": COMPILED, "AVX2": AVX2, "AVX2, Winograd": AVX2_NARROW,
    "AVX2, Winograd of 16 bits": AVX2_WIDE, "VNNI": VNNI, "VNNI, Winograd of 16 bits": VNNI_WIDE,
}  # fmt: skip


def layer_of(conv: nn.Conv2d, weights: int, activations: int) -> QuantizedConv2d:
    """The convolution quantized, with inputs of a normal distribution in mind."""
    grids = LayerGrids(
        name="layer", kind="conv", weight=AffineGrid(bits=weights), inputs=(AffineGrid(bits=activations),)
    )
    layer = QuantizedConv2d.wrap(conv, grids, StepClock(StepGroups(boundaries=())))
    inputs, rows, weight = layer.input_quantizer, layer.weight_quantizer, layer.weight.detach()
    inputs.set_rows(torch.tensor([6.0 / 2**activations]), torch.tensor([2 ** (activations - 1) + inputs.low]))
    flat = weight.flatten(1)
    low = flat.amin(1) - 0.1 * flat.std()  # so that zero points are off the middle
    scale = (flat.amax(1) - low) / (2**weights - 1)
    rows.set_rows(scale, (-low / scale).round() + rows.low, weight)
    return layer


def contenders(conv: nn.Conv2d, x: Tensor) -> dict[str, Callable[[], Tensor]]:
    """What is timed, by name."""
    calls: dict[str, Callable[[], Tensor]] = {"fp32": lambda: conv(x)}
    for weights, activations in WIDTHS:
        for name, backend in BACKENDS.items():
            if (call := lowered(conv, backend, weights, activations)) is not None:
                calls[f"W{weights}A{activations} {name}"] = lambda call=call: call(x)
    return calls


def lowered(conv: nn.Conv2d, backend: Backend, weights: int, activations: int) -> nn.Module | None:
    """The layer on a backend, if that is here and runs it exactly."""
    if backend.missing() is not None:
        return None
    try:
        return integer_layer(layer_of(conv, weights, activations), backend)
    except NoKernel:
        return None


def measure(calls: dict[str, Callable[[], Tensor]], repeats: int = 9) -> dict[str, float]:
    """Seconds of each."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            start = process_time()
            call()
            times[name].append(process_time() - start)
    return {name: median(own[1:]) for name, own in times.items()}


@torch.no_grad()
def main() -> None:
    """Print a line of JSON for each shape."""
    torch.manual_seed(0)
    keep_freed_memory()
    for channels, out, size, kernel in SHAPES:
        conv = nn.Conv2d(channels, out, kernel, padding=kernel // 2).to(memory_format=torch.channels_last)
        x = torch.randn(8, channels, size, size).contiguous(memory_format=torch.channels_last)
        operations = 2e-9 * 8 * size**2 * conv.weight.numel()
        seconds = measure(contenders(conv, x))
        speeds = {name: round(operations / own) for name, own in seconds.items()}
        print(json.dumps({"shape": (channels, out, size, kernel)} | speeds), flush=True)


if __name__ == "__main__":
    main()
