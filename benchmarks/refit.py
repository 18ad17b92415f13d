"""Fit the whole denoiser again, in other ways, from what an earlier round of a finished run left: the trials of the last fit.

    python benchmarks/refit.py FOLDER start '{}' reconstruct/0 '{"weight_rate": 1e-3}' reconstruct/1 null

FOLDER is what `tcaq quantize reference --preset full` wrote. Arguments come in pairs: the round to start from (`start`: before any
reconstruction), and the changes to the recipe's `network` as JSON (null: no fit at all). The fit's inputs are the trajectories that
the run's own last fit was given. Evaluation seed 7, which no published number uses.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from diffusers import DiffusionPipeline
from protocol import add_protocol

from tcaq.checkpoint import pack
from tcaq.evaluate.features import load_features
from tcaq.evaluate.protocol import Protocol, evaluate
from tcaq.layers.insert import insert
from tcaq.models.bypass import bypass_of
from tcaq.models.config import TcaqConfig
from tcaq.models.denoiser import attach_clock
from tcaq.models.sampler import Trajectories
from tcaq.models.units import Unit
from tcaq.records import Record
from tcaq.reference import load_pipeline
from tcaq.runs import Run
from tcaq.spec.plan import ResolvedPlan
from tcaq.spec.recipe import NetworkFit, Recipe, merged
from tcaq.spec.steps import StepGroups
from tcaq.stages.bypass import apply_bypass, inside
from tcaq.stages.collect import trajectories_of
from tcaq.stages.equalize import apply_vectors
from tcaq.stages.learn import Fit
from tcaq.stages.reconstruct import Reconstructor, apply_unit
from tcaq.stages.scale import apply_input_scales, apply_weight_scales
from tcaq.stages.select import apply_choices
from tcaq.stages.stagger import stagger


def only(run: Run, name: str) -> Record:
    """The record of a step."""
    return next(record for _, record in run.results(name))


def trajectories(run: Run, name: str) -> Trajectories:
    """The trajectories that a round of collection left."""
    return Trajectories.join([trajectories_of(record) for _, record in run.results(name)])


def restored(run: Run, start: str) -> tuple[DiffusionPipeline, TcaqConfig]:
    """The pipeline as the run left it after a round."""
    recipe, plan = (
        Recipe.parse(run.identity["recipe"], where="run"),
        ResolvedPlan.parse(run.identity["plan"], where="run"),
    )
    pipe = load_pipeline()
    groups = StepGroups.of(recipe.step_groups, trajectories(run, "collect/0").timesteps.tolist())
    insert(pipe.unet, plan, attach_clock(pipe.unet, groups))
    if "equalize" in run.finished():
        apply_vectors(pipe.unet, only(run, "equalize"))
    apply_weight_scales(pipe.unet, only(run, "scale/weights"))
    apply_input_scales(pipe.unet, only(run, "scale/inputs"))
    if recipe.stagger is not None:
        stagger(pipe.unet, recipe.stagger)
    for _, record in run.results("bypass"):
        apply_bypass(pipe.unet, record)
    apply_choices(pipe.unet, only(run, "select"))
    if start != "start":
        for name, record in run.results(start):
            apply_unit(Unit(name, pipe.unet.get_submodule(name)), record)
    config = TcaqConfig(plan=plan, groups=groups, recipe=recipe.model_dump(mode="json"))
    config.bypass = bypass_of(pipe.unet) is not None
    return pipe, config


def fitted_on(run: Run, recipe: Recipe) -> str:
    """The round of collection that the last fit was given; later ones are those of the correction's trials."""
    scores = [only(run, name).meta["fd"] for name in sorted(run.finished()) if name.startswith("score/")]
    if len(scores) > 1 and scores[-1] >= min(scores[:-1]):  # the last round was taken back
        return f"collect/{len(scores) - 1}"
    return f"collect/{(recipe.alignment.rounds if recipe.alignment else 0) + 1}"


def refit(pipe: DiffusionPipeline, run: Run, changes: dict[str, object]) -> Record:
    """Fit the whole denoiser on the trajectories of the run's own fit."""
    recipe = Recipe.parse(run.identity["recipe"], where="run")
    network = recipe.network or NetworkFit()
    fit = NetworkFit.parse(merged(network.model_dump(), changes), where="changes")
    seen = inside(pipe.unet, trajectories(run, fitted_on(run, recipe)))
    whole, how = Unit("network", pipe.unet), Fit(fit.reconstruction(), fit.iterations, seed=recipe.seed)
    with Reconstructor(pipe.unet, [whole], seen, how, memory=4.0) as reconstructor:
        return reconstructor.fit(whole.name)


def main() -> None:
    """Fit and evaluate each variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("variants", nargs="+", metavar="ROUND CHANGES")
    parser.add_argument("--work", type=Path, default=Path("build/refit"))
    add_protocol(parser, num=256, seed=7)
    args = parser.parse_args()
    run = Run.read(args.folder / "run")
    protocol = Protocol(load_features("reference"), args.work / "samples", args.num, args.steps, args.seed)
    for start, text in zip(args.variants[::2], args.variants[1::2], strict=True):
        began, changes = time.monotonic(), json.loads(text)
        pipe, config = restored(run, start)
        losses = "no fit"
        if changes is not None:
            record = refit(pipe, run, changes)
            losses = f"loss {record.meta['loss_before']:.4f} -> {record.meta['loss_after']:.4f}"
        spent = time.monotonic() - began
        pack(pipe.unet, config)
        scores, float_, quantized = evaluate(load_pipeline(), pipe, protocol)
        pair, sqnr = scores.paired, [step.sqnr for step in scores.paired.sqnr_per_step]
        shift = float(quantized.images.float().mean() - float_.images.float().mean())
        print(
            f"{start:14s} {text:40s} ratio {scores.ratio.fd:6.3f}  FD {scores.quantized.fd:6.3f}",
            f"to float {pair.fd_to_float:6.3f}  PSNR {pair.psnr:5.2f}  mean SQNR {sum(sqnr) / len(sqnr):5.2f}",
            f"gray {shift:+5.2f}  {losses}  {spent:4.0f} s",
            sep="  ",
            flush=True,
        )


if __name__ == "__main__":
    main()
