"""Options of what conditional models are asked for, shared by the verbs that sample."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from tcaq.errors import UsageError
from tcaq.spec.conditions import Conditions
from tcaq.spec.pictures import pictures_in

PromptsOption = Annotated[
    Path | None, typer.Option(help="Text file, one prompt a line. [default: a small built-in list]", show_default=False)
]
NegativeOption = Annotated[str | None, typer.Option(help="Negative prompt.", show_default=False)]
LabelsOption = Annotated[
    str | None, typer.Option(help="Class numbers, with commas between. [default: 16, evenly]", show_default=False)
]
GuidanceOption = Annotated[
    float | None, typer.Option(help="Scale of classifier-free guidance. [default: the pipeline's]", show_default=False)
]
TrueGuidanceOption = Annotated[
    float | None,
    typer.Option(
        help="Scale of guidance in two calls, beside a distilled one (FLUX with --negative).", show_default=False
    ),
]
SizeOption = Annotated[
    str | None,
    typer.Option(
        help="Pixels of the images: 512, or height x width as in 512x768.", metavar="H[xW]", show_default=False
    ),
]
TokensOption = Annotated[
    int | None, typer.Option(min=1, help="Length to which T5 prompts are padded.", show_default=False)
]
PicturesOption = Annotated[
    Path | None,
    typer.Option(help="Folder of pictures that inpainting starts from; holes are cut at random.", show_default=False),
]
SchedulerOption = Annotated[
    str | None,
    typer.Option(
        help="A diffusers scheduler, such as DPMSolverMultistepScheduler. [default: the model's own]",
        show_default=False,
    ),
]


def make_conditions(
    prompts: Path | None, negative: str | None, labels: str | None, guidance: float | None, true_guidance: float | None,
    size: str | None, tokens: int | None, pictures: Path | None,
) -> Conditions | None:  # fmt: skip
    """What the options ask for; None if none was given. Raises: UsageError naming what is not allowed."""
    given: dict[str, Any] = {
        "negative": negative, "labels": _labels(labels), "guidance": guidance, "true_guidance": true_guidance,
        "tokens": tokens, "pictures": None if pictures is None else pictures_in(pictures), **_size(size),
    }  # fmt: skip
    given = {name: value for name, value in given.items() if value is not None}
    return Conditions.with_prompts_of(prompts, **given) if given or prompts is not None else None


def _labels(text: str | None) -> list[int] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise UsageError(f"--labels {text!r}: give whole numbers from 0, with commas between")
    return [int(part) for part in parts]


def _size(text: str | None) -> dict[str, int]:
    if text is None:
        return {}
    found = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if found is None:
        raise UsageError(f"--size {text!r}: give pixels as 512, or as height x width: 512x768")
    return {"height": int(found[1]), "width": int(found[2] or found[1])}
