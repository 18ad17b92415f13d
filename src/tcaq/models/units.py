"""A denoiser's units in execution order, and the plan of its layers, both from the table of architectures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial

from torch import nn

from tcaq.errors import ModelError
from tcaq.layers.insert import list_layers, quantized_layers
from tcaq.layers.modes import Moded
from tcaq.models.adapters import check_plain
from tcaq.models.architectures import architecture
from tcaq.spec.grid import AdaptiveGrid, AffineGrid, ProbabilityGrid, TokenGrid, UnitGrid
from tcaq.spec.plan import Plan, ResolvedPlan, Rule


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


def default_plan(
    denoiser: nn.Module, weights: int, activations: int, per_octave: int | None = 1, *,
    split: bool = False, symmetric: bool = False, products: bool = True, probability_bits: int | None = None,
    tokens: bool = False,
) -> Plan:  # fmt: skip
    """Every layer quantized: the first and last layers and the time embedding at 8 bits, everything else as asked.

    The blocks' projections of the embedding read it at 8 bits; their weights, up to a tenth of a U-Net's, have the bits asked for.

    Args: weights, activations: bits; per_octave: DAQ chooses for attention probabilities between an even grid and a log2 grid
        with so many values to each halving; None: they have an even grid; split: the two halves of concatenated inputs get
        grids of their own; symmetric: zero points in the middle; products: whether attention products are quantized;
        probability_bits: of attention probabilities (None: as activations); tokens: inputs of linear layers have a grid for
        each token, found while it runs.
    """
    row = architecture(denoiser)
    affine = partial(AffineGrid, symmetric=symmetric)
    eight, weight, operand = affine(bits=8), affine(bits=weights), affine(bits=activations)
    chosen = activations if probability_bits is None else probability_bits
    probabilities: ProbabilityGrid = UnitGrid(bits=chosen)
    if per_octave is not None:
        probabilities = AdaptiveGrid(bits=chosen, per_octave=per_octave)
    # a class has variants: not each of them has every layer that its row of the table speaks of
    special = [Rule(match=pattern, weight=eight, input=eight, optional=True) for pattern in (*row.edges, *row.time)]
    special += [Rule(match=pattern, weight=weight, input=eight, optional=True) for pattern in row.projections]
    attention = [
        Rule(match="*", kinds=("scores",), left=operand, right=operand, optional=True),
        Rule(match="*", kinds=("mix",), left=probabilities, right=operand, optional=True),
    ]
    if not products:
        attention = [Rule(match="*", kinds=("scores", "mix"), reason="the method quantizes no products", optional=True)]
    others = [Rule(match="*", kinds=("conv", "linear"), weight=weight, input=operand, split=split, optional=tokens)]
    if tokens:
        each = TokenGrid(bits=activations, symmetric=symmetric)
        others = [Rule(match="*", kinds=("linear",), weight=weight, input=each, optional=True), *others]
    return Plan(rules=(*special, *attention, *others))


def resolve(denoiser: nn.Module, plan: Plan) -> ResolvedPlan:
    """The plan's table over this denoiser. Raises: PlanError listing all that does not fit; ModelError if it has adapters."""
    check_plain(denoiser)
    joints = concatenations(denoiser)
    return plan.resolve([replace(layer, joint=joints.get(layer.name)) for layer in list_layers(denoiser)])


def concatenations(denoiser: nn.Module) -> dict[str, int]:
    """The layers that read two tensors put together, by name, and how many channels the first of them has."""
    row = architecture(denoiser)
    found = {
        name: module.out_features
        for name, module in denoiser.named_modules()
        if isinstance(module, nn.Linear) and any(fnmatchcase(name, pattern) for pattern in row.joints)
    }
    return found | (_shortcuts(denoiser) if row.known else {})


def _shortcuts(denoiser: nn.Module) -> dict[str, int]:
    """The shortcut convolutions on a U-Net's way up, which read the state and a skip connection."""
    found: dict[str, int] = {}
    middle = getattr(denoiser, "mid_block", None)
    hidden = middle.resnets[-1].out_channels if middle is not None else 0
    for i, block in enumerate(getattr(denoiser, "up_blocks", ())):
        for j, resnet in enumerate(block.resnets):
            if 0 < hidden < resnet.in_channels and resnet.conv_shortcut is not None:
                found[f"up_blocks.{i}.resnets.{j}.conv_shortcut"] = hidden
            hidden = resnet.out_channels
    return found


def check_reached(denoiser: nn.Module, units: list[Unit]) -> None:
    """Raises: ModelError naming the quantized layers that no unit of a traced pass holds."""
    reached = {layer for unit in units for _, layer in quantized_layers(unit.module)}
    if idle := [name for name, layer in quantized_layers(denoiser) if layer not in reached]:
        raise ModelError(
            f"{type(denoiser).__name__} never runs {', '.join(idle[:8])}{' and more' if len(idle) > 8 else ''}, so nothing can be "
            "observed there; keep these layers in float by a plan rule with a reason"
        )
