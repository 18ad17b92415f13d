"""Give a pipeline another of diffusers' schedulers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, cast

import diffusers
from diffusers import ConfigMixin, DDIMPipeline, DDIMScheduler, DDPMPipeline, DiffusionPipeline, SchedulerMixin

from tcaq.errors import UsageError


def use_scheduler(pipe: DiffusionPipeline, name: str | None) -> DiffusionPipeline:
    """The pipeline with the scheduler of a name, with the settings of its own one; None leaves it as it is.

    Returns: the pipeline itself, but for a `DDIMPipeline`, which knows one scheduler only: its denoiser in a `DDPMPipeline`.
    Raises: UsageError if diffusers has no scheduler of that name, or it does not suit the model or its pipeline.
    """
    if name is None:
        return pipe
    kind: Any = getattr(diffusers, name, None)
    if needs := vars(kind).get("_backends") if isinstance(kind, type) else None:
        raise UsageError(f"scheduler {name!r} needs packages that are not all installed: {', '.join(needs)}")
    if not isinstance(kind, type) or not issubclass(kind, SchedulerMixin) or not issubclass(kind, ConfigMixin):
        raise UsageError(
            f"scheduler {name!r}: diffusers has none of that name; it has DDIMScheduler, EulerDiscreteScheduler, "
            "DPMSolverMultistepScheduler, PNDMScheduler and others"
        )
    settings = _flow_settings(pipe.scheduler, kind)
    try:
        scheduler = cast(Any, kind).from_config(pipe.scheduler.config, **settings)
    except (TypeError, ValueError) as error:
        raise UsageError(f"scheduler {name!r} cannot be made from this model's settings: {error}") from error
    if isinstance(pipe, DDIMPipeline | DDPMPipeline):
        _check_plain(scheduler, type(pipe).__name__)
        if isinstance(pipe, DDIMPipeline) and not isinstance(scheduler, DDIMScheduler):
            return DDPMPipeline(pipe.unet, scheduler)
    pipe.register_modules(scheduler=scheduler)
    return pipe


def _check_plain(scheduler: Any, pipeline: str) -> None:
    """Refuse what diffusers' unconditional pipelines cannot drive: they neither scale x_t nor sample without a generator."""
    scales = float(getattr(scheduler, "init_noise_sigma", 1)) != 1
    if scales or "generator" not in inspect.signature(scheduler.step).parameters:
        why = "needs scaled inputs" if scales else "takes no generator"
        raise UsageError(
            f"scheduler {type(scheduler).__name__!r} {why}, which diffusers' {pipeline} does not provide; "
            "DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler and others suit it"
        )


def _is_flow(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a scheduler is one of flow matching: a kind of its own, or another that was told so."""
    told = config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
    return name.startswith("FlowMatch") or bool(told)


def _flow_settings(before: Any, kind: type) -> dict[str, Any]:
    """What a scheduler has to be told beside its config when a flow-matching model changes to it."""
    was, becomes = _is_flow(type(before).__name__, before.config), _is_flow(kind.__name__, {})
    if not was and not becomes:
        return {}
    shift = before.config.get("flow_shift", before.config.get("shift", 1.0))
    if was and becomes:
        return {"shift": shift}
    if becomes or "use_flow_sigmas" not in inspect.signature(kind).parameters:
        raise UsageError(
            f"scheduler {kind.__name__!r} does not suit a model of {type(before).__name__}: one of them is of flow matching, "
            "the other is not"
        )
    return {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": shift}
