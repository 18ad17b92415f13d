"""Reconstruct: fit each unit's rounding and step sizes to what the float unit puts out (BRECQ, Li et al. 2021; AdaRound)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from tcaq.errors import NumericalError
from tcaq.layers.insert import quantized_layers
from tcaq.layers.modes import Mode, running
from tcaq.layers.weighted import QuantizedWeight
from tcaq.models.denoiser import clock_of
from tcaq.models.device import device_of
from tcaq.models.trajectories import Trajectories
from tcaq.models.units import Unit
from tcaq.quantizers.clock import StepClock
from tcaq.records import Record
from tcaq.spec.recipe import Reconstruction
from tcaq.stages.call import Call, rows_of
from tcaq.stages.draw import stretches
from tcaq.stages.learn import Fit, Objective, learn
from tcaq.stages.precise import precise
from tcaq.stages.teaching import Lessons, Teaching
from tcaq.stages.unitwise import Unitwise

CORRECTION = "bias_correction"


class Reconstructor(Unitwise):
    """Fits units one after another over one set of trajectories; each fit depends on the units fitted before it."""

    def __init__(
        self, denoiser: nn.Module, units: list[Unit], trajectories: Trajectories, how: Fit, *,
        memory: float, spill: Path | None = None,
    ) -> None:  # fmt: skip
        """Args: how: of every unit, and the seed of the choice of inputs; memory, spill: see Unitwise."""
        spec, self.stretch = how.spec, min(how.spec.stretch, how.spec.batch)
        super().__init__(
            denoiser, units, trajectories, inputs=spec.inputs, batch=spec.batch, seed=how.seed, memory=memory, spill=spill,
            stretch=self.stretch,
        )  # fmt: skip
        self.how = how

    def fit(self, name: str) -> Record:
        """Fit one unit, in float32 whatever the model's dtype, and record its codes, scales, and loss before and after."""
        unit = self.units[name]
        lessons = self._lessons(unit)
        with precise(unit.module):
            return fit(unit, lessons, clock_of(self.denoiser), self.how)

    def _lessons(self, unit: Unit) -> Lessons:
        teachings = tuple(self._teaching(unit, number) for number in range(len(self.replay.parts)))
        if self.stretch == 1:
            return Lessons(teachings)
        device = device_of(self.denoiser)
        return Lessons(teachings, tuple(stretches(part, self.stretch).to(device) for part in self.replay.parts))

    def _teaching(self, unit: Unit, number: int) -> Teaching:
        timesteps = self.replay.parts[number].timestep.to(device_of(self.denoiser))
        float_inputs = self.replay.inputs(unit, Mode.FLOAT, number).cast(torch.float32)
        inputs = self.replay.inputs(unit, Mode.FAKE, number).cast(torch.float32)
        # texts and embeddings reach both streams unchanged: they are kept once
        inputs = inputs.zip(float_inputs, lambda fake, exact: exact if torch.equal(fake, exact) else fake)
        with precise(unit.module), running(unit.module, Mode.FLOAT), torch.no_grad():
            rows = torch.arange(len(timesteps)).split(self.how.spec.batch)
            parts = [rows_of(float_inputs, part)(unit.module) for part in rows]
        targets = [torch.cat(outputs) for outputs in zip(*parts, strict=True)]
        return Teaching(float_inputs, inputs, targets, timesteps)


def fit(unit: Unit, lessons: Lessons, clock: StepClock, how: Fit) -> Record:
    """Fit a unit and record its codes, scales, and loss before and after."""
    generator = torch.Generator().manual_seed(how.seed)
    joint = how.spec.schedule == "joint"
    losses = []
    for rounding, scales in [(True, True)] if joint else [(True, False), (False, True)]:
        loss, initial = measure(unit, lessons, clock, how.spec)
        losses.append(loss)
        learn(Objective(unit, lessons, clock, initial), how, generator, rounding=rounding, scales=scales)
    losses.append(measure(unit, lessons, clock, how.spec)[0])
    return Record(unit_state(unit), {"unit": unit.name, "loss_before": losses[0], "loss_after": losses[-1]})


def time_lessons(unit: Unit, timesteps: Tensor) -> Lessons:
    """For a unit that depends on the timestep alone: every timestep there is, the same in both streams."""
    timesteps = timesteps.to(device_of(unit.module))
    call = Call.of((timesteps,), {}, len(timesteps))
    with running(unit.module, Mode.FLOAT), torch.no_grad():
        return Lessons((Teaching(call, call, call(unit.module), timesteps),))


def quantized_outputs(
    unit: Unit, lessons: Lessons, clock: StepClock, batch: int
) -> Iterator[tuple[list[Tensor], int, Tensor]]:
    """The unit's outputs as it is now on its quantized inputs, each with the number of its part and its rows, batch by batch."""
    for number, rows in lessons.batches(batch):
        teaching = lessons.parts[number]
        clock.set(teaching.timesteps[rows])
        with torch.no_grad():
            outputs = rows_of(teaching.inputs, rows)(unit.module)
        yield outputs, number, rows


def measure(unit: Unit, lessons: Lessons, clock: StepClock, spec: Reconstruction) -> tuple[float, tuple[Tensor, ...]]:
    """How far the quantized unit is off on all inputs, in one pass.

    Returns: the squared error relative to the mean square of the float output, the mean over outputs; and what each input's loss
        is divided by while the unit learns, see `divisors`.
    Raises: NumericalError if an output is not finite.
    """
    totals = [0.0] * len(lessons.parts[0].targets)
    found = []
    for outputs, number, rows in quantized_outputs(unit, lessons, clock, spec.batch):
        teaching = lessons.parts[number]
        found.append(teaching.distance(outputs, rows, spec.power, in_bands=spec.balance == "bands"))
        for i, (output, target) in enumerate(zip(outputs, teaching.targets, strict=True)):
            totals[i] += float((output - target[rows]).double().square().sum())
    targets = zip(*(part.targets for part in lessons.parts), strict=True)
    powers = [max(sum(float(part.double().square().sum()) for part in parts), 1e-30) for parts in targets]
    loss = sum(total / power for total, power in zip(totals, powers, strict=True)) / len(totals)
    if not math.isfinite(loss):
        raise NumericalError(f"the quantized output of unit {unit.name!r} is not finite")
    return loss, divisors(torch.cat(found), lessons, clock, spec.balance)


def divisors(distances: Tensor, lessons: Lessons, clock: StepClock, balance: str) -> tuple[Tensor, ...]:
    """What each input's loss is divided by: the mean distance of all inputs (`balance` "all") or of those of its step group.

    Args: distances: float [inputs, 1], or [inputs, bands] for `balance` "bands", of all parts in order.
    Returns: the same shape, for each part; never zero.
    """
    lengths = [len(part) for part in lessons.parts]
    if balance == "all":
        return tuple(distances.mean().clamp(min=1e-20).expand(len(distances), 1).split(lengths))
    clock.set(lessons.timesteps)
    group = clock.group
    totals = distances.new_zeros(clock.count, distances.shape[1]).index_add(0, group, distances)
    counts = torch.bincount(group, minlength=clock.count).clamp(min=1)
    means: Tensor = (totals / counts[:, None])[group].clamp(min=1e-20)
    return tuple(means.split(lengths))


def unit_state(unit: Unit) -> dict[str, Tensor]:
    """Every quantizer buffer and correction of a unit, by its name inside the unit."""
    state: dict[str, Tensor] = {}
    for name, layer in quantized_layers(unit.module):
        state |= {f"{name}|{key}": value.clone() for key, value in quantizer_buffers(layer).items()}
        if isinstance(layer, QuantizedWeight) and layer.bias_correction is not None:
            state[f"{name}|{CORRECTION}"] = layer.bias_correction.clone()
    return state


def apply_unit(unit: Unit, record: Record) -> None:
    """Write a fitted unit's state back."""
    for name, layer in quantized_layers(unit.module):
        for key, buffer in quantizer_buffers(layer).items():
            buffer.copy_(record.tensors[f"{name}|{key}"])
        if isinstance(layer, QuantizedWeight):
            correction = record.tensors.get(f"{name}|{CORRECTION}")
            layer.bias_correction = None if correction is None else correction.to(layer.equalizer.device)


def quantizer_buffers(layer: nn.Module) -> dict[str, Tensor]:
    """What a layer's quantizers store, by its name inside the layer."""
    return {key: value for key, value in layer.state_dict().items() if "quantizer." in key}
