"""Round: decide the codes of weights with error feedback on quantized inputs (GPTQ, Frantar et al., ICLR 2023); no gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tcaq.layers.columns import equalized_input, input_columns
from tcaq.layers.insert import quantized_layers
from tcaq.layers.modes import Mode, running
from tcaq.layers.weighted import QuantizedWeight
from tcaq.models.denoiser import clock_of
from tcaq.models.trajectories import Trajectories
from tcaq.models.units import Unit
from tcaq.numerics.affine import dequantize
from tcaq.numerics.gptq import gptq_codes
from tcaq.records import Record
from tcaq.spec.recipe import Gptq
from tcaq.stages.call import Call, rows_of
from tcaq.stages.precise import precise
from tcaq.stages.unitwise import Unitwise

CHUNK = 2**24
"""Numbers of an unfolded input that are in memory at a time."""


class _SeenError(Exception):
    """Ends a pass once the layer that it was made for has seen its input."""


@dataclass(frozen=True)
class Inputs:
    """What a unit is given in one part of the drawn inputs. Attributes: call: joined over batches; timesteps: [n]."""

    call: Call
    timesteps: Tensor


class Rounder(Unitwise):
    """Rounds units one after another; each on what the units rounded before it put out."""

    def __init__(
        self, denoiser: nn.Module, units: list[Unit], trajectories: Trajectories, spec: Gptq, seed: int, *,
        memory: float, spill: Path | None = None,
    ) -> None:  # fmt: skip
        """Args: seed: of the choice of inputs; memory, spill: see Unitwise."""
        super().__init__(
            denoiser, units, trajectories, inputs=spec.inputs, batch=spec.batch, seed=seed, memory=memory, spill=spill
        )  # fmt: skip
        self.spec = spec

    @torch.no_grad()
    def round(self, name: str) -> Record:
        """Round the weights of one unit, layer by layer in the order of execution, and record their packed codes.

        The meta tells for each layer the error of its products before and after, relative to the mean square of the float weight's:
        `nearest` (as it was) and `gptq`.
        """
        unit = self.units[name]
        names = {layer: name for name, layer in quantized_layers(unit.module) if isinstance(layer, QuantizedWeight)}
        codes: dict[str, Tensor] = {}
        errors: dict[str, dict[str, float]] = {}
        if names:
            shown = [self._inputs(unit, number) for number in range(len(self.replay.parts))]
            with precise(unit.module), running(unit.module, Mode.FAKE):
                for layer, times in self._in_order(unit, shown[0], list(names)).items():
                    hessians = Hessians(layer, self.spec.width)
                    for inputs in shown:
                        self._show(unit, inputs, layer, times, hessians.add)
                    errors[names[layer]] = round_layer(layer, hessians, self.spec.damping)
                    codes[names[layer]] = layer.weight_quantizer.codes.clone()
        return Record(codes, {"unit": name, "errors": errors})

    def _inputs(self, unit: Unit, number: int) -> Inputs:
        return Inputs(
            self.replay.inputs(unit, Mode.FAKE, number).cast(torch.float32), self.replay.parts[number].timestep
        )

    def _in_order(self, unit: Unit, inputs: Inputs, layers: list[QuantizedWeight]) -> dict[QuantizedWeight, int]:
        """The layers in the order in which a pass first reaches them, and how often it does."""
        reached: dict[QuantizedWeight, int] = {}

        def count(layer: QuantizedWeight) -> Callable[[Tensor], None]:
            return lambda _: reached.update({layer: reached.get(layer, 0) + 1})

        with _visiting({layer: count(layer) for layer in layers}):
            self._run(unit, inputs, torch.arange(1))
        return reached

    def _show(
        self, unit: Unit, inputs: Inputs, layer: QuantizedWeight, times: int, visit: Callable[[Tensor], None]
    ) -> None:  # fmt: skip
        """Show all inputs of a layer to `visit`; what follows the layer in the unit is not run."""
        left = 0

        def show(x: Tensor) -> None:
            nonlocal left
            visit(x)
            left -= 1
            if not left:
                raise _SeenError

        with _visiting({layer: show}):
            for rows in torch.arange(len(inputs.timesteps)).split(self.spec.batch):
                left = times
                try:
                    self._run(unit, inputs, rows)
                except _SeenError:
                    continue

    def _run(self, unit: Unit, inputs: Inputs, rows: Tensor) -> None:
        clock_of(self.denoiser).set(inputs.timesteps[rows])
        rows_of(inputs.call, rows)(unit.module)


@contextmanager
def _visiting(visitors: dict[QuantizedWeight, Callable[[Tensor], None]]) -> Iterator[None]:
    """Inside the block layers show their inputs."""

    def hook(layer: nn.Module, args: tuple[Any, ...]) -> None:
        visitors[layer](args[0])  # type: ignore[index]

    handles = [layer.register_forward_pre_hook(hook) for layer in visitors]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Hessians:
    """Sums of x x^T over the quantized inputs x of one layer, for each group of a convolution and each run of `width` columns."""

    def __init__(self, layer: QuantizedWeight, width: int) -> None:
        self.layer = layer
        columns = layer.float_weight()[0].numel()
        self.runs = [slice(start, min(start + width, columns)) for start in range(0, columns, width)]
        sizes = [run.stop - run.start for run in self.runs]
        self.sums = [layer.equalizer.new_zeros(layer.groups, size, size) for size in sizes]

    def add(self, x: Tensor) -> None:
        """Take an input in, a few samples at a time, for an unfolded one is many times its size.

        Args: x: what the layer is given, float [batch, ...].
        """
        growth = self.layer.float_weight()[0, 0].numel()
        for part in equalized_input(self.layer, x).split(max(1, CHUNK // (x[0].numel() * growth))):
            columns = input_columns(self.layer, part).float()
            for run, total in zip(self.runs, self.sums, strict=True):
                own = columns[..., run]
                total.baddbmm_(own.transpose(1, 2), own)


def round_layer(layer: QuantizedWeight, hessians: Hessians, damping: float) -> dict[str, float]:
    """Write GPTQ's codes into a layer, whose scales stay.

    Returns: the errors of its products on the inputs that the Hessians are of, with the codes as they were and as they are; summed
        over runs of columns, where there are several, as if their products did not meet.
    """
    quantizer = layer.weight_quantizer
    weight = layer.equalized_weight().detach().flatten(1).unflatten(0, (layer.groups, -1))
    scale, zero_point = (table.reshape(layer.groups, -1).double() for table in (quantizer.scale, quantizer.zero_point))
    old = quantizer.integers().reshape(weight.shape).double()
    new = torch.empty_like(old)
    errors = {"nearest": 0.0, "gptq": 0.0}
    power = 0.0
    for run, total in zip(hessians.runs, hessians.sums, strict=True):
        for group in range(layer.groups):
            own, hessian = weight[group, :, run].double(), total[group].double()
            rows, zeros = scale[group], zero_point[group]
            new[group, :, run] = gptq_codes(own, hessian, rows, zeros, quantizer.low, quantizer.high, damping=damping)
            power += energy(own, hessian)
            for name, codes in (("nearest", old), ("gptq", new)):
                hat = dequantize(codes[group, :, run], rows[:, None], zeros[:, None])
                errors[name] += energy(own - hat, hessian)
    quantizer.set_integers(new.reshape(quantizer.shape))
    return {name: error / max(power, 1e-30) for name, error in errors.items()}


def energy(weight: Tensor, hessian: Tensor) -> float:
    """Sum of squares of the products of a weight, [out, in], with the inputs of a Hessian, [in, in]."""
    return float(((weight @ hessian) * weight).sum())


def apply_codes(unit: Unit, record: Record) -> None:
    """Write a unit's codes back."""
    for name, layer in quantized_layers(unit.module):
        if isinstance(layer, QuantizedWeight) and name in record.tensors:
            layer.weight_quantizer.codes.copy_(record.tensors[name])
