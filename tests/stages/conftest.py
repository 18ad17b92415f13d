"""A tiny model brought to the point before reconstruction."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from diffusers import DDIMPipeline
from torch import nn

from tcaq.layers.insert import insert
from tcaq.models.denoiser import attach_clock
from tcaq.models.sampler import Trajectories, record
from tcaq.models.seeds import image_seeds
from tcaq.models.units import Unit, default_plan, execution_order, resolve
from tcaq.records import Record
from tcaq.spec.recipe import Daq, RangeSearch, Tcr
from tcaq.spec.steps import StepGroups
from tcaq.stages.equalize import apply_vectors, equalize
from tcaq.stages.observe import observe
from tcaq.stages.scale import apply_input_scales, apply_weight_scales, scale_inputs, scale_weights
from tcaq.stages.select import apply_choices, select

SEARCH = RangeSearch(values=2000, weight_candidates=10, input_candidates=10)


@dataclass
class Scene:
    """A pipeline with quantized layers, its trajectories and ranges."""

    pipe: DDIMPipeline
    unet: nn.Module
    trajectories: Trajectories
    groups: StepGroups
    units: list[Unit]
    ranges: Record


def build(pipe: DDIMPipeline, grouping: int | str = "per-step", bits: int = 4) -> Scene:
    _, trajectories = record(pipe, image_seeds("calibration", 0, 0, 4), 4)
    unet = pipe.unet
    groups = StepGroups.of(grouping, trajectories.timesteps.tolist())
    insert(unet, resolve(unet, default_plan(unet, bits, bits)), attach_clock(unet, groups))
    x, t = trajectories.samples[0, :1], trajectories.timesteps[:1]
    with torch.no_grad():
        units = execution_order(unet, lambda: unet(x, t))
    return Scene(pipe, unet, trajectories, groups, units, observe(unet, trajectories, SEARCH.values, 32, 0))


def initialise(scene: Scene) -> None:
    apply_vectors(scene.unet, equalize(scene.unet, scene.ranges, Tcr()))
    apply_weight_scales(scene.unet, scale_weights(scene.unet, scene.ranges, SEARCH))
    apply_input_scales(scene.unet, scale_inputs(scene.unet, scene.ranges, SEARCH))
    apply_choices(scene.unet, select(scene.unet, scene.ranges, Daq(), SEARCH))


@pytest.fixture
def scene(tiny_pipeline) -> Scene:
    return build(tiny_pipeline())


@pytest.fixture
def ready(scene) -> Scene:
    initialise(scene)
    return scene
