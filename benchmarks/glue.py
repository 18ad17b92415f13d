"""What stands between integer convolutions: microseconds in PyTorch's operations, by torch.compile, and in tcaq's C.

    OMP_NUM_THREADS=1 python benchmarks/glue.py

An activation of 8 images, 128 channels, 32 by 32, channels last: the widest of the U-Net of DDPM CIFAR-10; and 8 attention maps of
256 by 256. Behind docs/lab/integer.md. Medians of process time, one thread, so that other work on the machine matters little.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from time import process_time

import torch
from torch import Tensor, nn
from torch.nn.functional import group_norm, silu

from tcaq.allocator import keep_freed_memory
from tcaq.integer.backend import InputGrid
from tcaq.integer.native.library import native_glue
from tcaq.integer.normed import NormedSilu
from tcaq.numerics.bytes import byte_codes

GROUPS = 32


def number_by_number(units: Tensor, zero_point: int, top: int) -> Tensor:
    """Codes by PyTorch's own conversion to unsigned bytes."""
    return units.round_().add_(zero_point).clamp_(0, top).to(torch.uint8)


def functional(units: Tensor, zero_point: int, top: int) -> Tensor:
    """The arithmetic of `byte_codes` without writing in place, for a compiler to fuse."""
    return (units.round() + (zero_point - 128)).clamp(-128, top - 128).to(torch.int8).view(torch.uint8).bitwise_xor(128)


def operations(x: Tensor, divisor: Tensor, weight: Tensor, bias: Tensor) -> dict[str, Callable[[], Tensor]]:
    """What is timed, by name."""
    compiled = {
        "quantize": torch.compile(lambda x: functional(x / divisor, 7, 255)),
        "silu": torch.compile(lambda x: silu(x)),
        "group norm": torch.compile(lambda x: group_norm(x, GROUPS, weight, bias)),
        "group norm, silu, quantize": torch.compile(
            lambda x: functional(silu(group_norm(x, GROUPS, weight, bias)) / divisor, 7, 255)
        ),
    }
    eager = {
        "quantize, to uint8": lambda: number_by_number(x / divisor, 7, 255),
        "quantize, byte_codes": lambda: byte_codes(x / divisor, 7, 255),
        "silu": lambda: silu(x),
        "group norm": lambda: group_norm(x, GROUPS, weight, bias),
        "group norm, silu, quantize": lambda: byte_codes(silu(group_norm(x, GROUPS, weight, bias)) / divisor, 7, 255),
    }
    glue, norm = native_glue(), nn.GroupNorm(GROUPS, len(weight))
    norm.weight, norm.bias = nn.Parameter(weight, requires_grad=False), nn.Parameter(bias, requires_grad=False)
    plain = InputGrid(1.0, 7, divisor.flatten(), 255)
    normed = replace(plain, before=NormedSilu(norm))
    native = {
        "quantize": lambda: glue.encode(x, plain, 1)[0],
        "quantize, and sums over channels": lambda: glue.encode(x, plain, 1, summed=True)[0],
        "group norm, silu, quantize": lambda: glue.encode(x, normed, 1)[0],
    }
    return (
        {f"eager: {name}": call for name, call in eager.items()}
        | {f"torch.compile: {name}": (lambda call=call: call(x)) for name, call in compiled.items()}
        | {f"C: {name}": call for name, call in native.items()}
    )


def attention() -> dict[str, Callable[[], Tensor]]:
    """The softmax of scores with its quantization, in two and in one, by name."""
    glue, scores = native_glue(), 3 * torch.randn(8, 1, 256, 256, generator=torch.Generator().manual_seed(1))
    even, powers = (1 / 255, -128, -128, 127), (0.5, 4, 2)
    return {
        "eager: softmax": lambda: torch.softmax(scores, -1),
        "C: softmax, then codes": lambda: glue.signed(torch.softmax(scores, -1), *even),
        "C: softmax and codes": lambda: glue.softmax_signed(scores, *even),
        "C: softmax, then log2 grid": lambda: glue.fake_log2(torch.softmax(scores, -1), *powers),
        "C: softmax and log2 grid": lambda: glue.softmax_log2(scores.clone(), *powers),
    }


def microseconds(call: Callable[[], object], repeat: int = 30) -> float:
    """Median time of the process for one call."""
    call()
    times = []
    for _ in range(repeat):
        began = process_time()
        call()
        times.append(process_time() - began)
    return round(1e6 * median(times), 1)


def main() -> None:
    """Print a line of JSON."""
    keep_freed_memory()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 128, 32, 32, generator=generator).to(memory_format=torch.channels_last)
    divisor = (torch.rand(1, 128, 1, 1, generator=generator) + 0.5) / 30
    weight, bias = torch.rand(128, generator=generator), torch.rand(128, generator=generator)
    calls = operations(x, divisor, weight, bias)
    expected = calls["eager: quantize, to uint8"]()
    if not all(
        torch.equal(calls[name](), expected)
        for name in ("eager: quantize, byte_codes", "torch.compile: quantize", "C: quantize")
    ):
        raise SystemExit("the ways to quantize differ")
    print(json.dumps({name: microseconds(call) for name, call in (calls | attention()).items()}, indent=2))


if __name__ == "__main__":
    main()
