"""3x3 convolutions of narrow numbers with less than half of the products, for x86 processors with AVX-512 VNNI.

Transformed numbers of four bits still fit bytes, so that what Winograd's form saves is saved exactly. All else is oneDNN's.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import cast

import torch
from torch import Tensor

from tcaq.integer.backend import Geometry, InputGrid, Span, Weights
from tcaq.integer.native import kernels
from tcaq.integer.native.compiler import CompilerError
from tcaq.integer.native.library import native_glue
from tcaq.integer.native.winograd import HIGHEST, LARGEST, WinogradWeights, native_winograd
from tcaq.integer.trial import too_long, try_conv

FEWEST = 32
"""Channels on either side, below which vectors are too empty."""


def missing() -> str | None:
    """Why there are no such convolutions here."""
    if (problem := kernels.COMPILED.missing()) is not None:
        return problem
    try:
        native_winograd()
    except CompilerError as error:
        return str(error)
    return None


def helps() -> bool:
    """Whether they are the fastest of this processor."""
    return missing() is None and native_winograd().helps


class WinogradConv:
    """A 3x3 convolution of codes with weights of about four bits, summed in int32."""

    def __init__(self, weights: Weights, geometry: Geometry) -> None:
        """Args: geometry: that `conv_problem` has nothing against."""
        self.glue, self.winograd = native_glue(), native_winograd()
        self.packed = WinogradWeights(weights)

    def fuses(self, x: Tensor) -> bool:
        """Whether a norm of x is done in one with its codes."""
        return self.glue.takes(x, 1)

    def __call__(self, x: Tensor, grid: InputGrid, dtype: torch.dtype) -> Tensor:
        """Convolve float [batch, in, height, width]."""
        codes, _ = self.glue.encode(x, grid, 1)
        scale, zero_point = cast(float, grid.scale), cast(int, grid.zero_point)
        return self.winograd.convolve(codes, self.packed, scale, zero_point, grid.top).to(dtype)


@cache
def conv_problem(shape: tuple[int, ...], geometry: Geometry, span: Span) -> str | None:
    """Why a weight of this shape has other kernels, or what a trial of it finds."""
    if shape[2:] != (3, 3) or geometry != Geometry(padding=(1, 1)):
        return "Winograd's form is for 3x3 convolutions that keep the size of an image"
    if min(shape[:2]) < FEWEST:
        return f"it pays from {FEWEST} channels on"
    if max(-span.low, span.high) > LARGEST or span.top > HIGHEST:
        return f"transformed weights {span.low} to {span.high} or codes 0 to {span.top} do not fit bytes"
    return too_long(shape) or try_conv(WinogradConv, shape, geometry, span)


WINOGRAD = replace(
    kernels.COMPILED, missing=missing, conv=WinogradConv, conv_problem=conv_problem, helps=helps,
)  # fmt: skip
