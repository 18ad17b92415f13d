"""What a recipe works with: a pipeline, a run, and each stage as one call that resumes by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import DDIMPipeline, DiffusionPipeline
from torch import Tensor, nn

from tcaq.errors import UsageError
from tcaq.layers.insert import insert, quantized_layers
from tcaq.models.bypass import bypass_of, entrance_of
from tcaq.models.denoiser import attach_clock, clock_of, find_denoiser
from tcaq.models.forward_process import forward_process
from tcaq.models.sampler import batches
from tcaq.models.scheduler import noise_aware
from tcaq.models.seeds import image_seeds
from tcaq.models.store import Store
from tcaq.models.time import time_unit
from tcaq.models.trajectories import Trajectories
from tcaq.models.units import Unit, check_reached, execution_order
from tcaq.quantizers.mixed import set_widths
from tcaq.recipes.share import share_collection
from tcaq.records import Record
from tcaq.runs import Run
from tcaq.spec.law import Even
from tcaq.spec.plan import ResolvedPlan
from tcaq.spec.recipe import Daq, Grouping, Recipe
from tcaq.spec.steps import StepGroups
from tcaq.spec.widths import inputs_of_width, weights_of_width, with_inputs, with_weights
from tcaq.stages.allocate import allocate
from tcaq.stages.allocate_inputs import allocate_inputs, apply_input_widths
from tcaq.stages.bypass import apply_bypass, inside, measure_bypass
from tcaq.stages.collect import collect, images_of, trajectories_of
from tcaq.stages.correct import apply_correction, correct, typical_error
from tcaq.stages.equalize import apply_vectors, equalize
from tcaq.stages.group import group
from tcaq.stages.learn import Fit
from tcaq.stages.observe import observe
from tcaq.stages.precise import precise
from tcaq.stages.reconstruct import Reconstructor, apply_unit, fit, time_lessons
from tcaq.stages.round import Rounder, apply_codes
from tcaq.stages.rows import Classes, own_rows, table_rows
from tcaq.stages.scale import apply_input_scales, apply_weight_scales, scale_inputs, scale_weights
from tcaq.stages.select import apply_choices, select
from tcaq.stages.stagger import stagger
from tcaq.stages.weigh import weigh
from tcaq.stages.widths import measure_widths

Judge = Callable[[Tensor, Tensor], float]
"""Distance between two sets of images, uint8 [images, channels, height, width]: the float model's, and the quantized one's."""


@dataclass(frozen=True)
class Collected:
    """What sampling left: trajectories, and the images they end in."""

    trajectories: Trajectories
    images: Tensor


@dataclass
class Job:
    """One quantization in progress; every method is a stage of the run, computed or taken from disk."""

    pipe: DiffusionPipeline
    recipe: Recipe
    plan: ResolvedPlan
    run: Run
    judge: Judge | None = None
    share: Path | None = None
    groups: StepGroups = field(default_factory=StepGroups)
    units: list[Unit] = field(default_factory=list)
    classes: Classes = own_rows
    settled: frozenset[nn.Module] = frozenset()
    step_bits: tuple[int, ...] = ()

    @cached_property
    def store(self) -> Store:
        """Where trajectories are kept, within the recipe's memory."""
        return Store(self.recipe.memory * 2**30, self.run.folder)

    @property
    def denoiser(self) -> nn.Module:
        """The pipeline's denoiser."""
        return find_denoiser(self.pipe)[1]

    @property
    def batch(self) -> int:
        """Images at a time, wherever the model runs on whole trajectories."""
        return self.recipe.calibration.batch

    @property
    def room(self) -> dict[str, Any]:
        """Where activations are kept: in memory as far as the recipe lets them, beyond that beside the run's results."""
        return {"memory": self.recipe.memory, "spill": self.run.folder}

    def collect(self, round_: int) -> Collected:
        """Sample the calibration images with the model as it is now: the float one before `insert`."""
        spec = self.recipe.calibration
        groups = list(batches(image_seeds("calibration", self.recipe.seed, 0, spec.images), spec.batch))
        items, parts = [f"batch-{i}" for i in range(len(groups))], list[Record]()

        def compute(item: str) -> Record:
            number = int(item.removeprefix("batch-"))
            return collect(self.pipe, groups[number], spec.steps, spec.conditions, number * spec.batch, self.store)

        shared = round_ == 0 and self.share is not None
        source = (
            share_collection(cast(Path, self.share), dict(self.run.identity), items, compute) if shared else compute
        )
        self.run.series(f"collect/{round_}", items, source, lambda _, record: parts.append(record))
        return Collected(
            Trajectories.join([trajectories_of(part) for part in parts], self.store),
            torch.cat([images_of(part) for part in parts]),
        )

    def weigh(self, trajectories: Trajectories) -> Trajectories:
        """The trajectories with each step counting as the recipe's law says."""
        law = self.recipe.calibration.law
        if isinstance(law, Even):
            return trajectories
        record = self.run.step("weigh", lambda: weigh(self.pipe, trajectories, law), lambda record: record)
        return replace(trajectories, weights=record.tensors["weights"])

    def allocate(self, trajectories: Trajectories) -> None:
        """Choose a width for each weight, if the recipe lets layers trade: the plan says so from then on. Before `insert`."""
        recipe = self.recipe
        if (spec := recipe.allocation) is None:
            return
        grids = weights_of_width(self.plan, recipe.weights)

        def apply(record: Record) -> None:
            chosen = record.tensors["bits"].tolist()
            self.plan = with_weights(self.plan, dict(zip(record.meta["layers"], chosen, strict=True)))

        self.run.step(
            "allocate",
            lambda: allocate(self.denoiser, trajectories, grids, spec, recipe.ranges, recipe.seed),
            apply,
        )

    def insert(self, trajectories: Trajectories) -> None:
        """Swap the planned layers; step groups follow the recipe and the calibration schedule."""
        self.groups = StepGroups.of(self.recipe.step_groups, trajectories.timesteps.tolist())
        denoiser = self.denoiser
        insert(denoiser, self.plan, attach_clock(denoiser, self.groups))
        first = next(trajectories.calls())[:1]
        with torch.no_grad():
            self.units = execution_order(denoiser, lambda: first(denoiser))
        check_reached(denoiser, self.units)

    def bypass(self, trajectories: Trajectories) -> None:
        """Say how far the first layer reads, if the recipe lets the rest go around the denoiser."""
        if (spec := self.recipe.bypass) is not None and entrance_of(self.denoiser) is not None:
            self.run.step(
                "bypass",
                lambda: measure_bypass(self.denoiser, trajectories, spec, self.batch, self.recipe.seed),
                lambda record: apply_bypass(self.denoiser, record),
            )

    def observe(self, trajectories: Trajectories) -> Record:
        """Ranges and a sample of every operand at every step."""
        trajectories = inside(self.denoiser, trajectories)
        boundaries = clock_of(self.denoiser).boundaries
        # the steps that fill one row share what is kept of them
        shared = max(
            table_rows(boundaries, trajectories.timesteps, classes=self.classes(name)).positions.shape[1]
            for name, _ in quantized_layers(self.denoiser)
        )
        values = max(1, self.recipe.ranges.values // shared)
        return self.run.step(
            "observe",
            lambda: observe(self.denoiser, trajectories, values, self.batch, self.recipe.seed),
            lambda record: record,
        )

    def equalize(self, ranges: Record) -> None:
        """TCR, if the recipe has it."""
        if (spec := self.recipe.tcr) is not None:
            # the first layer reads equally far in every channel
            without = entrance_of(self.denoiser) if bypass_of(self.denoiser) is not None else None
            self.run.step(
                "equalize",
                lambda: equalize(self.denoiser, ranges, spec, without),
                lambda r: apply_vectors(self.denoiser, r),
            )

    def allocate_inputs(self, trajectories: Trajectories, ranges: Record) -> None:
        """Choose a width for the input of each layer, if the recipe lets layers trade; after `equalize`."""
        recipe, denoiser = self.recipe, self.denoiser
        if (spec := recipe.input_allocation) is None:
            return
        names = inputs_of_width(self.plan, recipe.activations)
        seen = inside(denoiser, trajectories)

        def search() -> Record:
            return scale_inputs(denoiser, ranges, recipe.ranges, self.classes)

        def apply(record: Record) -> None:
            bits = dict(zip(record.meta["layers"], record.tensors["bits"].tolist(), strict=True))
            apply_input_widths(denoiser, bits)
            self.plan = with_inputs(self.plan, bits)

        self.run.step(
            "allocate-inputs", lambda: allocate_inputs(denoiser, seen, names, spec, search, recipe.seed), apply
        )

    def scale_weights(self, ranges: Record) -> None:
        """First scales of weights; every weight rounded to the nearest code."""
        denoiser, spec = self.denoiser, self.recipe.ranges
        self.run.step(
            "scale/weights", lambda: scale_weights(denoiser, ranges, spec), lambda r: apply_weight_scales(denoiser, r)
        )

    def group(self, trajectories: Trajectories, ranges: Record) -> None:
        """Learn which steps share a row; all further stages go by that."""
        recipe, denoiser = self.recipe, self.denoiser
        spec = recipe.grouping or Grouping()
        record = self.run.step(
            "group",
            lambda: group(denoiser, trajectories, ranges, recipe.ranges, spec, recipe.seed, recipe.daq),
            lambda record: record,
        )
        self.classes = lambda _: record.tensors["classes"]

    def choose_widths(self, trajectories: Trajectories, ranges: Record) -> None:
        """Choose each step group's width, if the recipe mixes widths."""
        recipe, denoiser = self.recipe, self.denoiser
        if (spec := recipe.mixed) is None:
            return
        process = forward_process(self.pipe)

        def calibrate() -> None:
            self._put_input_scales(scale_inputs(denoiser, ranges, recipe.ranges, self.classes))
            apply_choices(denoiser, select(denoiser, ranges, recipe.daq or Daq(), recipe.ranges, self.classes))

        def apply(record: Record) -> None:
            self.step_bits = tuple(record.tensors["bits"].tolist())
            set_widths(denoiser, record.tensors["bits"])

        self.run.step(
            "widths", lambda: measure_widths(denoiser, trajectories, process, spec, self.batch, calibrate), apply
        )

    def scale_inputs(self, ranges: Record) -> None:
        """First scales of affine operands."""
        denoiser, spec = self.denoiser, self.recipe.ranges
        self.run.step(
            "scale/inputs", lambda: scale_inputs(denoiser, ranges, spec, self.classes), self._put_input_scales
        )

    def stagger(self) -> None:
        """Let step sizes differ from step to step, if the recipe asks for it; nothing is measured, so nothing is recorded."""
        if self.recipe.stagger is not None:
            stagger(self.denoiser, self.recipe.stagger)

    def _put_input_scales(self, record: Record) -> None:
        apply_input_scales(self.denoiser, record)
        for _, bypass in self.run.results("bypass"):
            apply_bypass(self.denoiser, bypass)  # how far the first layer reads is not up to the search

    def select(self, ranges: Record) -> None:
        """Grids and scales of attention probabilities: DAQ where the plan lets it choose."""
        denoiser, recipe = self.denoiser, self.recipe
        self.run.step(
            "select",
            lambda: select(denoiser, ranges, recipe.daq or Daq(), recipe.ranges, self.classes),
            lambda record: apply_choices(denoiser, record),
        )

    def round_weights(self, trajectories: Trajectories) -> None:
        """GPTQ, if the recipe has it: all weights rounded anew, unit by unit in execution order; one record each."""
        if (spec := self.recipe.gptq) is not None:
            by_name, seen = {unit.name: unit for unit in self.units}, inside(self.denoiser, trajectories)
            with Rounder(self.denoiser, self.units, seen, spec, self.recipe.seed, **self.room) as rounder:
                self.run.series(
                    "round", list(by_name), rounder.round, lambda name, record: apply_codes(by_name[name], record)
                )

    def trust(self, round_: int) -> float:
        """How firmly a round of reconstruction holds the roundings that it finds."""
        if round_ and self.recipe.alignment:
            return self.recipe.alignment.trust
        return self.recipe.gptq.trust if self.recipe.gptq else 0.0

    def reconstruct(self, round_: int, trajectories: Trajectories, iterations: int) -> None:
        """Fit every unit in execution order; one record each."""
        spec = self.recipe.reconstruction
        if spec is None:
            raise UsageError(f"the recipe {self.recipe.program!r} has no reconstruction to run")
        by_name = {unit.name: unit for unit in self.units}
        how = Fit(spec, iterations, self.trust(round_), self.recipe.seed + round_, self.settled)
        seen = inside(self.denoiser, trajectories)
        with Reconstructor(self.denoiser, self.units, seen, how, **self.room) as reconstructor:
            self.run.series(
                f"reconstruct/{round_}", list(by_name), reconstructor.fit, lambda name, r: apply_unit(by_name[name], r)
            )

    def reconstruct_time(self, timesteps: Tensor) -> None:
        """Fit the time embedding and all its projections as one unit over some timesteps; later fits leave them alone."""
        spec = self.recipe.reconstruction
        if spec is None:
            raise UsageError(f"the recipe {self.recipe.program!r} has no reconstruction to run")
        unit, clock = time_unit(self.denoiser), clock_of(self.denoiser)
        how = Fit(spec, spec.iterations, self.trust(0), self.recipe.seed)

        def compute() -> Record:
            with precise(unit.module):
                return fit(unit, time_lessons(unit, timesteps), clock, how)

        self.run.step(
            "reconstruct/time",
            compute,
            lambda record: apply_unit(unit, record),
        )
        self.settled |= {layer for _, layer in quantized_layers(unit.module)}
        self.units = [other for other in self.units if other.module not in self.settled]

    def tune(self, trajectories: Trajectories) -> None:
        """Fit the whole denoiser as one unit, from where the rounds left it."""
        if self.recipe.network is None:
            raise UsageError(f"the recipe {self.recipe.program!r} has no fit of the whole denoiser to run")
        spec, whole = self.recipe.network.reconstruction(), Unit("network", self.denoiser)
        how = Fit(spec, spec.iterations, seed=self.recipe.seed)
        seen = inside(self.denoiser, trajectories)
        with Reconstructor(self.denoiser, [whole], seen, how, **self.room) as reconstructor:
            self.run.series("network", [whole.name], reconstructor.fit, lambda _, record: apply_unit(whole, record))

    def correct(self, trajectories: Trajectories) -> None:
        """Let the denoiser take known quantization noise out of its predictions."""
        denoiser, spec = self.denoiser, self.recipe.correction
        if spec is None:
            raise UsageError(f"the recipe {self.recipe.program!r} has no correction to make")

        def apply(record: Record) -> None:
            apply_correction(denoiser, record)
            # DDIMPipeline makes a plain scheduler from any other's config
            if spec.sampler and not isinstance(self.pipe, DDIMPipeline):
                variance = record.tensors["variance"].tolist()
                self.pipe.register_modules(scheduler=noise_aware(self.pipe.scheduler, self.groups.boundaries, variance))

        self.run.step("correct", lambda: correct(denoiser, trajectories, spec, self.batch), apply)

    def temper(self, float_images: Tensor, plain: Tensor, round_: int) -> None:
        """Choose how much of the correction stays: what brings the calibration images closest to the float model's.

        Args: plain: images without correction; round_: number of the first round of collection that is free.
        """
        strengths = self.recipe.correction.strengths if self.recipe.correction else ()
        if not strengths:
            return
        correction = next(record for _, record in self.run.results("correct"))
        errors = [typical_error(plain, float_images)]
        for number, strength in enumerate(strengths):
            apply_correction(self.denoiser, correction, strength)
            errors.append(typical_error(self.collect(round_ + number).images, float_images))
        tried = [0.0, *strengths]
        best = tried[errors.index(min(errors))]
        self.run.step(
            "temper",
            lambda: Record({}, {"strengths": tried, "errors": errors, "kept": best}),
            lambda record: apply_correction(self.denoiser, correction, record.meta["kept"]),
        )

    def restore(self, round_: int) -> None:
        """Go back to the state that an earlier round of reconstruction left."""
        by_name = {unit.name: unit for unit in self.units}
        for name, record in self.run.results(f"reconstruct/{round_}"):
            apply_unit(by_name[name], record)

    def score(self, round_: int, float_images: Tensor, images: Tensor) -> float | None:
        """Record how far the quantized model's calibration images are from the float model's; None without a judge."""
        if self.judge is None:
            return None
        judge = self.judge
        return self.run.step(
            f"score/{round_}", lambda: Record({}, {"fd": judge(float_images, images)}), lambda r: float(r.meta["fd"])
        )
