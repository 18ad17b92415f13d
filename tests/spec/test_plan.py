"""Plans: the first rule that matches decides, and whatever does not fit is told at once."""

from __future__ import annotations

import pytest

from tcaq.errors import PlanError, UsageError
from tcaq.spec.grid import AdaptiveGrid, AffineGrid, UnitGrid
from tcaq.spec.plan import LayerGrids, LayerInfo, Plan, Rule

W4, A4, A8 = AffineGrid(bits=4, signed=True, symmetric=True), AffineGrid(bits=4), AffineGrid(bits=8)
DAQ4 = AdaptiveGrid(bits=4)

LAYERS = [
    LayerInfo("conv_in", "conv"),
    LayerInfo("down.0.conv", "conv"),
    LayerInfo("down.0.attn.scores", "scores"),
    LayerInfo("down.0.attn.mix", "mix"),
    LayerInfo("down.0.attn.to_q", "linear"),
    LayerInfo("conv_out", "conv"),
]


def test_the_first_rule_that_matches_decides() -> None:
    plan = Plan(
        rules=(
            Rule(match="conv_out", reason="the image is made here"),
            Rule(match="conv_*", weight=A8, input=A8),
            Rule(match="*", kinds=("scores",), left=A4, right=A8),
            Rule(match="*.mix", left=DAQ4, right=A4),
            Rule(match="*", weight=W4, input=A4, left=A8, right=A8),
        )
    )
    rows = plan.resolve(LAYERS).layers
    assert rows == (
        LayerGrids(name="conv_in", kind="conv", weight=A8, inputs=(A8,)),
        LayerGrids(name="down.0.conv", kind="conv", weight=W4, inputs=(A4,)),
        LayerGrids(name="down.0.attn.scores", kind="scores", inputs=(A4, A8)),
        LayerGrids(name="down.0.attn.mix", kind="mix", inputs=(DAQ4, A4)),
        LayerGrids(name="down.0.attn.to_q", kind="linear", weight=W4, inputs=(A4,)),
        LayerGrids(name="conv_out", kind="conv", reason="the image is made here"),
    )
    assert [row.is_float for row in rows] == [False] * 5 + [True]


def test_one_rule_may_speak_of_layers_and_products() -> None:
    plan = Plan(rules=(Rule(match="*", weight=W4, input=A4, left=A8, right=A4),))
    assert [len(row.inputs) for row in plan.resolve(LAYERS).layers] == [1, 1, 2, 2, 1, 1]


def test_everything_that_does_not_fit_is_told_at_once() -> None:
    plan = Plan(
        rules=(
            Rule(match="nothing.*", weight=W4, input=A4),
            Rule(match="conv_*", weight=A8, input=A8),
            Rule(match="conv_in", weight=W4, input=A4),
            Rule(match="absent", optional=True, weight=W4, input=A4),
            Rule(match="down.0.conv", weight=W4),
            Rule(match="*.scores", left=UnitGrid(bits=4), right=A4),
            Rule(match="*.to_q", left=A4, right=A4),
        )
    )
    with pytest.raises(PlanError) as caught:
        plan.resolve(LAYERS)
    message = str(caught.value)
    for part in (
        "rule 'nothing.*' matches no layer; layers are named like conv_in, down.0.conv,",
        "rule 'conv_in' decides nothing: earlier rules decide its 1 layers",
        "no rule matches layer 'down.0.attn.mix' (mix)",
        "rule 'down.0.conv' gives conv layer 'down.0.conv' no input grid",
        "rule '*.scores': 'down.0.attn.scores' takes an affine grid on its left, not unit4",
        "rule '*.to_q' gives linear layer 'down.0.attn.to_q' no weight and no input grid",
    ):
        assert part in message
    assert "absent" not in message


def test_patterns_are_case_sensitive_globs_over_the_whole_name() -> None:
    rule = Rule(match="down.?.conv", weight=W4, input=A4)
    assert rule.applies(LayerInfo("down.0.conv", "conv"))
    assert not rule.applies(LayerInfo("down.10.conv", "conv"))
    assert not rule.applies(LayerInfo("Down.0.conv", "conv"))
    assert not rule.applies(LayerInfo("x.down.0.conv", "conv"))


def test_float_needs_a_reason() -> None:
    for reason in ({}, {"reason": ""}):
        with pytest.raises(UsageError, match="rule 'conv_in' gives no grid: say why its layers stay float in `reason`"):
            Plan.parse({"rules": [{"match": "conv_in"} | reason]}, where="plan")
    assert Rule(match="conv_in", reason="first layer").reason == "first layer"
