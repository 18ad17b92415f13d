"""AdaRound's parts, and learned roundings against all roundings there are."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from tcaq.numerics.affine import code_range, qparams, quantize
from tcaq.numerics.rounding import hard_codes, initial_alpha, rectified_sigmoid, rounding_penalty, soft_round

GRIDS = list(itertools.product(range(2, 9), (False, True), (False, True)))


def weight_and_grid(bits: int, signed: bool, symmetric: bool) -> tuple[Tensor, Tensor, Tensor, int, int]:
    torch.manual_seed(bits)
    weight = torch.randn(5, 40)
    weight[4] = weight[4].abs()
    scale, zero = qparams(weight.amin(1, keepdim=True), weight.amax(1, keepdim=True), bits, signed, symmetric)
    return weight, scale, zero, *code_range(bits, signed)


@pytest.mark.parametrize(("bits", "signed", "symmetric"), GRIDS)
def test_learning_starts_at_the_weight_itself(bits: int, signed: bool, symmetric: bool) -> None:
    weight, scale, zero, low, high = weight_and_grid(bits, signed, symmetric)
    soft = soft_round(weight, initial_alpha(weight, scale), scale, zero, low, high)
    expected = weight.clamp((low - zero) * scale, (high - zero) * scale)
    torch.testing.assert_close(soft, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("bits", "signed", "symmetric"), GRIDS)
@pytest.mark.parametrize("trust", [0.5, 0.7, 1.0])
def test_trusted_decisions_stand(bits: int, signed: bool, symmetric: bool, trust: float) -> None:
    weight, scale, zero, low, high = weight_and_grid(bits, signed, symmetric)
    up = torch.rand(weight.shape) < 0.5
    alpha = initial_alpha(weight, scale, up, trust)
    assert torch.equal(alpha >= 0, up)
    if trust == 1.0:
        hard = (hard_codes(weight, up, scale, zero, low, high) - zero) * scale
        torch.testing.assert_close(soft_round(weight, alpha, scale, zero, low, high), hard, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("bits", "signed", "symmetric"), GRIDS)
def test_hard_codes_are_the_two_neighbours(bits: int, signed: bool, symmetric: bool) -> None:
    weight, scale, zero, low, high = weight_and_grid(bits, signed, symmetric)
    for decided in (False, True):
        codes = hard_codes(weight, torch.full_like(weight, decided, dtype=torch.bool), scale, zero, low, high)
        assert ((codes >= low) & (codes <= high) & (codes == codes.round())).all()
        inside = (weight >= (low - zero) * scale) & (weight <= (high - zero) * scale)
        assert (((codes - zero) * scale - weight).abs() <= scale * (1 + 1e-4))[inside].all()
    units = weight / scale
    nearest = hard_codes(weight, units - units.floor() > 0.5, scale, zero, low, high)
    ties = units - units.floor() == 0.5
    assert torch.equal(nearest[~ties], quantize(weight, scale, zero, low, high)[~ties])


def test_the_rectified_sigmoid_is_its_formula_and_reaches_both_ends() -> None:
    alpha = torch.linspace(-8, 8, 1001, dtype=torch.float64)
    expected = torch.clamp(1.2 / (1 + torch.exp(-alpha)) - 0.1, 0, 1)
    torch.testing.assert_close(rectified_sigmoid(alpha), expected)
    assert rectified_sigmoid(torch.tensor([-3.0, 0.0, 3.0])).tolist() == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("beta", [2.0, 8.0, 20.0])
def test_the_penalty_is_zero_just_when_every_rounding_is_decided(beta: float) -> None:
    decided = torch.tensor([-3.0, 5.0, -9.0, 3.0])
    assert rounding_penalty(decided, beta) == 0.0
    for undecided in (-2.0, -0.5, 0.0, 0.7, 2.0):
        alpha = torch.cat([decided, torch.tensor([undecided])])
        h = min(max(1.2 / (1 + 2.718281828459045**-undecided) - 0.1, 0.0), 1.0)
        assert float(rounding_penalty(alpha, beta)) == pytest.approx(1 - abs(2 * h - 1) ** beta, rel=1e-4)
        assert rounding_penalty(alpha, beta) > 0


class Problems:
    """Layers of one output and six weights, each with its own 64 inputs; the losses of all are independent."""

    def __init__(self, count: int, correlation: float) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(count, 6, generator=generator)
        mixing = torch.eye(6) + correlation * torch.randn(count, 6, 6, generator=generator)
        inputs = torch.linalg.qr(torch.randn(count, 64, 6, generator=generator))[0]  # orthonormal channels, then mixed
        self.inputs = 8.0 * inputs @ mixing
        self.low, self.high = code_range(3, True)
        self.scale, self.zero = qparams(self.weight.amin(1, True), self.weight.amax(1, True), 3, True, False)

    def loss(self, hat: Tensor) -> Tensor:
        """Mean square of the output's error, [..., problems]."""
        return torch.einsum("pnc,...pc->...pn", self.inputs, hat - self.weight).square().mean(-1)

    def decided(self, up: Tensor) -> Tensor:
        codes = hard_codes(self.weight, up, self.scale, self.zero, self.low, self.high)
        return self.loss((codes - self.zero) * self.scale)

    def nearest(self) -> Tensor:
        codes = quantize(self.weight, self.scale, self.zero, self.low, self.high)
        return self.loss((codes - self.zero) * self.scale)

    def best(self) -> tuple[Tensor, Tensor]:
        """The smallest loss of all 2^6 roundings, and the rounding that has it."""
        every = torch.tensor(list(itertools.product((False, True), repeat=6)))
        losses, which = self.decided(every[:, None, :].expand(-1, len(self.weight), -1)).min(0)
        return losses, every[which]

    def learned(self, alpha: Tensor, warmup: float, iterations: int = 150) -> Tensor:
        """The loss of the roundings that gradient descent with the penalty decides on."""
        alpha.requires_grad_()
        optimizer = torch.optim.Adam([alpha], 0.05)
        # in units of the loss of rounding to nearest: a penalty too weak beside the loss leaves roundings undecided
        unit = self.nearest()
        for step in range(iterations):
            soft = soft_round(self.weight, alpha, self.scale, self.zero, self.low, self.high)
            total = (self.loss(soft) / unit).sum()
            progress = step / iterations
            if progress >= warmup:
                total = total + rounding_penalty(alpha, 20 - 18 * (progress - warmup) / (1 - warmup))
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
        return self.decided(alpha.detach() >= 0)


def test_with_uncorrelated_inputs_learning_finds_the_best_of_all_roundings() -> None:
    problems = Problems(16, correlation=0.0)
    best, _ = problems.best()
    torch.testing.assert_close(problems.nearest(), best, rtol=1e-4, atol=0)
    learned = problems.learned(initial_alpha(problems.weight, problems.scale), warmup=0.2)
    torch.testing.assert_close(learned, best, rtol=1e-4, atol=0)


def test_with_correlated_inputs_learning_comes_close_to_the_best_of_all_roundings() -> None:
    # the penalty is concave, so descent ends in a local minimum: often the best one, and much closer to it on average
    problems = Problems(24, correlation=0.3)
    (best, _), nearest = problems.best(), problems.nearest()
    learned = problems.learned(initial_alpha(problems.weight, problems.scale), warmup=0.2)
    assert (nearest > 1.01 * best).sum() >= 12  # the problems are worth solving
    assert (learned <= 1.0001 * best).sum() >= 14
    assert (learned / best - 1).mean() < 0.3 * (nearest / best - 1).mean()


def test_the_best_of_all_roundings_is_where_learning_stays() -> None:
    problems = Problems(24, correlation=0.3)
    best, up = problems.best()
    alpha = initial_alpha(problems.weight, problems.scale, up, trust=1.0)
    torch.testing.assert_close(problems.learned(alpha, warmup=0.0), best, rtol=1e-4, atol=0)
