"""Grids: which values a tensor may take."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from tcaq.spec.base import Spec

Bits = Annotated[int, Field(ge=2, le=8)]


class WidthsGrid(Spec):
    """What grids share that may have several widths: `bits`, and the `wider` ones that a step group may have instead."""

    LATER = ("wider",)

    bits: Bits
    wider: tuple[Bits, ...] = ()

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        if any(b <= a for a, b in pairwise(self.widths)):
            raise ValueError(f"`wider` must ascend from `bits`, given {self.bits} and {self.wider}")
        return self

    @property
    def widths(self) -> tuple[int, ...]:
        """Every width that a step group may have, ascending."""
        return (self.bits, *self.wider)

    def at(self, bits: int) -> Self:
        """The same grid with one width alone."""
        return self.model_copy(update={"bits": bits, "wider": ()})

    @property
    def _width(self) -> str:
        """As names of grids end: 4, or 4|8."""
        return "|".join(map(str, self.widths))


class AffineGrid(WidthsGrid):
    """Evenly spaced values `(q - zero_point) * scale`."""

    code: Literal["affine"] = "affine"
    signed: bool = False
    symmetric: bool = False

    def __str__(self) -> str:
        return f"{'s' if self.symmetric else 'a'}{'int' if self.signed else 'uint'}{self._width}"


MOST_PER_OCTAVE = 64
PerOctave = Annotated[int, Field(ge=1, le=MOST_PER_OCTAVE)]


def _density(per_octave: int) -> str:
    """How a grid's name tells that it has several values to each halving."""
    return "" if per_octave == 1 else f"x{per_octave}"


class OctaveGrid(WidthsGrid):
    """What grids share that have `per_octave` values to each halving at their narrowest width."""

    per_octave: PerOctave = 1

    def at(self, bits: int) -> Self:
        """The same with one width alone: it reaches as far below its peak, on more values to each halving."""
        denser = min(self.per_octave * 2 ** (bits - self.bits), MOST_PER_OCTAVE)
        return self.model_copy(update={"bits": bits, "wider": (), "per_octave": denser})


class Log2Grid(OctaveGrid):
    """Zero and a geometric series with `per_octave` values to each halving, for attention probabilities; 1: powers of two."""

    code: Literal["log2"] = "log2"

    def __str__(self) -> str:
        return f"log2-{self._width}{_density(self.per_octave)}"


class UnitGrid(WidthsGrid):
    """Evenly spaced values from zero (`zero_point = 0`), for attention probabilities."""

    code: Literal["unit"] = "unit"
    per_octave: ClassVar[int] = 1
    """of the log2 grid that its error is compared with"""

    def __str__(self) -> str:
        return f"unit{self._width}"


class AdaptiveGrid(OctaveGrid):
    """Log2 or evenly spaced from zero, chosen per step group from the data (DAQ)."""

    code: Literal["adaptive"] = "adaptive"

    def __str__(self) -> str:
        return f"daq{self._width}{_density(self.per_octave)}"


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
