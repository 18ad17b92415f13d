"""Presets as data: the same three for every recipe."""

from __future__ import annotations

from typing import Any, Literal, get_args

from tcaq.errors import UsageError
from tcaq.recipes.registry import entry
from tcaq.spec.recipe import Recipe, merged

Preset = Literal["fast", "quick", "full"]

PRESETS: dict[str, dict[str, Any]] = {
    "fast": {
        "calibration": {"images": 32, "batch": 32},
        "reconstruction": None,
        "alignment": None,
        "network": None,
    },
    "quick": {
        "calibration": {"images": 32, "steps": 20, "batch": 32},
        "ranges": {"input_candidates": 40},
        "reconstruction": {"iterations": 20, "inputs": 160},
        "alignment": None,
        "network": {"iterations": 80, "inputs": 640},
    },
    "full": {
        "calibration": {"images": 96, "steps": 50, "batch": 32},
        "reconstruction": {"iterations": 200, "inputs": 800},
        "alignment": {"rounds": 1, "iterations": 100},
        "network": {"iterations": 500, "inputs": 1600},
    },
}


def preset_recipe(program: str, preset: str, **options: Any) -> Recipe:
    """The recipe of a program at a preset, with some options changed.

    What a preset leaves out stays out: a program's options for reconstruction do not bring it back into `fast`.

    Raises: UsageError naming the known programs or presets.
    """
    fixed = entry(program).options
    if preset not in PRESETS:
        raise UsageError(f"unknown preset {preset!r}; known: {', '.join(get_args(Preset))}")
    base = PRESETS[preset]
    fixed = {key: value for key, value in fixed.items() if not (isinstance(value, dict) and base.get(key, {}) is None)}
    values = merged(merged(base, fixed), options)
    return Recipe.parse({"program": program, **values}, where=f"recipe {program} at preset {preset}")
