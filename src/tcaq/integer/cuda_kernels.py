"""The GPU programs of integer execution, in Triton's language: inputs to codes, and codes times weights to outputs.

Codes are signed bytes (a code less 128), channels last, in an image that has its padding around it already: bytes of the zero
point's code. So the product's inner loop reads whole blocks without a mask, as fast as the int8 matrix units take them, and what
padding adds to a sum is what the zero point's term takes off again. A linear layer is an image of one column.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from triton.testing import do_bench

MIDDLE = tl.constexpr(128)
"""What signed codes are less than unsigned ones."""
ROUNDER = tl.constexpr(12582912.0)
"""1.5 * 2^23: float32 has no fractions there, so adding it and taking it off rounds to nearest, ties to even."""


@triton.jit
def surround(
    codes, zero, p, c, images, height, width, padded_height, padded_width, padded_channels, up, left,
):  # fmt: skip
    """Write the zero point's code to pixels p of the padding, in all images: rows above and below, then what is beside."""
    each = padded_height * padded_width - height * width
    image, place = p // each, p % each
    whole, beside = 2 * up * padded_width, tl.maximum(2 * left, 1)
    line, later = place // padded_width, tl.maximum(place - whole, 0)
    row = tl.where(place < whole, line + tl.where(line < up, 0, height), later // beside + up)
    column = later % beside
    column = tl.where(place < whole, place % padded_width, column + tl.where(column < left, 0, width))
    goal = ((image * padded_height + row).to(tl.int64) * padded_width + column) * padded_channels
    values = (tl.zeros_like(goal)[:, None] + tl.zeros_like(c)[None, :] + zero - MIDDLE).to(tl.int8)
    tl.store(
        codes + goal[:, None] + c[None, :], values, mask=(image < images)[:, None] & (c < padded_channels)[None, :]
    )


@triton.jit(do_not_specialize=["zero", "top", "images", "width", "padded_height", "padded_width", "up", "left"])
def encode(
    x, codes, equalizer, scale, zero, top,
    total, images, pixels, width, channels, x_image, x_pixel, x_channel,
    padded_height, padded_width, padded_channels, up, left,
    BY_PIXEL: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """`clamp(round(x / (scale * equalizer)) + zero, 0, top) - 128`, rounding ties to even, and the zero point's code around it.

    Args: x: float [images, channels, pixels] with strides; codes: int8 [images, padded height, padded width, padded channels];
        scale, zero: numbers, or float32 [total] if BY_PIXEL, without padding; total: images * pixels; up, left: how far in the
        image begins.
    """
    block, inner = tl.program_id(0), tl.cdiv(total, BLOCK_PIXELS)
    c = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    if block < inner:
        p = block * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
        image, pixel = (p // pixels).to(tl.int64), p % pixels
        inside, real = (p < total)[:, None], (c < channels)[None, :]
        place = (image * x_image + pixel.to(tl.int64) * x_pixel)[:, None] + c.to(tl.int64)[None, :] * x_channel
        values = tl.load(x + place, mask=inside & real, other=0.0).to(tl.float32)
        gain = tl.load(equalizer + c, mask=c < channels, other=1.0)[None, :]
        if BY_PIXEL:
            step = tl.load(scale + p, mask=p < total, other=1.0)[:, None]
            origin = tl.load(zero + p, mask=p < total, other=0.0)[:, None]
        else:
            step, origin = scale, zero.to(tl.float32)
        # clipping between whole numbers may come before rounding, which keeps them and the order of everything else
        units = tl.minimum(tl.maximum(tl.div_rn(values, step * gain), -origin), top - origin)
        # what fills up the channels was read as 0, whose code is the zero point's
        found = ((units + ROUNDER) - ROUNDER + (origin - MIDDLE)).to(tl.int8)
        row, column = (pixel // width + up).to(tl.int64), pixel % width + left
        goal = ((image * padded_height + row) * padded_width + column) * padded_channels
        tl.store(codes + goal[:, None] + c[None, :], found, mask=inside & (c < padded_channels)[None, :])
    elif not BY_PIXEL:
        surround(
            codes, zero, (block - inner) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS), c, images, pixels // width, width,
            padded_height, padded_width, padded_channels, up, left,
        )  # fmt: skip


@triton.jit(do_not_specialize=["zero", "out_width", "kernel_width", "taps", "size"])
def multiply(
    codes, weight, sums, scales, bias, rest, result, scale, zero,
    total, pixels, out_width, out, codes_image, down, right, channels, step_down, step_right, kernel_width, taps,
    result_image, result_pixel, result_channel, size,
    HAS_BIAS: tl.constexpr, HAS_REST: tl.constexpr, BY_PIXEL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`Σ (code - zero) (weight + rest) * scales * scale + bias` for a block of pixels and output channels; sums are exact.

    Args: codes: as `encode` writes them; weight: int8 [out, taps, channels]; sums: int32 [out], each weight's sum; scales, bias:
        float32 [out]; rest: int32 [out]; result: float [images, out, pixels] with strides; scale, zero: of the inputs: numbers,
        or float32 [total] if BY_PIXEL; down, right, step_down, step_right: bytes between pixels and between taps;
        size: not used here: what the choice of blocks is remembered for.
    """
    across = tl.cdiv(out, BLOCK_N)
    m = tl.program_id(0) // across * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % across * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # rows and columns beyond the end read the last ones again, and are not written
    last, column = tl.minimum(m, total - 1), tl.minimum(n, out - 1)
    start = (last // pixels).to(tl.int64) * codes_image
    start += (last % pixels // out_width).to(tl.int64) * down + (last % pixels % out_width).to(tl.int64) * right
    inputs = codes + start[:, None] + k[None, :]
    weights = weight + (column.to(tl.int64) * (taps * channels))[None, :] + k[:, None]
    products = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    counted = tl.zeros((BLOCK_M, 16), tl.int32)
    ones = tl.full((BLOCK_K, 16), 1, tl.int8)
    parts = channels // BLOCK_K
    for step in range(taps * parts):
        tap = step // parts
        place = tap // kernel_width * step_down + tap % kernel_width * step_right + step % parts * BLOCK_K
        a = tl.load(inputs + place)
        b = tl.load(weights + step * BLOCK_K)
        products = tl.dot(a, b, products, out_dtype=tl.int32)
        if HAS_REST:
            counted = tl.dot(a, ones, counted, out_dtype=tl.int32)
    written = n < out
    if BY_PIXEL:
        grain = tl.load(scale + m, mask=m < total, other=0.0)[:, None]
        origin = tl.load(zero + m, mask=m < total, other=0.0).to(tl.int32)[:, None] - MIDDLE
    else:
        grain, origin = scale, zero - MIDDLE
    products -= origin * tl.load(sums + n, mask=written, other=0)[None, :]
    if HAS_REST:
        products += tl.max(counted, 1)[:, None] * tl.load(rest + n, mask=written, other=0)[None, :]
    values = products.to(tl.float32) * (tl.load(scales + n, mask=written, other=0.0)[None, :] * grain)
    if HAS_BIAS:
        values += tl.load(bias + n, mask=written, other=0.0)[None, :]
    goal = (m // pixels).to(tl.int64) * result_image + (m % pixels).to(tl.int64) * result_pixel
    goal = goal[:, None] + n.to(tl.int64)[None, :] * result_channel
    tl.store(result + goal, values.to(result.dtype.element_ty), mask=(m < total)[:, None] & written[None, :])


SIZES = [(64, 64, 4, 4), (64, 128, 4, 4), (128, 128, 8, 3), (128, 256, 8, 3), (256, 128, 8, 3), (128, 32, 4, 4)]
"""Blocks to choose from: pixels, output channels, warps, and how many steps are loaded ahead."""
ENOUGH = 64
"""Programs that keep a GPU busy: half as many as a large one runs at a time."""


def blocks(total: int, out: int, meta: Mapping[str, Any]) -> int:
    """How many programs `multiply` takes."""
    found: int = triton.cdiv(total, meta["BLOCK_M"]) * triton.cdiv(out, meta["BLOCK_N"])
    return found


def promising(configs: Sequence[Any], given: Mapping[str, Any], **_: Any) -> list[Any]:
    """Those that waste few output channels and keep the GPU busy; if none does, the one with most programs."""
    total, out = given["total"], given["out"]
    narrow = out <= 32
    fitting = [c for c in configs if (c.kwargs["BLOCK_N"] == 32) is narrow and c.kwargs["BLOCK_N"] < max(2 * out, 65)]
    busy = [c for c in fitting if blocks(total, out, c.kwargs) >= ENOUGH]
    return busy or [max(fitting, key=lambda c: blocks(total, out, c.kwargs))]


def timed(call: Callable[[], None], quantiles: Sequence[float]) -> Any:
    """Milliseconds, from few runs: each shape of a model's layers is met for the first time, and tried, once."""
    if not torch.cuda.is_available():  # the interpreter's time says nothing
        return [0.0] * len(quantiles)
    return do_bench(call, warmup=1, rep=5, quantiles=quantiles)


tuned = triton.autotune(
    [triton.Config({"BLOCK_M": m, "BLOCK_N": n}, num_warps=warps, num_stages=stages) for m, n, warps, stages in SIZES],
    key=["out", "channels", "taps", "size"],
    prune_configs_by={"early_config_prune": promising},
    do_bench=timed,
)(multiply)


def choose(*arguments: Any, **meta: Any) -> dict[str, Any]:
    """Launch `multiply` with each promising choice, keep the fastest, and return it: what a further launch takes beside `meta`."""
    given = dict(zip(multiply.arg_names, arguments, strict=False))
    tuned[lambda chosen: (blocks(given["total"], given["out"], chosen),)](*arguments, **meta)
    chosen: dict[str, Any] = tuned.best_config.all_kwargs()
    return chosen
