"""`tcaq sample`: images from a float model or a checkpoint, each from its own seed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from tcaq.cli import options as opt
from tcaq.cli.app import app, console, notes
from tcaq.cli.asking import SchedulerOption, asks
from tcaq.cli.checking import check_asked
from tcaq.cli.models import executed, open_any, placed
from tcaq.cli.progress import stage_progress
from tcaq.errors import UsageError
from tcaq.models.prompting import resolve_conditions
from tcaq.models.sampler import batches, sample
from tcaq.models.seeds import image_seeds
from tcaq.models.switch import use_scheduler
from tcaq.records import replacing
from tcaq.report.grid import grid_image
from tcaq.spec.conditions import Conditions


@app.command("sample")
@asks
def sample_command(
    model: Annotated[str, typer.Argument(help="A folder that `tcaq quantize` wrote, or a float MODEL.")],
    output: Annotated[Path, typer.Option(help="FILE.png for one grid, or a folder for one file an image.")],
    num: Annotated[int, typer.Option(min=1, help="How many images.")] = 64,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps.")] = 50,
    seed: Annotated[int, typer.Option(help="Image i is the same for every batch size.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 32,
    asked: Conditions | None = None,
    scheduler: SchedulerOption = None,
    execution: opt.ExecutionOption = opt.Execution.FAKE,
    device: opt.DeviceOption = opt.DEVICE,
) -> None:
    """Sample images; equal seeds give float and quantized models equal noise, so their images can be compared."""
    if output.suffix and output.suffix != ".png":
        raise UsageError(f"--output {output}: give a name ending in .png for a grid, or a folder for single images")
    pipe = use_scheduler(executed(placed(open_any(model), device), execution), scheduler)
    conditions = resolve_conditions(pipe, asked)
    check_asked(pipe, steps, conditions)
    parts = []
    with stage_progress() as on_progress:
        on_progress("images", 0, num, False)
        for chunk in batches(range(num), batch):
            seeds = image_seeds("sample", seed, chunk[0], chunk[-1] + 1)
            images = sample(pipe, seeds, steps, conditions, chunk[0])
            if output.suffix == ".png":
                parts.append(images)
            else:
                write_single(images, output, chunk[0])
            on_progress("images", chunk[-1] + 1, num, False)
    if parts:
        with replacing(output) as path:
            grid_image(torch.cat(parts), columns=max(1, round(num**0.5))).save(path, format="PNG")
    console.print(f"{num} images written to {output}")
    if older := [path for path in output.glob("*.png") if path.stem.isdecimal() and int(path.stem) >= num]:
        notes.print(f"{output} still holds {len(older)} images of an earlier call, from {min(older).name} on")


def write_single(images: Tensor, folder: Path, first: int) -> None:
    """A file for each image, uint8 [N, C, H, W], named by its number."""
    for index, image in enumerate(images.split(1), start=first):
        with replacing(folder / f"{index:05d}.png") as path:
            grid_image(image, columns=1, scale=1).save(path, format="PNG")
