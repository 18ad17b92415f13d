"""Give a plan's operands the widths that steps may choose from, and its weights and inputs those that layers chose."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from tcaq.errors import PlanError
from tcaq.spec.grid import AffineGrid, Grid, TokenGrid
from tcaq.spec.plan import LayerGrids, ResolvedPlan
from tcaq.spec.recipe import Mixed


def with_widths(plan: ResolvedPlan, mixed: Mixed | None) -> ResolvedPlan:
    """The plan in which every operand of the narrowest width may have the wider ones as well.

    Operands of other widths keep them at all steps: first and last layers, the time embedding, what a plan file says.

    Raises: PlanError if no operand has that width, or the plan itself names widths that the recipe does not choose from.
    """
    if mixed is not None:
        layers = [layer.model_copy(update={"inputs": _widened(layer, mixed.bits)}) for layer in plan.layers]
        plan = plan.model_copy(update={"layers": tuple(layers)})
    allowed = set() if mixed is None else {mixed.bits}
    found = {widths: layer.name for layer in plan.layers for grid in layer.inputs if (widths := _several(grid))}
    for widths, name in found.items():
        if widths not in allowed:
            raise PlanError(
                f"the plan lets {name!r} have {_words(widths)} bits by step, the recipe chooses from "
                f"{_words(mixed.bits) if mixed else 'no widths'}; leave `wider` out of the plan, and name the widths by --step-bits"
            )
    if mixed is not None and not found:
        raise PlanError(
            f"no operand of the plan has {mixed.bits[0]} bits, the narrowest of {_words(mixed.bits)}, so none can change; "
            "give some operands that width"
        )
    return plan


def weights_of_width(plan: ResolvedPlan, bits: int) -> dict[str, AffineGrid]:
    """The grids of the weights that have a width, by layer. Raises: PlanError if none has it."""
    found = {
        layer.name: layer.weight for layer in plan.layers if layer.weight is not None and layer.weight.bits == bits
    }
    _check_some("weight", found, bits, "--layer-bits (`allocation`)")
    return found


def with_weights(plan: ResolvedPlan, bits: Mapping[str, int]) -> ResolvedPlan:
    """The plan with the weights of some layers at other widths, by layer."""
    layers = [
        layer.model_copy(update={"weight": layer.weight.at(bits[layer.name])})
        if layer.weight is not None and layer.name in bits
        else layer
        for layer in plan.layers
    ]
    return plan.model_copy(update={"layers": tuple(layers)})


def inputs_of_width(plan: ResolvedPlan, bits: int) -> list[str]:
    """The layers with a weight whose input has a width, on an even grid; halves of a split one are left out.

    Raises: PlanError if none has it.
    """
    found = [
        layer.name
        for layer in plan.layers
        if layer.weight is not None and layer.split is None
        and isinstance(layer.inputs[0], AffineGrid) and layer.inputs[0].widths == (bits,)
    ]  # fmt: skip
    _check_some("input", found, bits, "--input-bits (`input_allocation`)")
    return found


def with_inputs(plan: ResolvedPlan, bits: Mapping[str, int]) -> ResolvedPlan:
    """The plan with the inputs of some layers at other widths, by layer."""
    layers = [
        layer.model_copy(update={"inputs": (layer.inputs[0].at(bits[layer.name]),)})
        if layer.name in bits and isinstance(layer.inputs[0], AffineGrid)
        else layer
        for layer in plan.layers
    ]
    return plan.model_copy(update={"layers": tuple(layers)})


def _check_some(what: str, found: Collection[str], bits: int, option: str) -> None:
    if not found:
        raise PlanError(
            f"no {what} of the plan has {bits} bits, so none can trade its width with another; give some layers that width, or "
            f"leave {option} out"
        )


def _widened(layer: LayerGrids, widths: tuple[int, ...]) -> tuple[Grid, ...]:
    return tuple(
        grid.model_copy(update={"wider": widths[1:]})
        if not isinstance(grid, TokenGrid) and not grid.wider and grid.bits == widths[0]
        else grid
        for grid in layer.inputs
    )


def _several(grid: Grid) -> tuple[int, ...]:
    """The widths of a grid that has several."""
    return () if isinstance(grid, TokenGrid) or not grid.wider else grid.widths


def _words(widths: tuple[int, ...]) -> str:
    return " or ".join(map(str, widths))
