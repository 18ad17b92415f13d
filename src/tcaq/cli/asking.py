"""Options of what conditional models are asked for, shared by the verbs that sample."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from tcaq.errors import UsageError
from tcaq.spec.conditions import Conditions
from tcaq.spec.pictures import pictures_in

SchedulerOption = Annotated[
    str | None,
    typer.Option(
        help="A diffusers scheduler, such as DPMSolverMultistepScheduler.",
        show_default="the model's own",
    ),
]


def asks(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of `make_conditions` in place of its argument `asked`, which they make."""
    own, options = inspect.signature(command).parameters, inspect.signature(make_conditions).parameters
    hints = get_type_hints(make_conditions, include_extras=True) | get_type_hints(command, include_extras=True)
    names = [name for own_name in own for name in (options if own_name == "asked" else (own_name,))]

    @wraps(command)
    def with_options(**given: Any) -> None:
        asked = make_conditions(**{name: given.pop(name) for name in options})
        command(**given, asked=asked)

    # typer reads both; keywords may stand in any order, with defaults or without
    with_options.__annotations__ = {name: hints[name] for name in names}
    with_options.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [(own | options)[name].replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY) for name in names]
    )
    return with_options


def make_conditions(
    prompts: Annotated[
        Path | None,
        typer.Option(help="Text file, one prompt a line.", show_default="a small built-in list"),
    ] = None,
    negative: Annotated[str | None, typer.Option(help="Negative prompt.", show_default=False)] = None,
    labels: Annotated[
        str | None,
        typer.Option(help="Class numbers, with commas between.", show_default="16, evenly"),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(help="Scale of classifier-free guidance.", show_default="the pipeline's"),
    ] = None,
    true_guidance: Annotated[
        float | None,
        typer.Option(
            help="Scale of guidance in two calls, beside a distilled one (FLUX with --negative).", show_default=False
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            help="Pixels of the images: 512, or height x width as in 512x768.", metavar="H[xW]", show_default=False
        ),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Length to which T5 prompts are padded.", show_default=False)
    ] = None,
    pictures: Annotated[
        Path | None,
        typer.Option(
            help="Folder of pictures that inpainting starts from; holes are cut at random.", show_default=False
        ),
    ] = None,
) -> Conditions | None:
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
