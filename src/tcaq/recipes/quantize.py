"""`tcaq.quantize`: run a recipe on a pipeline, in a run directory, to a packed model."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import nn

from tcaq.checkpoint import pack, save
from tcaq.errors import PlanError, UsageError
from tcaq.layers.insert import quantized_layers
from tcaq.models.bypass import bypass_of
from tcaq.models.config import TcaqConfig
from tcaq.models.correction import correction_of
from tcaq.models.denoiser import find_denoiser
from tcaq.models.device import device_identity
from tcaq.models.forward_process import forward_process
from tcaq.models.identity import conditioners, sampler_identity
from tcaq.models.load import weights_hash
from tcaq.models.offload import bring_back
from tcaq.models.prompting import resolve_conditions
from tcaq.models.units import resolve
from tcaq.recipes.job import Job, Judge
from tcaq.recipes.registry import check_parts, entry
from tcaq.runs import OnProgress, Run, silent
from tcaq.spec.plan import Plan, ResolvedPlan
from tcaq.spec.recipe import Recipe
from tcaq.spec.widths import with_widths

RUN_FOLDER = "run"


def resolved_plan(denoiser: nn.Module, recipe: Recipe, plan: Plan | None = None) -> ResolvedPlan:
    """The table that a recipe would quantize a denoiser by; `plan` takes the place of the recipe's own rules."""
    return with_widths(resolve(denoiser, plan or entry(recipe.program).plan(denoiser, recipe)), recipe.mixed)


def outcome(recipe: Recipe) -> dict[str, Any]:
    """A recipe without what changes nothing about the result: how much memory it may take, and in which folder pictures lie."""
    values = recipe.model_dump(mode="json", exclude={"memory"})
    for picture in (values["calibration"].get("conditions") or {}).get("pictures", ()):
        picture["path"] = Path(picture["path"]).name
    return values


def identity(pipe: DiffusionPipeline, recipe: Recipe, table: ResolvedPlan, judge: Judge | None) -> dict[str, Any]:
    """All that determines the outcome of a run; a judge goes by its `name`, or that of the function."""
    conditions = recipe.calibration.conditions
    return (
        {
            "recipe": outcome(recipe),
            "plan": table.model_dump(mode="json"),
            "weights": weights_hash(find_denoiser(pipe)[1]),
            "scheduler": sampler_identity(pipe),
            "judge": judge
            if judge is None
            else getattr(judge, "name", getattr(judge, "__qualname__", type(judge).__qualname__)),
            "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        }
        | device_identity(find_denoiser(pipe)[1])
        | conditioners(pipe, decoders=conditions is not None and bool(conditions.pictures))
    )


def with_conditions(pipe: DiffusionPipeline, recipe: Recipe) -> Recipe:
    """The recipe with everything written out that calibration will ask the pipeline for."""
    conditions = resolve_conditions(pipe, recipe.calibration.conditions)
    calibration = recipe.calibration.model_copy(update={"conditions": conditions})
    return recipe if conditions is None else recipe.model_copy(update={"calibration": calibration})


def dtype_of(denoiser: nn.Module) -> str:
    """The name of the dtype that a denoiser computes in: its parameters'."""
    found = next((p.dtype for p in denoiser.parameters() if p.is_floating_point()), torch.float32)
    return str(found).removeprefix("torch.")


def _check_unquantized(pipe: DiffusionPipeline, output: str | Path | None) -> None:
    denoiser = find_denoiser(pipe)[1]
    if next(iter(quantized_layers(denoiser)), None) is not None:
        resumes = "" if output is None else f"; the run in {output} goes on with it where it stopped"
        raise PlanError(
            f"{type(denoiser).__name__} is quantized already, or was being quantized when that was interrupted: load the original "
            f"model anew{resumes}"
        )


def _check_output(output: Path) -> None:
    """A checkpoint replaces what lies where it is saved, so nothing may lie there but an earlier run."""
    if not output.is_dir():
        return
    there = sorted(path.name for path in output.iterdir())
    if there in ([], [RUN_FOLDER]) or (output / RUN_FOLDER / "run.json").exists():
        return
    raise UsageError(
        f"{output} holds {', '.join(there[:3])}{' and more' if len(there) > 3 else ''}, which a checkpoint would replace, and no "
        "run of tcaq to go on with; give another --output, or empty it"
    )


def quantize(
    pipe: DiffusionPipeline,
    recipe: Recipe | None = None,
    output: str | Path | None = None,
    *,
    plan: Plan | None = None,
    judge: Judge | None = None,
    share: Path | None = None,
    on_progress: OnProgress = silent,
) -> DiffusionPipeline:
    """Quantize the denoiser of a pipeline in place.

    Args: recipe: what to do (default: `tcaq`, W4A4); output: folder for the run and the checkpoint - a second call with the same
        arguments, and the pipeline loaded anew, goes on where the first one stopped; without it nothing is kept on disk; plan:
        rules in place of the default ones; judge: distance between float and quantized images by which alignment decides when to
        stop; share: folder where the float model's trajectories stay for other quantizations of it.
    Returns: the same pipeline, its denoiser holding packed integer codes; `save_pretrained` writes the checkpoint.
    Raises: UsageError, PlanError, ModelError, NumericalError, RunError.
    """
    recipe = with_conditions(pipe, recipe or Recipe())
    check_parts(recipe)
    if output is not None:
        _check_output(Path(output))
    program = entry(recipe.program).program
    bring_back(pipe)
    _check_unquantized(pipe, output)
    find_denoiser(pipe)[1].eval()
    if recipe.mixed is not None:
        forward_process(pipe)  # refuses what has no such ratio before anything is computed
    table = resolved_plan(find_denoiser(pipe)[1], recipe, plan)
    who = identity(pipe, recipe, table, judge)
    with tempfile.TemporaryDirectory(prefix="tcaq-run-") as temporary:
        folder = Path(output) / RUN_FOLDER if output is not None else Path(temporary) / RUN_FOLDER
        with Run.open(folder, who, on_progress) as run:
            job = Job(pipe, recipe, table, run, judge, share)
            program(job)
        config = TcaqConfig(plan=job.plan, groups=job.groups, recipe=outcome(recipe), dtype=dtype_of(job.denoiser))
        config.bypass = bypass_of(job.denoiser) is not None
        config.step_bits = job.step_bits
        if (correction := correction_of(job.denoiser)) is not None:
            config.correction = correction.bias.shape[1]
        pack(job.denoiser, config)
        if output is not None:
            save(pipe, Path(output))
    return pipe
