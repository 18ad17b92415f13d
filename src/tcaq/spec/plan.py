"""The plan: ordered rules that give every layer its grids, or keep it in float with a reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, Self

from pydantic import model_validator

from tcaq.errors import PlanError
from tcaq.spec.base import Spec
from tcaq.spec.grid import AffineGrid, Grid, InputGrid, TokenGrid

LayerKind = Literal["conv", "linear", "scores", "mix"]
"""conv, linear; scores: the product q k^T of an attention; mix: the product p v of its probabilities and values."""


@dataclass(frozen=True)
class LayerInfo:
    """A layer that a plan must decide on: its dotted name in the denoiser, and its kind.

    joint: where its input was put together from two tensors, the channels of the first one; else None;
    fixed: why it cannot be quantized, whatever a plan says; None if it can.
    """

    name: str
    kind: LayerKind
    joint: int | None = None
    fixed: str | None = None


class Rule(Spec):
    """Grids for every layer whose name matches a glob pattern (and whose kind is one of `kinds`, if given).

    `weight` and `input` speak of convolutions and linear layers; `left` and `right` of the operands of an attention
    product (scores: q, k; mix: probabilities, v). A rule without grids keeps its layers in float and must give a
    `reason`. `split` quantizes the two halves of a concatenated input, and their weights, each by itself. A linear
    layer may have a `token` grid for its input.
    """

    match: str
    kinds: tuple[LayerKind, ...] = ()
    weight: AffineGrid | None = None
    input: InputGrid | None = None
    left: Grid | None = None
    right: AffineGrid | None = None
    split: bool = False
    reason: str | None = None
    optional: bool = False

    @model_validator(mode="after")
    def _float_needs_reason(self) -> Self:
        grids = (self.weight, self.input, self.left, self.right)
        if not any(grids) and not self.reason:
            raise ValueError(f"rule {self.match!r} gives no grid: say why its layers stay float in `reason`")
        return self

    @model_validator(mode="after")
    def _weights_have_one_width(self) -> Self:
        if self.weight is not None and self.weight.wider:
            raise ValueError(f"rule {self.match!r}: a weight has one width for all steps; leave out its `wider`")
        return self

    def applies(self, layer: LayerInfo) -> bool:
        """Whether the rule speaks of this layer."""
        return (not self.kinds or layer.kind in self.kinds) and fnmatchcase(layer.name, self.match)


class LayerGrids(Spec):
    """What one layer got: a grid per weight and operand, or none and a reason to stay float.

    split: channels of the first of two halves that are quantized each by itself; None: no halves.
    """

    name: str
    kind: LayerKind
    weight: AffineGrid | None = None
    inputs: tuple[Grid, ...] = ()
    split: int | None = None
    reason: str | None = None

    @property
    def is_float(self) -> bool:
        """Whether the layer keeps its original arithmetic."""
        return self.weight is None and not self.inputs

    @property
    def remark(self) -> str:
        """What a table says beside the grids."""
        return self.reason or (f"split after channel {self.split}" if self.split else "")


class ResolvedPlan(Spec):
    """The table of a plan over one model: a row for every layer, in the model's order."""

    layers: tuple[LayerGrids, ...]


class Plan(Spec):
    """Ordered rules; the first that matches a layer decides."""

    rules: tuple[Rule, ...]

    def resolve(self, layers: Sequence[LayerInfo]) -> ResolvedPlan:
        """Give every layer its grids.

        Raises: PlanError listing every layer no rule matches, every rule that decides no layer, and every rule that
            lacks what its layers need - all at once.
        """
        problems: list[str] = []
        used: set[int] = set()
        rows: list[LayerGrids] = []
        for layer in layers:
            if layer.fixed is not None:
                rows.append(LayerGrids(name=layer.name, kind=layer.kind, reason=layer.fixed))
                continue
            index = next((i for i, rule in enumerate(self.rules) if rule.applies(layer)), None)
            if index is None:
                unmatched = f"no rule matches layer {layer.name!r} ({layer.kind})"
                problems.append(f"{unmatched}; add one, or one that keeps it float")
                continue
            used.add(index)
            try:
                rows.append(_decide(self.rules[index], layer))
            except PlanError as error:
                problems.append(str(error))
        for i, rule in enumerate(self.rules):
            if i not in used and not rule.optional:
                problems.append(_unused(rule, layers))
        if problems:
            raise PlanError("the plan does not fit the model: " + "; ".join(problems))
        return ResolvedPlan(layers=tuple(rows))


def _decide(rule: Rule, layer: LayerInfo) -> LayerGrids:
    if rule.reason and not any((rule.weight, rule.input, rule.left, rule.right)):
        return LayerGrids(name=layer.name, kind=layer.kind, reason=rule.reason)
    product = layer.kind in ("scores", "mix")
    needed = ("left", "right") if product else ("weight", "input")
    missing = " and no ".join(field for field in needed if getattr(rule, field) is None)
    if missing:
        raise PlanError(f"rule {rule.match!r} gives {layer.kind} layer {layer.name!r} no {missing} grid")
    if product:
        left = rule.left
        if isinstance(left, TokenGrid) or (layer.kind == "scores" and not isinstance(left, AffineGrid)):
            raise PlanError(f"rule {rule.match!r}: {layer.name!r} takes an affine grid on its left, not {left}")
        return LayerGrids(name=layer.name, kind=layer.kind, inputs=(left, rule.right))  # type: ignore[arg-type]
    if isinstance(rule.input, TokenGrid) and layer.kind != "linear":
        raise PlanError(
            f"rule {rule.match!r}: {layer.kind} layer {layer.name!r} has no tokens; give it an affine input grid"
        )
    split = layer.joint if rule.split else None
    return LayerGrids(name=layer.name, kind=layer.kind, weight=rule.weight, inputs=(rule.input,), split=split)  # type: ignore[arg-type]


def _unused(rule: Rule, layers: Sequence[LayerInfo]) -> str:
    shadowed = sum(rule.applies(layer) for layer in layers)
    if shadowed:
        return (
            f"rule {rule.match!r} decides nothing: earlier rules decide its {shadowed} layers; move it up or remove it"
        )
    names = ", ".join(layer.name for layer in layers[:4])
    return f"rule {rule.match!r} matches no layer; layers are named like {names}, ..."
