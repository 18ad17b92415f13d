"""Learn: what gradient descent does to the roundings, step sizes and biases of one unit (AdaRound, BRECQ, QDrop)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tcaq.layers.hold import holding_weights
from tcaq.layers.insert import QuantizedLayer, quantized_layers
from tcaq.layers.weighted import QuantizedWeight
from tcaq.models.device import device_of, following
from tcaq.models.units import Unit
from tcaq.quantizers.affine import AffineQuantizer
from tcaq.quantizers.clock import StepClock
from tcaq.quantizers.weight import WeightQuantizer
from tcaq.spec.recipe import Reconstruction
from tcaq.stages.call import rows_of
from tcaq.stages.graphs import CudaRecorder, DeviceCosine, RecordedStep
from tcaq.stages.teaching import Lessons, Teaching, joined


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


@dataclass(frozen=True)
class Objective:
    """What a unit learns from, and how it is told how well it does.

    Attributes: initial: what the loss of each input is divided by, float [inputs, 1 or bands] for each part.
    """

    unit: Unit
    lessons: Lessons
    clock: StepClock
    initial: tuple[Tensor, ...]


class Schedule(Protocol):
    """Changes an optimizer's rates from step to step."""

    def step(self) -> None:
        """Move to the rates of the next step."""


def learn(objective: Objective, how: Fit, generator: torch.Generator, *, rounding: bool, scales: bool) -> None:
    """Learn roundings, step sizes, or both together, then fold them into codes and scales."""
    spec, unit, layers = how.spec, objective.unit, how.layers(objective.unit)
    rounding = rounding and spec.rounding_rate > 0
    weights = [layer.weight_quantizer for layer in layers if isinstance(layer, QuantizedWeight)] if rounding else []
    groups = begin(layers, spec, how.trust, rounding=rounding, scales=scales)
    if not groups:
        return  # every rate is zero
    still = not rounding and not (scales and spec.weight_rate)
    with only(unit.module, groups), holding_weights(unit.module) if still else nullcontext():
        descend(objective, how, generator, groups, weights)
    end(layers)


def descend(
    objective: Objective,
    how: Fit,
    generator: torch.Generator,
    groups: list[dict[str, Any]],
    weights: list[WeightQuantizer],
) -> None:
    """Take all steps. Args: groups: the variables, for an optimizer; weights: those whose roundings are learned."""
    spec, device = how.spec, device_of(objective.unit.module)
    masks = following(generator, device)
    optimizer, schedule = optimizing(groups, how.iterations, device)
    count = sum(weight.shape.numel() for weight in weights)

    def step(number: int, penalized: bool, rows: Tensor, beta: float | Tensor) -> None:
        loss = batch_loss(objective, number, rows, spec, masks)
        if penalized:
            penalties = [weight.penalty(beta) for weight in weights]
            loss = loss + spec.penalty * torch.stack(penalties).sum() / count
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    recorded = RecordedStep(step, CudaRecorder(device, masks), device) if device.type == "cuda" else None
    # without this a warm-up would let the loss alone pull held roundings back to the float weight
    warmup = 0.0 if how.trust else spec.warmup
    for iteration in range(how.iterations):
        number, rows = objective.lessons.draw(spec.batch, generator)
        beta = annealed(iteration, how.iterations, warmup) if weights else None
        form = (number, beta is not None)
        if recorded is None:
            step(*form, rows, beta or 0.0)
        else:
            recorded(form, rows, beta or 0.0)
        schedule.step()


def optimizing(
    groups: list[dict[str, Any]], iterations: int, device: torch.device
) -> tuple[torch.optim.Optimizer, Schedule]:
    """Adam whose rates fall along a cosine; on a GPU one whose steps can be recorded."""
    if device.type == "cuda":
        recordable = torch.optim.Adam(groups, capturable=True, fused=True)
        return recordable, DeviceCosine(recordable, iterations, device)
    optimizer = torch.optim.Adam(groups)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)


@contextmanager
def only(module: nn.Module, groups: list[dict[str, Any]]) -> Iterator[None]:
    """Inside the block no parameter of `module` takes gradients but those in `groups`."""
    learned = {id(parameter) for group in groups for parameter in group["params"]}
    frozen = [p for p in module.parameters() if p.requires_grad and id(p) not in learned]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


def batch_loss(
    objective: Objective, number: int, rows: Tensor, spec: Reconstruction, masks: torch.Generator
) -> Tensor:  # fmt: skip
    """The error of some rows of a part against what it was, and of stretches of them; inputs in part from the float stream."""
    teaching: Teaching = objective.lessons.parts[number]
    objective.clock.set(teaching.timesteps[rows])
    inputs = rows_of(teaching.inputs, rows).zip(
        rows_of(teaching.float_inputs, rows), lambda q, f: mixed(q, f, spec.drop, masks)
    )
    outputs, initial = inputs(objective.unit.module), objective.initial[number][rows]

    def relative(stretch: int) -> Tensor:
        error = teaching.distance(outputs, rows, spec.power, in_bands=spec.balance == "bands", stretch=stretch)
        return (error / joined(initial, stretch)).mean()

    length = objective.lessons.stretch
    return relative(1) if length == 1 else torch.lerp(relative(1), relative(length), spec.together)


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
