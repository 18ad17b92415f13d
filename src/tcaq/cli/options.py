"""Options that several verbs share, and the recipe they make together."""

from __future__ import annotations

from collections.abc import Collection
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from tcaq.errors import UsageError
from tcaq.recipes.presets import preset_recipe
from tcaq.recipes.registry import RECIPES, check_parts
from tcaq.spec.conditions import Conditions
from tcaq.spec.plan import Plan
from tcaq.spec.recipe import Layers, Recipe

ModelArgument = Annotated[
    str, typer.Argument(help="A local diffusers directory, a Hub id, or `reference` (bundled).", show_default=False)
]
RecipeOption = Annotated[str, typer.Option(help=f"{', '.join(RECIPES)}, or a recipe's JSON file.")]
WeightsOption = Annotated[int | None, typer.Option(help="Bits of weights, 2-8.", show_default="4")]
ActivationsOption = Annotated[int | None, typer.Option(help="Bits of activations, 2-8.", show_default="4")]
PRESET = "full"
PresetOption = Annotated[
    str | None,
    typer.Option(help="fast (no gradients), quick (minutes), or full (best quality).", show_default=PRESET),
]
StepsOption = Annotated[int | None, typer.Option(help="Sampling steps of calibration.", show_default=False)]
SamplesOption = Annotated[int | None, typer.Option(help="Images sampled for calibration.", show_default=False)]
GroupsOption = Annotated[
    str | None, typer.Option(help="Step groups: a number, or `per-step`.", metavar="N|per-step", show_default=False)
]
NoTcrOption = Annotated[bool, typer.Option("--no-tcr", help="Leave out the timestep-channel reparameterization.")]
NoDaqOption = Annotated[bool, typer.Option("--no-daq", help="Even grids for all attention probabilities.")]
NoNetworkOption = Annotated[bool, typer.Option("--no-network", help="No last fit of the whole denoiser.")]
NoStaggerOption = Annotated[bool, typer.Option("--no-stagger", help="Step sizes as they were found at each step.")]
NoBypassOption = Annotated[bool, typer.Option("--no-bypass", help="Outlying pixels of x_t do not go around the model.")]
NoCorrectionOption = Annotated[bool, typer.Option("--no-correction", help="No correction of predicted noise.")]
RoundsOption = Annotated[int | None, typer.Option(help="Rounds of progressive alignment; 0: none.", show_default=False)]
IterationsOption = Annotated[
    int | None,
    typer.Option(min=1, help="Iterations of reconstruction for each unit, in the first round.", show_default=False),
]
SeedOption = Annotated[int | None, typer.Option(min=0, help="Seed of calibration.", show_default="0")]
MemoryOption = Annotated[
    float | None,
    typer.Option(
        help="GiB of trajectories, and of activations, kept in memory before they spill to disk.", show_default=False
    ),
]
PlanOption = Annotated[
    str | None,
    typer.Option(
        help="same (every recipe quantizes the same layers), author (those of its authors' code), or a JSON file of rules.",
        metavar="same|author|FILE",
        show_default="same",
    ),
]
LinearInputsOption = Annotated[
    str | None,
    typer.Option(
        help="Inputs of linear layers: static (scales by step group) or token (a grid for each token).",
        metavar="static|token", show_default="static",
    ),
]  # fmt: skip
StepBitsOption = Annotated[
    str | None,
    typer.Option(
        help="Bits of activations chosen by step from several, as in 4,8 (PTQD's mixed precision).",
        metavar="B,B,...", show_default="off",
    ),
]  # fmt: skip

LayerBitsOption = Annotated[
    str | None,
    typer.Option(
        help="Bits of each layer's weight chosen from several, as in 2,3,4,6, by what its rounding costs.",
        metavar="B,B,...", show_default="off",
    ),
]  # fmt: skip
MeanBitsOption = Annotated[
    float | None,
    typer.Option(
        help="How many bits a weight may have on average, with --layer-bits: the size of the file.",
        show_default="--weights",
    ),
]
InputBitsOption = Annotated[
    str | None,
    typer.Option(
        help="The same of each layer's input, as in 3,4,6,8.",
        metavar="B,B,...", show_default="off",
    ),
]  # fmt: skip
MeanInputBitsOption = Annotated[
    float | None,
    typer.Option(
        help="How many bits an input may have on average over all products that read one, with --input-bits.",
        show_default="--activations",
    ),
]


class WeightRounding(StrEnum):
    """How weights are rounded before any reconstruction."""

    NEAREST = "nearest"
    GPTQ = "gptq"


WeightRoundingOption = Annotated[
    WeightRounding | None,
    typer.Option(
        help="First rounding of weights: to the nearest code, or with each error fed back to later weights (GPTQ).",
        show_default="nearest",
    ),
]
FeaturesOption = Annotated[
    str | None,
    typer.Option(
        help="reference, inception, dinov2, or module:attribute.",
        show_default="reference for images of its size, else paired measures only",
    ),
]
BatchOption = Annotated[int | None, typer.Option(min=1, help="Images at a time in calibration.", show_default=False)]


class Execution(StrEnum):
    """How a checkpoint runs."""

    FAKE = "fake"
    INTEGER = "integer"


ExecutionOption = Annotated[
    Execution, typer.Option(help="fake: quantize-dequantize in float; integer: on the processor's integer units.")
]
DeviceOption = Annotated[str, typer.Option(help="Where the model computes: cpu, cuda, cuda:1, ...")]
DEVICE = "cpu"
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]


def make_recipe(
    recipe: str, preset: str | None, *, weights: int | None, activations: int | None, steps: int | None = None,
    samples: int | None = None, step_groups: str | None = None, rounds: int | None = None, seed: int | None = None,
    memory: float | None = None, plan: str | None = None,
    left_out: Collection[str] = (), linear_inputs: str | None = None, batch: int | None = None,
    conditions: Conditions | None = None, step_bits: str | None = None, weight_rounding: WeightRounding | None = None,
    iterations: int | None = None, layer_bits: str | None = None, mean_bits: float | None = None,
    input_bits: str | None = None, mean_input_bits: float | None = None,
) -> Recipe:  # fmt: skip
    """The recipe that the options name: a program at a preset (None: PRESET) or a file, then every option that was given.

    Raises: UsageError listing every value that is not allowed.
    """
    if preset is not None and is_file(recipe):
        raise UsageError(
            f"--preset {preset}: {recipe} is a whole recipe, to which no preset applies; leave --preset out"
        )
    asked = None if conditions is None else conditions.model_dump(mode="json")
    sizes = {"images": samples, "steps": steps, "batch": batch, "conditions": asked}
    calibration = {k: v for k, v in sizes.items() if v is not None}
    given = {
        "weights": weights, "activations": activations, "memory": memory, "step_groups": _groups(step_groups),
        "linear_inputs": linear_inputs, "seed": seed, "layers": plan if plan in get_args(Layers) else None,
    }  # fmt: skip
    changes: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
    if step_bits is not None:
        widths = _widths("--step-bits", step_bits)
        # the narrowest is what activations would have at all steps
        changes = {"activations": widths[0]} | changes | {"mixed": {"bits": widths}}
    changes |= _allocation("allocation", "layer-bits", layer_bits, "mean-bits", mean_bits)
    changes |= _allocation("input_allocation", "input-bits", input_bits, "mean-input-bits", mean_input_bits)
    if calibration:
        changes["calibration"] = calibration
    changes |= dict.fromkeys(left_out)
    if weight_rounding is not None:
        changes["gptq"] = {} if weight_rounding is WeightRounding.GPTQ else None
    if rounds is not None:
        changes["alignment"] = {"rounds": rounds} if rounds else None
    if is_file(recipe):
        made, what = Recipe.read(Path(recipe)).changed(changes), f"recipe {recipe!r}"
    else:
        preset = preset or PRESET
        made, what = preset_recipe(recipe, preset, **changes), f"recipe {recipe!r} at preset {preset!r}"
    fits = {"--rounds": rounds, "--iterations": iterations}
    if made.reconstruction is None and (option := next((name for name, value in fits.items() if value), None)):
        raise UsageError(f"{option} {fits[option]}: the {what} reconstructs nothing; leave {option} out")
    check_parts(made)
    return made if iterations is None else made.changed({"reconstruction": {"iterations": iterations}})


def is_file(recipe: str) -> bool:
    """Whether a recipe is given as a file, not by name."""
    return recipe.endswith(".json")


def _groups(text: str | None) -> int | str | None:
    if text is None or text == "per-step":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"--step-groups {text!r}: give a whole number from 1, or per-step")
    return int(text)


def _allocation(field: str, option: str, text: str | None, mean_option: str, mean: float | None) -> dict[str, Any]:
    """What an option says of the widths that layers may have."""
    if text is None and mean is not None:
        raise UsageError(f"--{mean_option} {mean:g}: say by --{option} which widths layers may have, or leave it out")
    return {} if text is None else {field: {"bits": _widths(f"--{option}", text), "mean": mean}}


def _widths(option: str, text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise UsageError(f"{option} {text!r}: give whole numbers from 2 to 8, with commas between")
    return sorted(map(int, parts))


def read_plan(plan: str | None) -> Plan | None:
    """The rules of a plan file; None if `plan` is the name of a recipe's own plan, or not given."""
    return None if plan is None or plan in get_args(Layers) else Plan.read(Path(plan))
