"""`tcaq report`: a page about one quantized model, under its own scheduler and under others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tcaq.cli import options as opt
from tcaq.cli.app import app, console
from tcaq.cli.asking import asks
from tcaq.cli.checking import check_asked, check_reference, find_features
from tcaq.cli.evaluate import scores_table
from tcaq.cli.models import open_float, open_quantized, placed
from tcaq.cli.progress import stage_progress
from tcaq.errors import UsageError
from tcaq.evaluate.evaluate import Evaluation
from tcaq.evaluate.protocol import Protocol, evaluate
from tcaq.evaluate.real import load_real
from tcaq.models.denoiser import find_denoiser
from tcaq.models.prompting import resolve_conditions
from tcaq.models.switch import use_scheduler
from tcaq.recipes.quantize import RUN_FOLDER
from tcaq.report.page import Entry, Trial, write_report
from tcaq.runs import OnProgress
from tcaq.spec.conditions import Conditions

SHOWN = 16


@app.command("report")
@asks
def report_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that `tcaq quantize` wrote.")],
    reference: Annotated[str, typer.Option(help="The float MODEL it was made from.")],
    output: Annotated[Path | None, typer.Option(help="The page.", show_default="DIR/report.html")] = None,
    num: Annotated[int, typer.Option(min=2, help="Images of each model and scheduler.")] = 64,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps.")] = 50,
    seed: Annotated[int, typer.Option(help="Seed of the images; calibration never draws the same noise.")] = 1,
    features: opt.FeaturesOption = None,
    real: Annotated[
        Path | None, typer.Option(help="Real images (folder) or statistics (.npz), if the extractor brings none.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 32,
    work: Annotated[
        Path | None, typer.Option(help="Folder of finished batches.", show_default="DIR/evaluation")
    ] = None,
    schedulers: Annotated[
        str,
        typer.Option(help="diffusers schedulers to sample with beside the model's own, with commas between."),
    ] = "",
    asked: Conditions | None = None,
    device: opt.DeviceOption = opt.DEVICE,
) -> None:
    """Sample both models, measure, and write one HTML page: quality, images, and what every stage of the run did."""
    if not (folder / RUN_FOLDER).is_dir():
        raise UsageError(
            f"{folder} holds no {RUN_FOLDER} folder to tell of; give the folder that `tcaq quantize` wrote"
        )
    original = open_float(reference)
    check_reference(folder, original)
    conditions = resolve_conditions(original, asked)
    extractor = find_features(original, features, conditions, real)
    others = dict.fromkeys(part.strip() for part in schedulers.split(",") if part.strip())
    names = (None, *(name for name in others if name != type(original.scheduler).__name__))
    for name in names:  # what is wrong must not come up after the first was sampled
        check_asked(use_scheduler(original, name), steps, conditions)
    protocol = Protocol(
        extractor=extractor, work=work or folder / "evaluation", num=num, steps=steps, seed=seed, batch=batch,
        real=None if real is None or extractor is None else load_real(real, extractor), conditions=conditions,
    )  # fmt: skip
    with stage_progress() as on_progress:
        tried = [try_scheduler(folder, reference, name, protocol, device, on_progress) for name in names]
    path = output or folder / "report.html"
    entry = Entry(folder.resolve().name, folder, [trial for _, trial in tried])
    weights = float_bytes(reference)
    write_report(path, f"{entry.name}, quantized", [entry], {"model": reference}, float_bytes=weights)
    for result, _ in tried:
        console.print(scores_table({entry.name: result}))
    console.print(f"open {path} in a browser")


def float_bytes(model: str) -> int:
    """Bytes of the float denoiser's weights."""
    return sum(weight.numel() * weight.element_size() for weight in find_denoiser(open_float(model))[1].parameters())


def try_scheduler(
    folder: Path, reference: str, name: str | None, protocol: Protocol, device: str, on_progress: OnProgress
) -> tuple[Evaluation, Trial]:
    """Both models under one scheduler; None: their own."""
    original = use_scheduler(placed(open_float(reference), device), name)
    quantized = use_scheduler(placed(open_quantized(folder), device), name)
    sampler = f"{type(quantized.scheduler).__name__}, {protocol.steps} steps"

    def prefixed(stage: str, done: int, total: int, resumed: bool) -> None:
        on_progress(f"{sampler}: {stage}", done, total, resumed)

    result, float_, ours = evaluate(original, quantized, protocol, prefixed)
    return result, Trial(sampler, result.model_dump(mode="json"), ours.images[:SHOWN], float_.images[:SHOWN])
