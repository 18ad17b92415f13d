"""Presets as data: the same three for every recipe."""

from __future__ import annotations

from typing import Any, Literal, get_args

from tcaq.errors import UsageError
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

PROGRAM_OPTIONS: dict[str, dict[str, Any]] = {
    "tcaq": {},
    "minmax": {
        "step_groups": 1,
        "ranges": {"weight_candidates": 1, "input_candidates": 1},
        "tcr": None,
        "daq": None,
        "reconstruction": None,
        "alignment": None,
        "network": None,
    },
}
"""What a program fixes whatever the preset says."""


def preset_recipe(program: str, preset: str, **options: Any) -> Recipe:
    """The recipe of a program at a preset, with some options changed.

    Raises: UsageError naming the known programs or presets.
    """
    if program not in PROGRAM_OPTIONS:
        raise UsageError(
            f"unknown recipe {program!r}; known: {', '.join(PROGRAM_OPTIONS)}, or the path of a recipe's JSON file"
        )
    if preset not in PRESETS:
        raise UsageError(f"unknown preset {preset!r}; known: {', '.join(get_args(Preset))}")
    values = merged(merged(PRESETS[preset], PROGRAM_OPTIONS[program]), options)
    return Recipe.parse({"program": program, **values}, where=f"recipe {program} at preset {preset}")
