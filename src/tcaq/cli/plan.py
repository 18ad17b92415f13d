"""`tcaq plan`: the resolved table, without running anything."""

from __future__ import annotations

from tcaq.cli import options as opt
from tcaq.cli.app import app, console, notes
from tcaq.cli.models import open_float
from tcaq.cli.table import plan_table
from tcaq.models.architectures import remark
from tcaq.models.denoiser import find_denoiser
from tcaq.recipes.quantize import resolved_plan


@app.command("plan")
def plan_command(
    model: opt.ModelArgument,
    recipe: opt.RecipeOption = "tcaq",
    weights: opt.WeightsOption = None,
    activations: opt.ActivationsOption = None,
    step_groups: opt.GroupsOption = None,
    no_daq: opt.NoDaqOption = False,
    plan: opt.PlanOption = None,
    linear_inputs: opt.LinearInputsOption = None,
    step_bits: opt.StepBitsOption = None,
    as_json: opt.JsonFlag = False,
) -> None:
    """Print which grid every layer of MODEL would get, and which layers stay float and why."""
    spec = opt.make_recipe(
        recipe, None, weights=weights, activations=activations, steps=None, samples=None, step_groups=step_groups,
        rounds=None, memory=None, plan=plan, left_out=["daq"] if no_daq else [], linear_inputs=linear_inputs,
        step_bits=step_bits,
    )  # fmt: skip
    denoiser = find_denoiser(open_float(model))[1]
    if what := remark(denoiser):
        notes.print(what)
    table = resolved_plan(denoiser, spec, opt.read_plan(plan))
    if as_json:
        console.print_json(table.model_dump_json())
    else:
        console.print(plan_table(table))
