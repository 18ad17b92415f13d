"""Every family quantized in memory, as a checkpoint would hold it: made once, handed out as copies."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from diffusers import DiffusionPipeline

from tcaq.checkpoint import pack
from tcaq.layers.insert import insert
from tcaq.models.config import TcaqConfig
from tcaq.models.denoiser import attach_clock, find_denoiser
from tcaq.models.prompting import resolve_conditions
from tcaq.models.sampler import record
from tcaq.models.trajectories import Trajectories
from tcaq.models.units import default_plan, resolve
from tcaq.spec.recipe import Daq, RangeSearch
from tcaq.spec.steps import StepGroups
from tcaq.stages.observe import observe
from tcaq.stages.scale import apply_input_scales, apply_weight_scales, scale_inputs, scale_weights
from tcaq.stages.select import apply_choices, select

from .tiny import conditions_of, pipeline_of

SEARCH = RangeSearch(values=300, weight_candidates=1, input_candidates=1)


@cache
def _made(name: str, bits: int, dtype: torch.dtype, options: tuple[str, ...]) -> tuple[DiffusionPipeline, Trajectories]:
    pipe = pipeline_of(name, dtype)
    denoiser = find_denoiser(pipe)[1]
    trajectories = record(pipe, (1, 2), 2, resolve_conditions(pipe, conditions_of(name)))[1]
    groups = StepGroups.of("per-step", trajectories.timesteps.tolist())
    chosen = {option.removeprefix("no "): not option.startswith("no ") for option in options}
    plan = resolve(denoiser, default_plan(denoiser, bits, bits, **chosen))
    insert(denoiser, plan, attach_clock(denoiser, groups))
    ranges = observe(denoiser, trajectories, SEARCH.values, 32, 0)
    apply_weight_scales(denoiser, scale_weights(denoiser, ranges, SEARCH))
    apply_input_scales(denoiser, scale_inputs(denoiser, ranges, SEARCH))
    apply_choices(denoiser, select(denoiser, ranges, Daq(), SEARCH))
    half = str(dtype).removeprefix("torch.")
    asked = conditions_of(name)
    recipe = {"calibration": {"conditions": None if asked is None else asked.model_dump(mode="json")}}
    pack(denoiser, TcaqConfig(plan=plan, groups=groups, recipe=recipe, dtype=half))
    return pipe, trajectories


def quantized_of(
    name: str, *options: str, bits: int = 4, dtype: torch.dtype = torch.float32
) -> tuple[DiffusionPipeline, Trajectories]:
    """A family's pipeline, calibrated and packed, and the calls it was calibrated on.

    Args: options: of `default_plan`; "no" before one turns it off.
    """
    pipe, trajectories = _made(name, bits, dtype, options)
    component = find_denoiser(pipe)[0]
    own: dict[str, Any] = {component: copy.deepcopy(getattr(pipe, component))}
    return type(pipe)(**{**pipe.components, **own, **_flags(pipe)}), trajectories


def _flags(pipe: DiffusionPipeline) -> dict[str, Any]:
    """Arguments of a pipeline's constructor that are no components."""
    return {k: v for k, v in pipe.config.items() if k == "requires_safety_checker"}
