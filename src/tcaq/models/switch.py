"""Give a pipeline another of diffusers' schedulers."""

from __future__ import annotations

import inspect
from typing import Any, cast

import diffusers
from diffusers import DDIMPipeline, DiffusionPipeline, SchedulerMixin

from tcaq.errors import UsageError


def use_scheduler(pipe: DiffusionPipeline, name: str | None) -> None:
    """Give a pipeline the scheduler of a name, with the settings of its own one; None leaves it as it is.

    Raises: UsageError if diffusers has no scheduler of that name, or it does not suit what the model predicts.
    """
    if name is None:
        return
    kind: Any = getattr(diffusers, name, None)
    if not isinstance(kind, type) or not issubclass(kind, SchedulerMixin):
        raise UsageError(
            f"scheduler {name!r}: diffusers has none of that name; it has DDIMScheduler, EulerDiscreteScheduler, "
            "DPMSolverMultistepScheduler, PNDMScheduler and others"
        )
    if isinstance(pipe, DDIMPipeline):
        raise UsageError("a DDIMPipeline samples with DDIM alone; leave the scheduler out")
    settings = _flow_settings(pipe.scheduler, kind)
    pipe.register_modules(scheduler=cast(Any, kind).from_config(pipe.scheduler.config, **settings))


def _flow_settings(before: Any, kind: type) -> dict[str, Any]:
    """What a scheduler has to be told beside its config when a flow-matching model changes to it."""
    was, becomes = (name.startswith("FlowMatch") for name in (type(before).__name__, kind.__name__))
    if was == becomes:
        return {}
    if becomes or "use_flow_sigmas" not in inspect.signature(kind).parameters:
        raise UsageError(
            f"scheduler {kind.__name__!r} does not suit a model of {type(before).__name__}: one of them is of flow matching, "
            "the other is not"
        )
    return {
        "use_flow_sigmas": True,
        "prediction_type": "flow_prediction",
        "flow_shift": before.config.get("shift", 1.0),
    }
