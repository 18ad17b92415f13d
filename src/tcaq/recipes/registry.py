"""Every recipe by name: its program, the options it fixes, and how it plans layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from tcaq.errors import UsageError
from tcaq.models.units import default_plan
from tcaq.recipes import apqdm, minmax, mse, ptq4dm, ptqd, qdiffusion, tcaq, tfmqdm
from tcaq.recipes.job import Job
from tcaq.recipes.start import BLOCKS, START
from tcaq.spec.plan import Plan
from tcaq.spec.recipe import Recipe

Options = Mapping[str, Any]
OWN = BLOCKS | {"alignment", "network", "correction"}
"""The parts of a recipe that TCAQ-DM's program knows what to do with."""


@dataclass(frozen=True)
class Entry:
    """A recipe.

    Attributes: program: what it does; options: of `Recipe`, fixed whatever the preset says; traits: of `default_plan`, part of the
        method itself; author: of `default_plan`, how the authors' own code differs from the common plan; parts: of `Recipe`, those
        that the program knows what to do with.
    """

    program: Callable[[Job], None]
    options: Options = field(default_factory=dict)
    traits: Options = field(default_factory=dict)
    author: Options = field(default_factory=dict)
    parts: frozenset[str] = START

    def plan(self, denoiser: nn.Module, recipe: Recipe) -> Plan:
        """The rules that a recipe goes by where the user gives none."""
        per_octave = recipe.daq.per_octave(recipe.activations) if recipe.daq else None
        own = self.author if recipe.layers == "author" else {}
        tokens = recipe.linear_inputs == "token"
        return default_plan(
            denoiser, recipe.weights, recipe.activations, per_octave, tokens=tokens, **self.traits, **own
        )  # fmt: skip


RECIPES = {
    "minmax": Entry(minmax.minmax, minmax.OPTIONS),
    "mse": Entry(mse.mse, mse.OPTIONS),
    "ptq4dm": Entry(ptq4dm.ptq4dm, ptq4dm.OPTIONS, author=ptq4dm.AUTHOR),
    "qdiffusion": Entry(qdiffusion.qdiffusion, qdiffusion.OPTIONS, qdiffusion.TRAITS, qdiffusion.AUTHOR, BLOCKS),
    "ptqd": Entry(ptqd.ptqd, ptqd.OPTIONS, parts=BLOCKS | {"correction"}),
    "apqdm": Entry(apqdm.apqdm, apqdm.OPTIONS, author=apqdm.AUTHOR, parts=apqdm.PARTS),
    "tfmqdm": Entry(tfmqdm.tfmqdm, tfmqdm.OPTIONS, author=tfmqdm.AUTHOR, parts=BLOCKS),
    "tcaq": Entry(tcaq.tcaq, parts=OWN),
}


def entry(program: str) -> Entry:
    """The recipe of a name. Raises: UsageError naming those there are."""
    if program not in RECIPES:
        raise UsageError(
            f"unknown recipe {program!r}; known: {', '.join(RECIPES)}, or the path of a recipe's JSON file"
        )
    return RECIPES[program]


def check_parts(recipe: Recipe) -> None:
    """Raises: UsageError naming the parts that a recipe asks for and its program would leave out without a word."""
    known = entry(recipe.program).parts
    if idle := sorted(name for name in (OWN | {"grouping"}) - known if getattr(recipe, name) is not None):
        raise UsageError(
            f"recipe {recipe.program!r} does nothing with {', '.join(f'`{name}`' for name in idle)}: leave that out (null in a "
            f"recipe's file), or take another recipe. It knows {', '.join(sorted(known))}"
        )
