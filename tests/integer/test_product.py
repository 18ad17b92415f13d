"""Products of two activations in integers against the fake ones, element by element, and the kernels under them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tcaq.integer import cpu, product, trial
from tcaq.integer.backend import Backend
from tcaq.integer.native.avx2_kernels import AVX2
from tcaq.integer.native.kernels import COMPILED
from tcaq.integer.product import IntegerProduct
from tcaq.layers.product import QuantizedProduct
from tcaq.quantizers.clock import StepClock
from tcaq.quantizers.mixed import set_widths
from tcaq.spec.grid import AdaptiveGrid, AffineGrid, UnitGrid
from tcaq.spec.plan import LayerGrids
from tcaq.spec.steps import StepGroups

TIMES = {"one group": torch.tensor([900]), "mixed": torch.tensor([10, 900, 20])}
BACKENDS = [backend for backend in (cpu.CPU, COMPILED, AVX2) if not backend.missing()]
WHEN = pytest.mark.parametrize("when", TIMES.values(), ids=TIMES.keys())
GRIDS = [
    AffineGrid(bits=4),
    AffineGrid(bits=7),
    AffineGrid(bits=8),
    AffineGrid(bits=8, signed=True),
    AffineGrid(bits=3, wider=(8,)),
]
ZEROS = {"inside": (0.3, 0.6), "at the ends": (0.0, 1.0)}


def products(kind: str, left: AffineGrid | UnitGrid | AdaptiveGrid, right: AffineGrid) -> QuantizedProduct:
    """Two step groups, whose operands have different scales."""
    grids = LayerGrids(name="layer", kind=kind, inputs=(left, right))
    layer = QuantizedProduct(grids, StepClock(StepGroups(boundaries=(500.0,))))
    set_widths(layer, torch.tensor([8, 3]))
    return layer


def spread(quantizer, zeros: tuple[float, float]) -> None:
    """Scales for values between about -3 and 3, zero points so far from the lowest code."""
    low, high = (torch.as_tensor(end).expand(2) for end in quantizer.limits)
    quantizer.set_rows(torch.tensor([4.1, 5.7]) / (high - low), low + (torch.tensor(zeros) * (high - low)).round())


def lowered(layer: QuantizedProduct, backend: Backend = cpu.CPU) -> IntegerProduct:
    return IntegerProduct(layer, backend)


@torch.no_grad()
def check(layer: QuantizedProduct, left: Tensor, right: Tensor, when: Tensor, scale: float) -> None:
    layer.operands["left"].clock.set(when)
    fake = layer(left, right, scale=scale)
    hats = (quantizer(x).double().abs() for quantizer, x in zip(layer.operands.values(), (left, right), strict=True))
    bound = 1e-6 * (torch.matmul(*hats) * scale + 1)
    for backend in BACKENDS:
        found = lowered(layer, backend)(left, right, scale=scale)
        assert (found.shape, found.dtype) == (fake.shape, fake.dtype)
        assert ((found.double() - fake.double()).abs() <= bound).all()


def tokens(*shape: int, heads: int = 2) -> Tensor:
    """[batch, heads, tokens, dim] as attention cuts it from [batch, tokens, heads * dim]."""
    batch, count, dim = shape
    return torch.randn(batch, count, heads * dim).reshape(batch, count, heads, dim).transpose(1, 2)


@WHEN
@pytest.mark.parametrize("zeros", ZEROS.values(), ids=ZEROS.keys())
@pytest.mark.parametrize("right", GRIDS, ids=str)
@pytest.mark.parametrize("left", GRIDS, ids=str)
def test_scores_equal_the_fake_ones(
    left: AffineGrid, right: AffineGrid, zeros: tuple[float, float], when: Tensor
) -> None:
    torch.manual_seed(0)
    layer = products("scores", left, right)
    spread(layer.left_quantizer, zeros)
    spread(layer.right_quantizer, zeros[::-1])
    check(layer, tokens(3, 10, 12), tokens(3, 7, 12).transpose(-1, -2), when, 0.3)


@WHEN
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("right", GRIDS, ids=str)
@pytest.mark.parametrize("bits", [{"bits": 4}, {"bits": 8}, {"bits": 3, "wider": (8,)}], ids=str)
def test_probabilities_times_values_equal_the_fake_ones(
    bits: dict, right: AffineGrid, heads: int, when: Tensor
) -> None:
    torch.manual_seed(0)
    layer = products("mix", UnitGrid(**bits), right)
    layer.left_quantizer.set_rows(
        torch.tensor([0.6, 0.9]) / (2**4 - 1), torch.ones(2), torch.zeros(2, dtype=torch.bool)
    )
    spread(layer.right_quantizer, (0.4, 0.6))
    probabilities = torch.softmax(2 * torch.randn(3, heads, 10, 7), dim=-1)
    check(layer, probabilities, tokens(3, 7, 12, heads=heads), when, 1.0)


@WHEN
@pytest.mark.parametrize("size", [6, 160])  # of 160, oneDNN multiplies the floats
def test_where_a_group_has_a_log2_grid_it_is_float_as_before(size: int, when: Tensor) -> None:
    torch.manual_seed(0)
    layer = products("mix", AdaptiveGrid(bits=4), AffineGrid(bits=8))
    layer.left_quantizer.set_rows(torch.full((2,), 0.05), torch.tensor([1.0, 0.7]), torch.tensor([False, True]))
    spread(layer.right_quantizer, (0.4, 0.6))
    assert product.uneven_groups(layer) == [1]
    check(layer, torch.softmax(torch.randn(3, 2, size, size), dim=-1), tokens(3, size, size), when, 0.5)


def test_even_groups_of_such_a_product_are_in_integers() -> None:
    layer = products("mix", AdaptiveGrid(bits=4), AffineGrid(bits=8))
    layer.left_quantizer.set_rows(torch.full((2,), 0.05), torch.ones(2), torch.tensor([False, True]))
    met = []
    counting = replace(cpu.CPU, product=lambda *given: met.append(given) or cpu.product(*given))
    integer = lowered(layer, counting)
    for when, count in ((10.0, 1), (900.0, 1)):
        layer.left_quantizer.clock.set(when)
        integer(torch.rand(1, 1, 4, 5), torch.randn(1, 1, 5, 6))
        assert len(met) == count


def test_sums_that_may_not_fit_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = products("scores", AffineGrid(bits=8), AffineGrid(bits=8))
    integer = lowered(layer, replace(cpu.CPU, product=None))
    monkeypatch.setattr(product, "LONGEST", 11)
    left, right = tokens(3, 10, 12), tokens(3, 7, 12).transpose(-1, -2)
    assert torch.equal(integer(left, right), layer(left, right))


def test_most_terms_fit_and_no_more() -> None:
    assert product.LONGEST * 255**2 < 2**31 <= (product.LONGEST + 1) * 255**2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_keeps_its_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = products("scores", AffineGrid(bits=8), AffineGrid(bits=8))
    spread(layer.left_quantizer, (0.4, 0.6))
    spread(layer.right_quantizer, (0.5, 0.3))
    left, right = tokens(3, 10, 12).to(dtype), tokens(3, 7, 12).transpose(-1, -2).to(dtype)
    fake, found = layer(left, right, scale=0.3), lowered(layer)(left, right, scale=0.3)
    assert found.dtype == dtype
    torch.testing.assert_close(found, fake, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(2, 5, 9, 3), (3, 33, 40, 24)], ids=str)
def test_the_kernel_adds_and_scales_whole_numbers(shape: tuple[int, int, int, int], transposed: bool) -> None:
    torch.manual_seed(0)
    n, rows, inner, columns = shape
    left, right = trial.extremes((n, rows, inner), -128, 127), trial.extremes((n, columns, inner), -128, 127)
    right = right.mT if transposed else right.mT.contiguous()
    row, column = torch.randint(-(10**6), 10**6, (n, rows, 1)), torch.randint(-(10**6), 10**6, (n, 1, columns))
    for backend in BACKENDS:
        found = backend.product(left.to(torch.int8), right.to(torch.int8), row.int(), column.int(), 0.25)
        assert torch.equal(found.double(), 0.25 * (left.double() @ right.double() + row + column))


def test_the_trial_of_a_product_finds_clipped_sums_and_refusals() -> None:
    assert cpu.product_problem() is None
    clipped = trial.try_product(lambda a, b, *_: (a.float() @ b.float()).clamp(max=2.0**19))
    assert clipped == "this processor does not multiply signed bytes exactly"

    def refuse(*_: object) -> Tensor:
        raise RuntimeError("could not create a primitive")

    assert "refused: could not create a primitive" in trial.try_product(refuse)


@pytest.mark.parametrize("size", [8, 160])
@pytest.mark.parametrize("known", [True, False])
def test_products_of_floats(size: int, known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(cpu, "_has_linear", lambda: known)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512" if known else "AVX2")
    left, right = torch.randn(3, size, size + 1), torch.randn(3, size + 2, size + 1).mT
    torch.testing.assert_close(
        cpu.float_product(left, right).double(), left.double() @ right.double(), rtol=1e-5, atol=1e-4
    )


def test_onednn_multiplies_matrices_without_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of several heads have gaps, for which it has slow loops."""
    seen: list[Tensor] = []

    def product(left: Tensor, right: Tensor, *_: object) -> Tensor:
        seen.extend((left, right))
        return left @ right.mT

    monkeypatch.setattr(cpu, "_has_linear", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", product, raising=False)
    heads = torch.randn(256, 2, 48).transpose(0, 1)
    left = torch.rand(256, 2, 256).transpose(0, 1)
    torch.testing.assert_close(cpu.float_product(left, heads), left @ heads)
    assert len(seen) == 4
    assert all(matrix.is_contiguous() or matrix.mT.is_contiguous() for matrix in seen)


@pytest.mark.parametrize("inner", [1, 64, cpu.EXACT, cpu.EXACT + 1, 3 * cpu.EXACT])
def test_floats_add_up_products_of_bytes_without_rounding(inner: int) -> None:
    left, right = (trial.extremes(shape, -128, 127).to(torch.int8) for shape in ((2, 5, inner), (2, inner, 7)))
    left[1, 0], right[1, :, 0] = -128, -128  # the largest sum there is
    sums = cpu.sums_by_floats(left, right)
    assert sums.dtype == torch.int32
    assert torch.equal(sums.long(), left.long() @ right.long())
    assert int(sums[1, 0, 0]) == 2**14 * inner


@pytest.mark.parametrize("faster", [True, False])
def test_what_is_faster_changes_no_bit(faster: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.randint(-128, 128, shape, generator=generator).to(torch.int8) for shape in ((3, 40, 90), (3, 90, 30))
    )
    row, column = torch.arange(120).int().reshape(3, 40, 1), torch.arange(90).int().reshape(3, 1, 30)
    monkeypatch.setattr(cpu, "floats_are_faster", lambda: faster)
    sums = left.long() @ right.long()
    for backend in BACKENDS:
        assert torch.equal(backend.product(left, right, row, column, 0.37), (sums + row + column).float() * 0.37)
        assert torch.equal(backend.product(left, right, None, None, 0.37), sums.float() * 0.37)


@WHEN
@pytest.mark.parametrize(
    "grid", [UnitGrid(bits=4), UnitGrid(bits=8), AdaptiveGrid(bits=4), AdaptiveGrid(bits=3, wider=(8,))]
)
def test_a_softmax_in_one_with_its_product_is_both(grid, when: Tensor) -> None:
    layer = products("mix", grid, AffineGrid(bits=8))
    spread(layer.right_quantizer, ZEROS["inside"])
    left = layer.left_quantizer
    left.set_rows(torch.tensor([0.9, 0.5]) / left.last, torch.tensor([0.8, 0.4]), torch.tensor([True, grid.bits == 4]))
    scores, right = 3 * torch.randn(3, 2, 20, 30), torch.randn(3, 2, 30, 12)
    left.clock.set(when)
    for backend in BACKENDS:
        own = lowered(layer, backend)
        with torch.no_grad():
            found, expected = own.of_softmax(scores.clone(), right), own(torch.softmax(scores, dim=-1), right)
        if len(when) > 1 or (grid.wider and not isinstance(grid, UnitGrid) and bool(left.use_log2[1])):
            assert found is None
            continue
        # a code on an edge may fall to either side
        assert found is not None
        close = (found - expected).abs() < 1e-5 * (1 + expected.abs())
        assert close.double().mean() > 0.98
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.1)
