"""How much of each operand do its bits keep? Signal-to-noise of 4-bit grids over the operands of the bundled float model.

    python benchmarks/operands.py

Prints means over operands in decibels, at an early and at a late step: range search against the best scale and zero point found
by brute force, TCR vectors against one scale per channel, and the grids of attention probabilities. Calibration seed 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tcaq.layers.insert import channel_axis, insert, quantized_layers
from tcaq.layers.weighted import QuantizedWeight
from tcaq.models.denoiser import attach_clock
from tcaq.models.sampler import Trajectories, record
from tcaq.models.seeds import image_seeds
from tcaq.numerics.affine import fake_quantize
from tcaq.numerics.log2 import fake_quantize_log2
from tcaq.numerics.ranges import search_range
from tcaq.recipes.quantize import resolved_plan
from tcaq.reference import load_pipeline
from tcaq.spec.recipe import Recipe
from tcaq.spec.steps import StepGroups
from tcaq.stages.operands import draw_rows, visiting

BITS, LAST, STEPS, IMAGES = 4, 15, 10, 4


def decibels(x: Tensor, hat: Tensor) -> float:
    """Signal over noise."""
    return float(10 * torch.log10(x.square().mean() / (x - hat).square().mean()))


def searched(rows: Tensor, power: float = 2.4) -> Tensor:
    """Rows [R, N] on the grids that range search finds, one a row."""
    scale, zero = search_range(rows, BITS, signed=False, symmetric=False, power=power, candidates=80)
    return fake_quantize(rows, scale[:, None], zero[:, None], 0, LAST)


def brute_force(x: Tensor) -> float:
    """Decibels of the best of 40 scales and all zero points."""
    reach = (x.max() - x.min()) / LAST
    pairs = (
        (reach * factor, torch.tensor(float(zero))) for factor in torch.linspace(0.25, 1, 40) for zero in range(16)
    )
    return max(decibels(x, fake_quantize(x, scale, zero, 0, LAST)) for scale, zero in pairs)


def whole(rows: Tensor, vector: Tensor) -> Tensor:
    """Rows [n, C] divided by a TCR vector [C], on one grid."""
    return searched((rows / vector).reshape(1, -1), 2.0).reshape(rows.shape) * vector


def probability_row(p: Tensor) -> dict[str, float]:
    """Decibels of an attention's probabilities [n] on each grid."""
    peak = p.max()
    grids = {f"log2, {n} to each halving": decibels(p, fake_quantize_log2(p, peak, BITS, n)) for n in (1, 2, 4)}
    return {"even": decibels(p, searched(p[None])[0])} | grids


def input_row(rows: Tensor) -> dict[str, float]:
    """Decibels of an operand [n, C] on each kind of grid."""
    reach = rows.abs().amax(dim=0).clamp(min=1e-6)
    flat = rows.flatten()
    return {
        "search, power 2.4": decibels(flat, searched(flat[None])[0]),
        "search, power 2": decibels(flat, searched(flat[None], 2.0)[0]),
        "brute force": brute_force(flat),
        "divided by the square root of the channel's reach": decibels(rows, whole(rows, reach.sqrt())),
        "divided by the channel's reach": decibels(rows, whole(rows, reach)),
        "a scale and zero point a channel": decibels(rows.T, searched(rows.T.contiguous(), 2.0)),
    }


def operands(denoiser: nn.Module, trajectories: Trajectories, step: int) -> dict[tuple[str, str], Tensor]:
    """A sample of every 4-bit operand at one step, float [n, channels]."""
    layers = dict(quantized_layers(denoiser))
    generator = torch.Generator().manual_seed(step)
    found: dict[tuple[str, str], Tensor] = {}

    def visit(name: str, operand: str, value: Tensor) -> None:
        if layers[name].operands[operand].grid.bits == BITS:
            places = value.movedim(channel_axis(layers[name]), -1)
            found[name, operand] = draw_rows(places, max(1, 8192 // places.shape[-1]), generator)

    with visiting(denoiser, visit):
        denoiser(trajectories.samples[step], trajectories.timesteps[step])
    return found


def show(title: str, tensors: list[Tensor], row: Callable[[Tensor], dict[str, float]]) -> None:
    """Print mean and extremes of each column over tensors."""
    table = [row(x) for x in tensors]
    print(title)
    for name in table[0]:
        values = [entry[name] for entry in table]
        print(f"  {name:52s} mean {sum(values) / len(values):6.2f}  from {min(values):6.2f} to {max(values):6.2f} dB")


def main() -> None:
    """Print the tables."""
    pipe = load_pipeline()
    _, trajectories = record(pipe, image_seeds("calibration", 0, 0, IMAGES), STEPS)
    clock = attach_clock(pipe.unet, StepGroups.of("per-step", trajectories.timesteps.tolist()))
    insert(pipe.unet, resolved_plan(pipe.unet, Recipe()), clock)
    weighted = {name for name, layer in quantized_layers(pipe.unet) if isinstance(layer, QuantizedWeight)}
    for step in (2, STEPS - 2):
        found = operands(pipe.unet, trajectories, step)
        at = f"t = {int(trajectories.timesteps[step])}"
        show(f"inputs of layers, {at}", [x for (n, _), x in found.items() if n in weighted], input_row)
        mixes = [x.flatten() for (n, o), x in found.items() if n.endswith(".mix") and o == "left"]
        show(f"attention probabilities, {at}", mixes, probability_row)


if __name__ == "__main__":
    main()
