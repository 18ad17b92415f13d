"""Tables of a resolved plan for the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from tcaq.spec.plan import LayerGrids, ResolvedPlan


def plan_table(plan: ResolvedPlan) -> Table:
    """A row for every layer: name, kind, weight grid, input grids, or float and why."""
    table = Table()
    for heading in ("layer", "kind", "weight", "inputs", "remark"):
        table.add_column(heading, overflow="fold")  # a narrow terminal breaks names rather than cut them
    for layer in plan.layers:
        weight = str(layer.weight) if layer.weight else ("" if layer.kind in ("scores", "mix") else "float")
        inputs = ", ".join(map(str, layer.inputs)) or "float"
        table.add_row(layer.name, layer.kind, weight, inputs, layer.remark)
    return table


def plan_summary(layers: Sequence[Mapping[str, Any]]) -> Table:
    """How many layers of each kind got which grids."""
    counts: Counter[tuple[str, str, str]] = Counter()
    for values in layers:
        layer = LayerGrids.parse(values, where="plan")
        inputs = ", ".join(map(str, layer.inputs)) or f"float: {layer.reason}"
        counts[layer.kind, str(layer.weight or ""), inputs] += 1
    table = Table("layers", "kind", "weight", "inputs")
    for (kind, weight, inputs), count in counts.items():
        table.add_row(str(count), kind, weight, inputs)
    return table
