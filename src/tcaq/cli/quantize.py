"""`tcaq quantize`: a pipeline in, a run and a checkpoint out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from tcaq.checkpoint import INDEX
from tcaq.cli import options as opt
from tcaq.cli.app import app, console, notes
from tcaq.cli.asking import asks
from tcaq.cli.checking import check_asked
from tcaq.cli.judging import make_judge
from tcaq.cli.models import open_float, placed
from tcaq.cli.progress import stage_progress
from tcaq.cli.table import plan_summary
from tcaq.models.architectures import remark
from tcaq.models.denoiser import find_denoiser
from tcaq.recipes.quantize import RUN_FOLDER, quantize
from tcaq.runs import Run
from tcaq.spec.conditions import Conditions
from tcaq.spec.recipe import Recipe


@app.command("quantize")
@asks
def quantize_command(
    model: opt.ModelArgument,
    output: Annotated[Path, typer.Option(help="Folder for the checkpoint and the run; run again to go on.")],
    recipe: opt.RecipeOption = "tcaq",
    weights: opt.WeightsOption = None,
    activations: opt.ActivationsOption = None,
    preset: opt.PresetOption = None,
    steps: opt.StepsOption = None,
    samples: opt.SamplesOption = None,
    step_groups: opt.GroupsOption = None,
    no_bypass: opt.NoBypassOption = False,
    no_stagger: opt.NoStaggerOption = False,
    no_tcr: opt.NoTcrOption = False,
    no_daq: opt.NoDaqOption = False,
    iterations: opt.IterationsOption = None,
    rounds: opt.RoundsOption = None,
    no_network: opt.NoNetworkOption = False,
    no_correction: opt.NoCorrectionOption = False,
    seed: opt.SeedOption = None,
    memory: opt.MemoryOption = None,
    plan: opt.PlanOption = None,
    linear_inputs: opt.LinearInputsOption = None,
    layer_bits: opt.LayerBitsOption = None,
    mean_bits: opt.MeanBitsOption = None,
    input_bits: opt.InputBitsOption = None,
    mean_input_bits: opt.MeanInputBitsOption = None,
    step_bits: opt.StepBitsOption = None,
    weight_rounding: opt.WeightRoundingOption = None,
    batch: opt.BatchOption = None,
    device: opt.DeviceOption = opt.DEVICE,
    asked: Conditions | None = None,
    features: Annotated[
        str | None,
        typer.Option(
            help="Extractor by which alignment decides when to stop.", show_default="reference for it, else none"
        ),
    ] = None,
    share: Annotated[
        Path | None,
        typer.Option(help="Folder that keeps the float model's trajectories for other quantizations of MODEL."),
    ] = None,
    as_json: opt.JsonFlag = False,
) -> None:
    """Quantize MODEL and write a checkpoint that diffusers loads after `import tcaq`."""
    parts = {
        "bypass": no_bypass, "tcr": no_tcr, "daq": no_daq, "stagger": no_stagger, "network": no_network,
        "correction": no_correction,
    }  # fmt: skip
    spec = opt.make_recipe(
        recipe, preset, weights=weights, activations=activations, steps=steps, samples=samples, step_groups=step_groups,
        rounds=rounds, seed=seed, memory=memory, plan=plan, left_out=[part for part, off in parts.items() if off],
        linear_inputs=linear_inputs, batch=batch, step_bits=step_bits, weight_rounding=weight_rounding,
        iterations=iterations, layer_bits=layer_bits, mean_bits=mean_bits,
        input_bits=input_bits, mean_input_bits=mean_input_bits,
        conditions=asked,
    )  # fmt: skip
    rules = opt.read_plan(plan)
    pipe = placed(open_float(model), device)
    check_asked(pipe, spec.calibration.steps, spec.calibration.conditions)
    if what := remark(find_denoiser(pipe)[1]):
        notes.print(what)
    with stage_progress(quiet=as_json) as on_progress:
        judge = make_judge(model, features)
        quantize(pipe, spec, output, plan=rules, judge=judge, share=share, on_progress=on_progress)
    tell(output, spec, as_json)


def tell(output: Path, recipe: Recipe, as_json: bool) -> None:
    """Say what was written and what it cost."""
    run = Run.read(output / RUN_FOLDER)
    timings = run.timings().values()
    seconds, peak = sum(t["seconds"] for t in timings), max(t["peak_memory"] for t in timings)
    if as_json:
        costs = {"seconds": seconds, "peak_memory": peak}
        console.print_json(json.dumps({"output": str(output), **costs, "recipe": recipe.model_dump(mode="json")}))
        return
    notes.print(plan_summary(run.identity["plan"]["layers"]))
    console.print(f"{output / INDEX} written: {seconds:.0f} s of work, {peak / 2**30:.2f} GiB at most")
