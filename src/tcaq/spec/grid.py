"""Grids: which values a tensor may take."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from tcaq.spec.base import Spec

Bits = Annotated[int, Field(ge=2, le=8)]


class AffineGrid(Spec):
    """Evenly spaced values `(q - zero_point) * scale`."""

    code: Literal["affine"] = "affine"
    bits: Bits
    signed: bool = False
    symmetric: bool = False

    def __str__(self) -> str:
        return f"{'s' if self.symmetric else 'a'}{'int' if self.signed else 'uint'}{self.bits}"


PerOctave = Annotated[int, Field(ge=1, le=64)]


def _density(per_octave: int) -> str:
    """How a grid's name tells that it has several values to each halving."""
    return "" if per_octave == 1 else f"x{per_octave}"


class Log2Grid(Spec):
    """Zero and a geometric series with `per_octave` values to each halving, for attention probabilities; 1: powers of two."""

    code: Literal["log2"] = "log2"
    bits: Bits
    per_octave: PerOctave = 1

    def __str__(self) -> str:
        return f"log2-{self.bits}{_density(self.per_octave)}"


class UnitGrid(Spec):
    """Evenly spaced values from zero (`zero_point = 0`), for attention probabilities."""

    code: Literal["unit"] = "unit"
    bits: Bits
    per_octave: ClassVar[int] = 1
    """of the log2 grid that its error is compared with"""

    def __str__(self) -> str:
        return f"unit{self.bits}"


class AdaptiveGrid(Spec):
    """Log2 or evenly spaced from zero, chosen per step group from the data (DAQ)."""

    code: Literal["adaptive"] = "adaptive"
    bits: Bits
    per_octave: PerOctave = 1

    def __str__(self) -> str:
        return f"daq{self.bits}{_density(self.per_octave)}"


class TokenGrid(Spec):
    """Evenly spaced values over the range of each token by itself, found while it runs; for the inputs of linear layers."""

    code: Literal["token"] = "token"
    bits: Bits
    signed: ClassVar[bool] = False
    symmetric: bool = False

    def __str__(self) -> str:
        return f"token{'-s' if self.symmetric else ''}{self.bits}"


def _code(grid: object) -> str:
    """The kind of an input's grid; a plan file may leave out `affine`."""
    return str(grid.get("code", "affine") if isinstance(grid, dict) else getattr(grid, "code", ""))


InputGrid = Annotated[
    Annotated[AffineGrid, Tag("affine")] | Annotated[TokenGrid, Tag("token")], Discriminator(_code)
]  # fmt: skip
ProbabilityGrid = Log2Grid | UnitGrid | AdaptiveGrid
Grid = Annotated[AffineGrid | Log2Grid | UnitGrid | AdaptiveGrid | TokenGrid, Field(discriminator="code")]
