"""What `tcaq` knows of each denoiser class, as data: its units, and the layers that low bits hurt most."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from tcaq.layers.insert import list_layers
from tcaq.layers.modes import Moded
from tcaq.spec.grid import AdaptiveGrid, AffineGrid, ProbabilityGrid, UnitGrid
from tcaq.spec.plan import Plan, ResolvedPlan, Rule


@dataclass(frozen=True)
class Architecture:
    """One denoiser class.

    Attributes: units: class names of the blocks that reconstruction fits at once; edges: name patterns of the first and last
        layers; time: of the time embedding's layers; projections: of the layers that bring the embedding into each block.
    """

    units: tuple[str, ...] = ()
    edges: tuple[str, ...] = ()
    time: tuple[str, ...] = ()
    projections: tuple[str, ...] = ()


ARCHITECTURES = {
    "UNet2DModel": Architecture(
        units=("ResnetBlock2D", "Attention"),
        edges=("conv_in", "conv_out"),
        time=("time_embedding.*",),
        projections=("*.time_emb_proj",),
    ),
}
UNKNOWN = Architecture()


def architecture(denoiser: nn.Module) -> Architecture:
    """The table's row for a denoiser; an unknown class has every layer as a unit of its own and no special layers."""
    return ARCHITECTURES.get(type(denoiser).__name__, UNKNOWN)


@dataclass(frozen=True)
class Unit:
    """What reconstruction fits at once: a submodule of the denoiser with quantized layers inside."""

    name: str
    module: nn.Module


def execution_order(denoiser: nn.Module, run: Callable[[], object]) -> list[Unit]:
    """The units in the order in which one forward pass first reaches them.

    Args: run: performs one forward pass. Modules are walked by name only to find the candidates; the order is traced.
    """
    blocks = set(architecture(denoiser).units)
    candidates = [(n, m) for n, m in denoiser.named_modules() if type(m).__name__ in blocks or isinstance(m, Moded)]
    inner = {id(part) for _, m in candidates if not isinstance(m, Moded) for part in m.modules() if part is not m}
    outer = [Unit(n, m) for n, m in candidates if id(m) not in inner and any(isinstance(p, Moded) for p in m.modules())]
    order: list[Unit] = []

    def reach(unit: Unit) -> Callable[..., None]:
        return lambda *_: order.append(unit) if unit not in order else None

    handles = [unit.module.register_forward_pre_hook(reach(unit)) for unit in outer]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return order


def default_plan(denoiser: nn.Module, weights: int, activations: int, per_octave: int | None = 1) -> Plan:
    """Every layer quantized: the first and last layers and the time embedding at 8 bits, everything else as asked.

    The blocks' projections of the embedding read it at 8 bits; their weights, up to a tenth of a U-Net's, have the bits asked for.

    Args: weights, activations: bits; per_octave: DAQ chooses for attention probabilities between an even grid and a log2 grid
        with so many values to each halving; None: they have an even grid.
    """
    row = architecture(denoiser)
    eight = AffineGrid(bits=8)
    probabilities: ProbabilityGrid = UnitGrid(bits=activations)
    if per_octave is not None:
        probabilities = AdaptiveGrid(bits=activations, per_octave=per_octave)
    special = [Rule(match=pattern, weight=eight, input=eight) for pattern in (*row.edges, *row.time)]
    special += [Rule(match=pattern, weight=AffineGrid(bits=weights), input=eight) for pattern in row.projections]
    operand = AffineGrid(bits=activations)
    return Plan(
        rules=(
            *special,
            Rule(match="*", kinds=("scores",), left=operand, right=operand, optional=True),
            Rule(match="*", kinds=("mix",), left=probabilities, right=operand, optional=True),
            Rule(match="*", kinds=("conv", "linear"), weight=AffineGrid(bits=weights), input=operand),
        )
    )


def resolve(denoiser: nn.Module, plan: Plan) -> ResolvedPlan:
    """The plan's table over this denoiser. Raises: PlanError listing everything that does not fit."""
    return plan.resolve(list_layers(denoiser))
