"""Conditions: what conditional models are asked for while they sample."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field

from tcaq.errors import UsageError
from tcaq.spec.base import Spec
from tcaq.spec.pictures import Picture

Pixels = Annotated[int, Field(ge=1)]


class Conditions(Spec):
    """Image i has prompt and label number i of their lists, which begin again at their end; None leaves it to the pipeline.

    `guidance` is the scale of classifier-free guidance, or the one that a distilled model reads. `true_guidance` is for models of
    the second kind that are asked with a negative prompt as well (FLUX): real guidance, in two calls a step. `tokens` is the
    length to which T5's prompts are padded. `pictures` are what inpainting starts from, in turn like prompts.
    """

    LATER = ("pictures",)

    prompts: tuple[str, ...] = ()
    negative: str | None = None
    labels: tuple[Annotated[int, Field(ge=0)], ...] = ()
    guidance: Annotated[float, Field(ge=0)] | None = None
    true_guidance: Annotated[float, Field(ge=0)] | None = None
    height: Pixels | None = None
    width: Pixels | None = None
    tokens: Annotated[int, Field(ge=1)] | None = None
    pictures: tuple[Picture, ...] = ()

    @classmethod
    def with_prompts_of(cls, path: Path | None, **others: object) -> Self:
        """Conditions with the prompts of a file, one a line; empty lines do not count.

        Raises: UsageError if it cannot be read or holds no prompt.
        """
        if path is None:
            return cls.parse(others, where="conditions")
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                f"cannot read prompts from {path}: {error}; give a text file with one prompt a line"
            ) from error
        prompts = [line for line in lines if line]
        if not prompts:
            raise UsageError(f"{path} holds no prompt; give a text file with one prompt a line")
        return cls.parse({**others, "prompts": prompts}, where="conditions")


PROMPTS = (
    "a photo of a red fox in the snow, golden hour",
    "an oil painting of a harbour with fishing boats",
    "a bowl of ramen on a wooden table, top view",
    "portrait of an old man with a beard, studio light",
    "a city street at night in the rain, neon signs",
    "a pencil sketch of a cathedral",
    "a glass of water on a white background",
    "two children flying a kite on a beach",
    "a steam locomotive crossing a stone bridge",
    "macro photo of a bee on a purple flower",
    "an isometric illustration of a small office",
    "a mountain lake at dawn, fog, pine trees",
    "a poster that says OPEN in large letters",
    "a black cat asleep on a green sofa",
    "an astronaut reading a newspaper on the moon",
    "a plate of fruit in the style of a still life",
)
"""Prompts of calibration and evaluation where none are given: subjects, styles and light that differ."""
