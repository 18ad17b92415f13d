"""One model, three ways to run it: float, fake, and float with every operand made visible."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from enum import Enum

from torch import nn


class Mode(Enum):
    """How a quantized layer computes."""

    FLOAT = "float"
    """the original arithmetic, bit for bit"""
    OBSERVE = "observe"
    """float, but attention runs as separate products, so that hooks see q, k, v and the probabilities"""
    FAKE = "fake"
    """quantize-dequantize in float"""


class Moded:
    """Mixin of everything that has a mode."""

    mode: Mode = Mode.FAKE


def moded(module: nn.Module) -> list[Moded]:
    """Every part of `module` that has a mode."""
    return [part for part in module.modules() if isinstance(part, Moded)]


@contextmanager
def running(module: nn.Module, mode: Mode) -> Iterator[None]:
    """Run `module` in a mode inside the block; every part gets its own mode back afterwards."""
    before = [(part, part.mode) for part in moded(module)]
    for part, _ in before:
        part.mode = mode
    try:
        yield
    finally:
        for part, mode_before in before:
            part.mode = mode_before


def floating(module: nn.Module) -> AbstractContextManager[None]:
    """Inside the block the original model runs, bit for bit: the teacher."""
    return running(module, Mode.FLOAT)


def observing(module: nn.Module) -> AbstractContextManager[None]:
    """Inside the block the model runs in float with every quantized operand passing through its own layer."""
    return running(module, Mode.OBSERVE)


def faking(module: nn.Module) -> AbstractContextManager[None]:
    """Inside the block the model quantizes and dequantizes in float."""
    return running(module, Mode.FAKE)
