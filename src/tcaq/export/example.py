"""What a pipeline gives its denoiser, seen once, and made ready to trace with."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor, nn

from tcaq.errors import ModelError
from tcaq.export.interface import DTYPES, FREE, TIMESTEP, Input, Interface
from tcaq.models.architectures import architecture
from tcaq.models.config import TcaqConfig
from tcaq.models.denoiser import find_denoiser
from tcaq.models.inputs import Inputs, inputs_of_call
from tcaq.models.sampler import sample
from tcaq.spec.conditions import Conditions
from tcaq.spec.pictures import Picture

BATCH, TEXT = 2, 7
STEPS, PICTURE = 50, 64


class _CalledError(Exception):
    """Carries the arguments of the denoiser's first call out of the pipeline."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__("denoiser called")
        self.arguments = args, kwargs


@dataclass(frozen=True)
class Example:
    """Values to trace with, in the interface's order. All free axes differ in size, so that a trace mixes nothing up."""

    interface: Interface
    values: tuple[Tensor, ...]


def first_call(pipe: DiffusionPipeline, conditions: Conditions | None = None) -> Inputs:
    """What the pipeline gives its denoiser at the first step for one image.

    Args: conditions: what it is asked for (None: what it was calibrated on).
    Raises: ModelError if it is called with what cannot be recorded.
    """
    denoiser = find_denoiser(pipe)[1]
    shared, config = frozenset(architecture(denoiser).shared), _config(pipe)
    conditions = conditions or (None if config is None else config.conditions)
    return inputs_of_call(denoiser, *first_arguments(pipe, 1, conditions), shared)


def _config(pipe: DiffusionPipeline) -> TcaqConfig | None:
    """Of a quantized pipeline; None for any other."""
    quantizer = getattr(find_denoiser(pipe)[1], "hf_quantizer", None)
    return None if quantizer is None else cast(TcaqConfig, quantizer.quantization_config)


def first_arguments(
    pipe: DiffusionPipeline, images: int, conditions: Conditions | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments, by position and by name, that the pipeline gives its denoiser at the first step.

    Only what comes before the denoiser runs; shapes count, so that a blank picture stands for those of the conditions. Raises:
    ModelError if the denoiser is never called.
    """

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _CalledError(args, kwargs)

    handle = find_denoiser(pipe)[1].register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
    try:
        with TemporaryDirectory(prefix="tcaq-blank-") as folder:
            # some schedulers and pipelines cannot do with a single step
            config = _config(pipe)
            steps = STEPS if config is None else config.calibration.get("steps", STEPS)
            sample(pipe, range(images), steps, _blank(conditions, Path(folder)))
    except _CalledError as called:
        return called.arguments
    finally:
        handle.remove()
    raise ModelError(f"{type(pipe).__name__} never called its denoiser")


def _blank(asked: Conditions | None, folder: Path) -> Conditions | None:
    """What is asked for, with a blank picture in place of its own, which may be on another machine."""
    if asked is None or not asked.pictures:
        return asked
    path = folder / "blank.png"
    Image.new("RGB", (PICTURE, PICTURE)).save(path)
    return asked.model_copy(update={"pictures": (Picture.of(path),)})


def example_of(denoiser: nn.Module, call: Inputs) -> Example:
    """An example in the shapes of a call.

    Raises: ModelError if the denoiser is given plain values, which a graph would freeze, or a dtype that it cannot take.
    """
    if plain := [path for path, value in call.whole.items() if not isinstance(value, Tensor)]:
        raise ModelError(
            f"{type(denoiser).__name__} is given {', '.join(plain)}, no tensors, which an exported graph could not vary; leave "
            "that option of the pipeline off"
        )
    names = tuple(inspect.signature(denoiser.forward).parameters)
    first, known = names[0], FREE.get(type(denoiser).__name__, {})
    given = {first: call.sample, **call.rows, **call.whole}
    axes = {name: ({0: "batch"} if name == first or name in call.rows else {}) | known.get(name, {}) for name in given}
    sizes = _sizes(denoiser)
    inputs = [Input(name, _dtype(name, value), axes[name]) for name, value in given.items()]
    values = [i.cast(_resized(given[i.name], {axis: sizes[free] for axis, free in i.free.items()})) for i in inputs]
    timestep = Input(TIMESTEP, "float32", {}), torch.zeros(1)
    interface = Interface(names, (inputs[0], timestep[0], *inputs[1:]))
    return Example(interface, (values[0], timestep[1], *values[1:]))


def _dtype(name: str, value: Tensor) -> str:
    found = "float32" if value.is_floating_point() else str(value.dtype).removeprefix("torch.")
    found = "int64" if found.startswith(("int", "uint")) else found
    if found not in DTYPES:
        raise ModelError(f"the denoiser's argument {name!r} is of {value.dtype}, which no export holds")
    return found


def _sizes(denoiser: nn.Module) -> dict[str, int]:
    """A size for each free axis that the denoiser's levels or patches divide."""
    config = cast(Any, denoiser).config
    levels = getattr(config, "block_out_channels", None)
    step = 2 ** (len(levels) - 1) if levels else getattr(config, "patch_size", None) or 1
    return {"batch": BATCH, "text": TEXT, "tokens": 12, "height": 4 * step, "width": 5 * step}


def _resized(value: Tensor, sizes: dict[int, int]) -> Tensor:
    """Some axes at other sizes, their values repeated from the start."""
    for axis, size in sizes.items():
        value = value.index_select(axis, torch.arange(size) % value.shape[axis])
    return value
