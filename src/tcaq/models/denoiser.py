"""The denoiser inside a pipeline, and the clock that reads its timestep before every forward pass."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any, cast

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from tcaq.errors import ModelError
from tcaq.quantizers.clock import StepClock
from tcaq.spec.steps import StepGroups

COMPONENTS = ("unet", "transformer")
SECOND = ("unet_2", "transformer_2")
"""Names of second denoisers."""
CLOCK = "step_clock"


def find_denoiser(pipe: DiffusionPipeline) -> tuple[str, nn.Module]:
    """Name and module of the network that the pipeline calls once a step.

    Raises: ModelError naming the components there are, if none of them is a denoiser.
    """
    found = [name for name in (*COMPONENTS, *SECOND) if isinstance(getattr(pipe, name, None), nn.Module)]
    if len(found) > 1:
        raise ModelError(
            f"{type(pipe).__name__} has several denoisers ({', '.join(found)}), between which it changes while it samples; only "
            "pipelines of one are supported"
        )
    if found and found[0] in COMPONENTS:
        return found[0], getattr(pipe, found[0])
    there = ", ".join(sorted(pipe.components)) or "none"
    raise ModelError(
        f"{type(pipe).__name__} has no denoiser: looked for the components {' or '.join(COMPONENTS)}, it has {there}. "
        "Pass a pipeline of a U-Net or a diffusion transformer"
    )


def bind(denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of one forward pass by name; pipelines pass the timestep by position or by keyword.

    Raises: ModelError if the signature does not tell, which one of torch.compile hides.
    """
    _timestep_position(denoiser)
    return dict(inspect.signature(denoiser.forward).bind(*args, **kwargs).arguments)


def _timestep_position(denoiser: nn.Module) -> int:
    names = list(inspect.signature(denoiser.forward).parameters)
    if "timestep" not in names:
        hint = "; quantize before torch.compile" if hasattr(denoiser, "_orig_mod") else ""
        raise ModelError(
            f"{type(denoiser).__name__}.forward takes no `timestep`; its arguments are {', '.join(names)}{hint}"
        )
    return names.index("timestep")


def _tick(position: int, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Set the clock. Args: position: of the timestep; reading a signature here would break torch.compile's graph."""
    timestep = args[position] if len(args) > position else kwargs["timestep"]
    clock_of(denoiser).set(cast(Tensor, timestep))


def attach_clock(denoiser: nn.Module, groups: StepGroups) -> StepClock:
    """Add a clock to the denoiser, set before each of its forward passes."""
    clock = StepClock(groups)
    denoiser.add_module(CLOCK, clock)
    denoiser.register_forward_pre_hook(partial(_tick, _timestep_position(denoiser)), with_kwargs=True)
    return clock


def clock_of(denoiser: nn.Module) -> StepClock:
    """The clock that `attach_clock` added."""
    return cast(StepClock, getattr(denoiser, CLOCK))
