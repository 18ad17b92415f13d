"""Per-token grids against a loop in float64."""

from __future__ import annotations

import pytest
import torch

from tcaq.errors import PlanError
from tcaq.layers.linear import QuantizedLinear
from tcaq.layers.modes import Mode
from tcaq.quantizers.clock import StepClock
from tcaq.quantizers.token import TokenQuantizer
from tcaq.spec.grid import AffineGrid, TokenGrid
from tcaq.spec.plan import LayerGrids, LayerInfo, Plan, Rule
from tcaq.spec.steps import StepGroups


def naive(row: list[float], gain: list[float], bits: int) -> list[float]:
    """One token: the range of x / r widened to hold zero, evenly divided; rounding ties to even, as Python does."""
    seen = [x / r for x, r in zip(row, gain, strict=True)]
    low, high, last = min(0.0, *seen), max(0.0, *seen), 2**bits - 1
    scale = (high - low) / last
    zero = round(-low / scale)
    codes = [min(max(round(x / scale) + zero, 0), last) for x in seen]
    return [(code - zero) * scale * r for code, r in zip(codes, gain, strict=True)]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("equalized", [False, True])
def test_each_token_has_the_grid_of_its_own_range(bits, equalized):
    generator = torch.Generator().manual_seed(bits)
    x = torch.randn(2, 5, 9, generator=generator) * torch.tensor([0.01, 1.0, 30.0, 2.0, 5.0]).reshape(5, 1) + 0.3
    gain = 1 + torch.rand(9, generator=generator) if equalized else torch.ones(9)
    actual = TokenQuantizer(TokenGrid(bits=bits))(x, gain.reshape(1, 1, -1))
    for batch in range(2):
        for token in range(5):
            expected = naive(x[batch, token].double().tolist(), gain.double().tolist(), bits)
            step = (x[batch, token] / gain).abs().max() * gain.max() * 2 / (2**bits - 1)
            error = (actual[batch, token].double() - torch.tensor(expected)).abs()
            # float32 may put a value that is nearly between two codes on the other one
            assert int((error > 1e-3 * step).sum()) <= 1
            assert float(error.max()) <= 1.01 * float(step)


def test_the_grid_of_a_token_does_not_depend_on_its_neighbours():
    x = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))
    quantizer = TokenQuantizer(TokenGrid(bits=4))
    assert torch.equal(quantizer(x)[1:2, 2:3], quantizer(x[1:2, 2:3]))
    assert torch.equal(quantizer(quantizer(x)), quantizer(x)) or torch.allclose(
        quantizer(quantizer(x)), quantizer(x), atol=1e-5
    )
    assert quantizer.state_dict() == {}


def test_gradients_pass_straight_through():
    x = torch.randn(2, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    TokenQuantizer(TokenGrid(bits=4))(x).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_a_linear_layer_multiplies_what_it_gives():
    torch.manual_seed(0)
    plain = torch.nn.Linear(6, 3)
    grids = LayerGrids(name="layer", kind="linear", weight=AffineGrid(bits=8), inputs=(TokenGrid(bits=4),))
    layer = QuantizedLinear.wrap(plain, grids, StepClock(StepGroups()))
    layer.weight_quantizer.set_rows(torch.full((3,), 0.01), torch.full((3,), 128.0), plain.weight.detach())
    x = torch.randn(2, 4, 6)
    hat = torch.tensor([[naive(row, [1.0] * 6, 4) for row in image] for image in x.double().tolist()])
    layer.mode = Mode.FAKE
    with torch.no_grad():
        expected = hat.float() @ layer.quantized_weight(torch.float32).T + plain.bias
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_only_linear_layers_have_tokens():
    rules = (Rule(match="*", weight=AffineGrid(bits=4), input=TokenGrid(bits=4)),)
    with pytest.raises(PlanError, match="conv layer 'conv' has no tokens"):
        Plan(rules=rules).resolve([LayerInfo("conv", "conv"), LayerInfo("linear", "linear")])
    (row,) = Plan(rules=rules).resolve([LayerInfo("linear", "linear")]).layers
    assert str(row.inputs[0]) == "token4"
    again = Plan.parse(
        {"rules": [{"match": "*", "weight": {"bits": 4}, "input": {"code": "token", "bits": 4}}]}, where="plan"
    )
    assert again.rules == rules
    product = (Rule(match="*", left=TokenGrid(bits=4), right=AffineGrid(bits=4)),)
    with pytest.raises(PlanError, match="affine grid on its left, not token4"):
        Plan(rules=product).resolve([LayerInfo("a.mix", "mix")])
