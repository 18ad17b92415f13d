"""Power-law fits against planted exponents and the `powerlaw` package; what DAQ means by its two grids."""

from __future__ import annotations

import numpy as np
import powerlaw
import pytest
import torch
from torch import Tensor

from tcaq.numerics.affine import fake_quantize
from tcaq.numerics.log2 import fake_quantize_log2
from tcaq.numerics.powerlaw import compare

P_MIN = 1e-3


def planted(name: str, count: int = 3000) -> Tensor:
    """Samples at or above P_MIN from a known law, or probabilities of attention with random logits."""
    generator = np.random.default_rng(0)
    torch.manual_seed(0)
    uniform = generator.random(count)
    samples = {
        "powerlaw": lambda: P_MIN * (1 - uniform) ** (-1 / 1.5),
        "steep powerlaw": lambda: P_MIN * (1 - uniform) ** (-1 / 1.9),  # the package bounds alpha by 3
        "exponential": lambda: P_MIN + generator.exponential(0.05, count),
        "lognormal": lambda: np.exp(generator.normal(-3, 0.5, count)),
        "wide lognormal": lambda: np.exp(generator.normal(-5, 2.0, count)),
        "flat attention": lambda: torch.softmax(0.5 * torch.randn(50, 64), -1).double().flatten().numpy(),
        "sharp attention": lambda: torch.softmax(4.0 * torch.randn(50, 64), -1).double().flatten().numpy(),
    }
    return torch.from_numpy(np.asarray(samples[name]()))


NAMES = [
    "powerlaw", "steep powerlaw", "exponential", "lognormal", "wide lognormal", "flat attention", "sharp attention",
]  # fmt: skip


@pytest.mark.parametrize("alpha", [1.3, 2.0, 3.5])
def test_the_planted_exponent_is_found(alpha: float) -> None:
    uniform = torch.rand(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    fit = compare(P_MIN * (1 - uniform).pow(-1 / (alpha - 1)), P_MIN)
    assert fit.alpha == pytest.approx(alpha, abs=4 * (alpha - 1) / 200_000**0.5)  # four standard errors
    assert fit.ratio > 0
    assert fit.count == 200_000


@pytest.mark.filterwarnings("ignore")  # the package's own optimisers are loud
@pytest.mark.parametrize("name", NAMES)
def test_the_ratio_is_that_of_the_powerlaw_package(name: str) -> None:
    p = planted(name)
    fit = compare(p, P_MIN, "exponential")
    theirs = powerlaw.Fit(p.numpy(), xmin=P_MIN, discrete=False, verbose=False)
    ratio, _ = theirs.distribution_compare("power_law", "exponential", normalized_ratio=True)
    assert fit.alpha == pytest.approx(theirs.power_law.alpha, rel=1e-3)
    assert abs(fit.ratio) > 1  # a clear case, so that a sign means something
    assert np.sign(ratio) == np.sign(fit.ratio)
    assert fit.ratio == pytest.approx(float(ratio), rel=0.02, abs=0.02)


def test_which_law_wins_on_planted_data() -> None:
    assert compare(planted("powerlaw"), P_MIN).ratio > 5
    assert compare(planted("exponential"), P_MIN).ratio < -10
    assert compare(planted("lognormal"), P_MIN, "lognormal").ratio < -10
    assert compare(planted("wide lognormal"), P_MIN, "lognormal").ratio < 0


@pytest.mark.parametrize("alternative", ["exponential", "lognormal"])
def test_the_log_likelihoods_are_those_of_normalised_densities(alternative: str) -> None:
    # R in closed form from densities that scipy integrates to one above p_min
    from scipy import stats

    p = planted("sharp attention")
    p = p[p >= P_MIN]
    values = p.numpy()
    alpha = 1 + len(values) / np.log(values / P_MIN).sum()
    power = stats.pareto(b=alpha - 1, scale=P_MIN).logpdf(values)
    if alternative == "exponential":
        other = stats.expon(loc=P_MIN, scale=(values - P_MIN).mean()).logpdf(values)
    else:
        law = stats.lognorm(s=np.log(values).std(), scale=np.exp(np.log(values).mean()))
        other = law.logpdf(values) - law.logsf(P_MIN)
    difference = power - other
    expected = difference.sum() / (difference.std() * len(values) ** 0.5)
    assert compare(p, P_MIN, alternative).ratio == pytest.approx(expected, rel=1e-9)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "count"), [(torch.zeros(5), 0), (torch.tensor([0.5]), 1), (torch.full((9,), 0.25), 9)]
)
def test_too_little_to_decide_is_undecided(values: Tensor, count: int) -> None:
    fit = compare(values, P_MIN)
    assert fit.ratio == 0.0
    assert fit.count == count


def test_the_order_and_the_values_below_p_min_do_not_matter() -> None:
    p = planted("sharp attention")
    fit = compare(p, P_MIN)
    shuffled = torch.cat([p[torch.randperm(len(p), generator=torch.Generator().manual_seed(0))], torch.zeros(100)])
    other = compare(shuffled.reshape(10, -1), P_MIN)
    assert other.count == fit.count
    assert other.ratio == pytest.approx(fit.ratio, rel=1e-9)


@pytest.mark.parametrize("bits", [3, 4])
def test_powers_of_two_are_for_the_log2_grid_and_a_lattice_for_the_even_one(bits: int) -> None:
    last = 2**bits - 1
    step, one = torch.tensor(1.0 / last), torch.tensor(1.0)

    def errors(p: Tensor) -> tuple[float, float]:
        even = fake_quantize(p, step, torch.tensor(0.0), 0, last)
        return float((even - p).square().sum()), float((fake_quantize_log2(p, one, bits) - p).square().sum())

    even, log2 = errors(2.0 ** -torch.arange(last).float())
    assert log2 == 0.0 < even
    even, log2 = errors(torch.arange(last + 1) * step)
    assert even < 1e-10 < log2
