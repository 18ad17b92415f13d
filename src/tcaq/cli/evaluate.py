"""`tcaq evaluate`: a checkpoint against its float original, into one JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from tcaq.cli import options as opt
from tcaq.cli.app import app, console
from tcaq.cli.asking import SchedulerOption, asks
from tcaq.cli.checking import check_asked, check_reference, find_features
from tcaq.cli.models import executed, open_float, open_quantized, placed
from tcaq.cli.progress import stage_progress
from tcaq.evaluate.evaluate import Evaluation
from tcaq.evaluate.protocol import Protocol, evaluate
from tcaq.evaluate.real import load_real
from tcaq.models.prompting import resolve_conditions
from tcaq.models.switch import use_scheduler
from tcaq.records import write_json
from tcaq.spec.conditions import Conditions


@app.command("evaluate")
@asks
def evaluate_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that `tcaq quantize` wrote.")],
    reference: Annotated[str, typer.Option(help="The float MODEL it was made from.")],
    num: Annotated[int, typer.Option(min=2, help="Images of each model.")] = 2000,
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
    asked: Conditions | None = None,
    scheduler: SchedulerOption = None,
    as_json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result here.")] = None,
    execution: opt.ExecutionOption = opt.Execution.FAKE,
    device: opt.DeviceOption = opt.DEVICE,
) -> None:
    """Sample both models from the same seeds and measure how far their images are from the data and from each other."""
    quantized, original = placed(open_quantized(folder), device), placed(open_float(reference), device)
    check_reference(folder, original)
    quantized, original = use_scheduler(executed(quantized, execution), scheduler), use_scheduler(original, scheduler)
    conditions = resolve_conditions(original, asked)
    check_asked(original, steps, conditions)
    extractor = find_features(original, features, conditions, real)
    protocol = Protocol(
        extractor=extractor, work=work or folder / "evaluation", num=num, steps=steps, seed=seed, batch=batch,
        real=None if real is None or extractor is None else load_real(real, extractor), conditions=conditions,
    )  # fmt: skip
    with stage_progress() as on_progress:
        result, _, _ = evaluate(original, quantized, protocol, on_progress)
    if as_json is not None:
        write_json(as_json, result.model_dump(mode="json"))
    console.print(scores_table({folder.name: result}))


def scores_table(results: dict[str, Evaluation]) -> Table:
    """The float row once, then a row for each evaluated model."""
    first = next(iter(results.values()))
    title = f"{first.scheduler}, {first.steps} steps, {first.num} images, seed {first.seed}, features {first.features or 'none'}"
    table = Table("model", "FD", "FD ratio", "KID", "PSNR dB", "SSIM", "FD to float", "seconds", title=title)
    float_ratio = None if first.float.fd is None else 1.0
    table.add_row(
        "float", number(first.float.fd), number(float_ratio, 3), number(first.float.kid, 5), "", "", "",
        number(first.float.seconds, 1),
    )  # fmt: skip
    for name, r in results.items():
        table.add_row(
            name, number(r.quantized.fd), number(r.ratio.fd, 3), number(r.quantized.kid, 5), number(r.paired.psnr),
            number(r.paired.ssim, 4), number(r.paired.fd_to_float), number(r.quantized.seconds, 1),
        )  # fmt: skip
    return table


def number(value: float | None, digits: int = 2) -> str:
    """A figure for a table; a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"
