"""Reconstruct: fit each unit's rounding and step sizes to what the float unit puts out (BRECQ, Li et al. 2021; AdaRound)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tcaq.errors import NumericalError
from tcaq.layers.hold import holding_weights
from tcaq.layers.insert import QuantizedLayer, quantized_layers
from tcaq.layers.modes import Mode, running
from tcaq.layers.weighted import QuantizedWeight
from tcaq.models.denoiser import clock_of
from tcaq.models.device import device_of, following
from tcaq.models.trajectories import Trajectories
from tcaq.models.units import Unit
from tcaq.quantizers.affine import AffineQuantizer
from tcaq.quantizers.clock import StepClock
from tcaq.records import Record
from tcaq.spec.recipe import Reconstruction
from tcaq.stages.call import Call
from tcaq.stages.precise import precise
from tcaq.stages.teaching import Lessons, Teaching
from tcaq.stages.unitwise import Unitwise

CORRECTION = "bias_correction"


@dataclass(frozen=True)
class Fit:
    """How a unit is fitted.

    Attributes: iterations: of learning; trust: how firmly earlier roundings are held (0: start from the float weight); seed: of the
        choice of batches; settled: layers inside units that an earlier fit decided, and that stay as they are.
    """

    spec: Reconstruction
    iterations: int
    trust: float = 0.0
    seed: int = 0
    settled: frozenset[nn.Module] = frozenset()

    def layers(self, unit: Unit) -> list[QuantizedLayer]:
        """The layers of a unit that are to be learned."""
        return [layer for _, layer in quantized_layers(unit.module) if layer not in self.settled]


class Reconstructor(Unitwise):
    """Fits units one after another over one set of trajectories; each fit depends on the units fitted before it."""

    def __init__(
        self, denoiser: nn.Module, units: list[Unit], trajectories: Trajectories, how: Fit, *,
        memory: float, spill: Path | None = None,
    ) -> None:  # fmt: skip
        """Args: how: of every unit, and the seed of the choice of inputs; memory, spill: see Unitwise."""
        spec = how.spec
        super().__init__(
            denoiser, units, trajectories, inputs=spec.inputs, batch=spec.batch, seed=how.seed, memory=memory, spill=spill
        )  # fmt: skip
        self.how = how

    def fit(self, name: str) -> Record:
        """Fit one unit, in float32 whatever the model's dtype, and record its codes, scales, and loss before and after."""
        unit = self.units[name]
        lessons = self._lessons(unit)
        with precise(unit.module):
            return fit(unit, lessons, clock_of(self.denoiser), self.how)

    def _lessons(self, unit: Unit) -> Lessons:
        return Lessons(tuple(self._teaching(unit, number) for number in range(len(self.replay.parts))))

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
        learn(unit, lessons, clock, how, generator, initial, rounding=rounding, scales=scales)
    losses.append(measure(unit, lessons, clock, how.spec)[0])
    return Record(unit_state(unit), {"unit": unit.name, "loss_before": losses[0], "loss_after": losses[-1]})


def time_lessons(unit: Unit, timesteps: Tensor) -> Lessons:
    """For a unit that depends on the timestep alone: every timestep there is, the same in both streams."""
    timesteps = timesteps.to(device_of(unit.module))
    call = Call.of((timesteps,), {}, len(timesteps))
    with running(unit.module, Mode.FLOAT), torch.no_grad():
        return Lessons((Teaching(call, call, call(unit.module), timesteps),))


def rows_of(call: Call, rows: Tensor) -> Call:
    """Some rows of a joined call."""
    return call.map(lambda value: value[rows])


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


def learn(
    unit: Unit,
    lessons: Lessons,
    clock: StepClock,
    how: Fit,
    generator: torch.Generator,
    initial: tuple[Tensor, ...],
    *,
    rounding: bool,
    scales: bool,
) -> None:
    """Learn roundings, step sizes, or both together, then fold them into codes and scales; initial: see `divisors`."""
    spec, iterations, layers = how.spec, how.iterations, how.layers(unit)
    rounding = rounding and spec.rounding_rate > 0
    weights = [layer.weight_quantizer for layer in layers if isinstance(layer, QuantizedWeight)] if rounding else []
    count = sum(weight.shape.numel() for weight in weights)
    # without this a warm-up would let the loss alone pull held roundings back to the float weight
    warmup = 0.0 if how.trust else spec.warmup
    groups = begin(layers, spec, how.trust, rounding=rounding, scales=scales)
    if not groups:
        return  # every rate is zero
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    learned = {id(parameter) for group in groups for parameter in group["params"]}
    frozen = [p for p in unit.module.parameters() if p.requires_grad and id(p) not in learned]
    for parameter in frozen:
        parameter.requires_grad_(False)
    masks = following(generator, device_of(unit.module))
    still = not rounding and not (scales and spec.weight_rate)
    with holding_weights(unit.module) if still else nullcontext():
        for iteration in range(iterations):
            number, rows = lessons.draw(spec.batch, generator)
            teaching = lessons.parts[number]
            clock.set(teaching.timesteps[rows])
            loss = batch_loss(unit, teaching, rows, initial[number][rows], spec, masks)
            beta = annealed(iteration, iterations, warmup)
            if weights and beta is not None:
                penalties = [weight.penalty(beta) for weight in weights]
                loss = loss + spec.penalty * torch.stack(penalties).sum() / count
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    for parameter in frozen:
        parameter.requires_grad_(True)
    end(layers)


def batch_loss(
    unit: Unit, teaching: Teaching, rows: Tensor, initial: Tensor, spec: Reconstruction, masks: torch.Generator
) -> Tensor:  # fmt: skip
    """The error of some rows against what it was, `initial`, float [rows, 1 or bands]; inputs in part from the float stream."""
    inputs = rows_of(teaching.inputs, rows).zip(
        rows_of(teaching.float_inputs, rows), lambda q, f: mixed(q, f, spec.drop, masks)
    )
    error = teaching.distance(inputs(unit.module), rows, spec.power, in_bands=spec.balance == "bands")
    return (error / initial).mean()


def begin(
    layers: list[QuantizedLayer], spec: Reconstruction, trust: float, *, rounding: bool, scales: bool
) -> list[dict[str, Any]]:  # fmt: skip
    """Make the variables of the layers and say at which rate each is learned."""
    groups: list[dict[str, Any]] = []
    for layer in layers:
        if rounding and spec.rounding_rate and isinstance(layer, QuantizedWeight):
            alpha = layer.weight_quantizer.begin_learning(layer.equalized_weight().detach(), trust)
            groups.append({"params": alpha, "lr": spec.rounding_rate})
        elif scales and spec.weight_rate and isinstance(layer, QuantizedWeight):
            groups.append({"params": layer.weight_quantizer.begin_scaling(), "lr": spec.weight_rate})
        if scales and spec.bias_rate and isinstance(layer, QuantizedWeight):
            groups.append({"params": layer.learn_bias(), "lr": spec.bias_rate * layer.output_step()})
        for quantizer in layer.operands.values():
            if scales and spec.scale_rate and isinstance(quantizer, AffineQuantizer) and not quantizer.given:
                groups.append({"params": quantizer.begin_learning(), "lr": spec.scale_rate})
    return groups


def end(layers: list[QuantizedLayer]) -> None:
    """Fold what was learned into codes and scales."""
    for layer in layers:
        if isinstance(layer, QuantizedWeight):
            layer.weight_quantizer.end_learning(layer.equalized_weight().detach())
            layer.end_learning()
        for quantizer in layer.operands.values():
            if isinstance(quantizer, AffineQuantizer):
                quantizer.end_learning()


def mixed(quantized: Tensor, float_: Tensor, drop: float, generator: torch.Generator) -> Tensor:
    """Each element from the float stream with probability `drop` (QDrop, Wei et al. 2022)."""
    if drop == 0.0:
        return quantized
    drawn = torch.rand(quantized.shape, generator=generator, device=quantized.device)
    return torch.where(drawn < drop, float_, quantized)


def annealed(iteration: int, total: int, warmup: float, start: float = 20.0, stop: float = 2.0) -> float | None:
    """AdaRound's beta: none during warm-up, then from `start` linearly down to `stop`."""
    begin_at = warmup * total
    if iteration < begin_at:
        return None
    return stop + (start - stop) * (1.0 - (iteration - begin_at) / max(1.0, total - begin_at))


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
