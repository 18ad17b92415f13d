"""From conditions to the arguments of a pipeline's call."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from diffusers import DiffusionPipeline

from tcaq.errors import ModelError, UsageError
from tcaq.models.class_names import named_classes
from tcaq.models.denoiser import find_denoiser
from tcaq.models.inpainting import masks, opened
from tcaq.spec.conditions import PROMPTS, Conditions

FIELDS = {
    "prompts": "prompt", "negative": "negative_prompt", "labels": "class_labels", "guidance": "guidance_scale",
    "true_guidance": "true_cfg_scale", "height": "height", "width": "width", "tokens": "max_sequence_length", "pictures": "image",
}  # fmt: skip
"""The argument of a pipeline's call that each field sets."""
PICTURES = ("image", "mask_image", "control_image", "source_image")
INPAINTING = ("image", "mask_image")
"""What a pipeline takes that paints into a part of a picture: of all that start from one, those that can begin with noise."""
OTHERS = {"num_frames": "videos", "video_length": "videos", "audio_length_in_s": "sound", "audio_end_in_s": "sound"}
CLASSES = 16
"""How many classes are sampled where none are asked for, evenly over all there are."""


def resolve_conditions(pipe: DiffusionPipeline, asked: Conditions | None = None) -> Conditions | None:
    """What the pipeline will be asked for, with every default written out; None if it takes no conditions.

    Raises: UsageError naming each field that the pipeline has no argument for; ModelError if it is out of scope.
    """
    takes = inspect.signature(pipe.__call__).parameters
    given = {} if asked is None else asked.model_dump(exclude_defaults=True)
    if wrong := [name for name in given if FIELDS[name] not in takes]:
        raise UsageError(
            f"{type(pipe).__name__} takes no {', '.join(FIELDS[name] for name in wrong)}: leave out {', '.join(wrong)}"
        )
    _check_scope(type(pipe).__name__, takes, pictures="pictures" in given)
    if not any(name in takes for name in FIELDS.values()):
        return None
    defaults: dict[str, Any] = {}
    if "prompt" in takes:
        defaults["prompts"] = PROMPTS
    if "class_labels" in takes:
        defaults["labels"] = _labels(pipe)
    if isinstance(scale := takes["guidance_scale"].default if "guidance_scale" in takes else None, int | float):
        defaults["guidance"] = float(scale)
    return Conditions(**(defaults | given))


def _check_scope(name: str, takes: Mapping[str, inspect.Parameter], pictures: bool) -> None:
    """Raises: ModelError saying why a pipeline with such a call cannot be calibrated; UsageError if it lacks pictures."""
    starts = [argument for argument in PICTURES if argument in takes]
    if starts == list(INPAINTING):
        if not pictures:
            raise UsageError(f"{name} paints into pictures: give a folder of them (--pictures)")
    elif starts:
        raise ModelError(
            f"{name} starts from a picture ({', '.join(starts)}), which calibration has none of; quantize the "
            "text-to-image pipeline of the same denoiser"
        )
    if others := [what for argument, what in OTHERS.items() if argument in takes]:
        raise ModelError(f"{name} makes {others[0]}; only pipelines that make images are supported")
    needed = [p.name for p in takes.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if unknown := [argument for argument in needed if argument not in FIELDS.values()]:
        raise ModelError(f"{name} must be given {', '.join(unknown)}, which calibration has none of")


def _labels(pipe: DiffusionPipeline) -> tuple[int, ...]:
    """Classes evenly over all there are: those that the pipeline has names for, else all that its denoiser has room for."""
    known = list(named_classes(pipe))
    if not known:
        config = find_denoiser(pipe)[1].config
        count = getattr(config, "num_embeds_ada_norm", None) or getattr(config, "num_class_embeds", None)
        if not isinstance(count, int):
            argument = inspect.signature(pipe.__call__).parameters["class_labels"]
            if argument.default is None and getattr(find_denoiser(pipe)[1], "class_embedding", None) is None:
                return ()  # a pipeline for models with classes and without them
            raise UsageError(f"{type(pipe).__name__} does not say how many classes it knows: give labels")
        known = list(range(count))
    return tuple(dict.fromkeys(known[i * len(known) // CLASSES] for i in range(CLASSES)))


def call_options(pipe: DiffusionPipeline, conditions: Conditions | None, images: Sequence[int]) -> dict[str, Any]:
    """The arguments of the pipeline's call for images of these numbers."""
    if conditions is None:
        return {}
    takes = inspect.signature(pipe.__call__).parameters
    values = {
        "prompt": cycled(conditions.prompts, images), "class_labels": cycled(conditions.labels, images),
        "negative_prompt": None if conditions.negative is None else [conditions.negative] * len(images),
        "guidance_scale": conditions.guidance, "true_cfg_scale": conditions.true_guidance, "height": conditions.height,
        "width": conditions.width, "max_sequence_length": conditions.tokens,
    }  # fmt: skip
    if conditions.pictures:
        chosen = [opened(picture) for picture in cycled(conditions.pictures, images) or ()]
        values |= {"image": chosen, "mask_image": masks([picture.size for picture in chosen], images)}
        values["strength"] = 1.0  # every step, from pure noise on, whatever part the pipeline would do by default
    if conditions.height is not None or conditions.width is not None:
        values["use_resolution_binning"] = False  # the size asked for, not the nearest one in a list
    return {name: value for name, value in values.items() if value is not None and name in takes}


def cycled(values: Sequence[Any], images: Sequence[int]) -> list[Any] | None:
    """An entry for each image, beginning again at the end; None if there are no values."""
    return [values[i % len(values)] for i in images] if values else None
