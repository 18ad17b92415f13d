from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from tcaq.errors import UsageError
from tcaq.evaluate.metrics import CEILING, Moments, frechet_distance, kernel_distance, psnr, sqnr_per_step, ssim


def gaussian(seed: int, width: int = 6) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    root = torch.randn(width, width, generator=draw, dtype=torch.float64)
    return torch.randn(width, generator=draw, dtype=torch.float64), root @ root.T


@pytest.mark.parametrize("parts", [(10,), (1, 9), (4, 0, 6)])
def test_moments_are_those_of_numpy_however_they_are_gathered(parts: tuple[int, ...]) -> None:
    features = torch.randn(10, 4, generator=torch.Generator().manual_seed(1)) * 3 + 5
    moments = Moments.empty(4)
    for part in features.split(list(parts)):
        moments = moments.merge(Moments.of(part))
    values = features.double().numpy()
    np.testing.assert_allclose(moments.mean.numpy(), values.mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.covariance.numpy(), np.cov(values.T), rtol=1e-10)


def test_moments_of_too_little_say_how_many_are_needed() -> None:
    with pytest.raises(UsageError, match="at least 1"):
        _ = Moments.empty(3).mean
    with pytest.raises(UsageError, match="hold 1 samples, at least 2"):
        _ = Moments.of(torch.ones(1, 3)).covariance


@given(
    st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9), st.floats(0, 9), st.floats(0, 9)), min_size=1, max_size=5)
)
def test_frechet_distance_of_independent_gaussians(columns: list[tuple[float, float, float, float]]) -> None:
    mean_a, mean_b, std_a, std_b = torch.tensor(columns, dtype=torch.float64).T
    given_ = frechet_distance(mean_a, std_a.square().diag(), mean_b, std_b.square().diag())
    # the covariances commute: each coordinate adds the squared differences of means and of standard deviations
    expected = sum((a - b) ** 2 + (s - t) ** 2 for a, b, s, t in columns)
    assert given_ == pytest.approx(expected, abs=1e-6)


def test_frechet_distance_is_that_of_the_matrix_square_root() -> None:
    (mean_a, a), (mean_b, b) = gaussian(0), gaussian(1)
    root = scipy.linalg.sqrtm((a @ b).numpy()).real
    expected = float((mean_a - mean_b).square().sum() + a.trace() + b.trace()) - 2 * np.trace(root)
    assert frechet_distance(mean_a, a, mean_b, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(mean_b, b, mean_a, a) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(mean_a, a, mean_a, a) == pytest.approx(0, abs=1e-6)


class FirstPixels(nn.Module):
    num_features = 8

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :8]


def test_frechet_distance_is_that_of_torchmetrics() -> None:
    draw = torch.Generator().manual_seed(2)
    real = torch.randn(50, 3, 4, 4, generator=draw)
    generated = 1.5 * torch.randn(40, 3, 4, 4, generator=draw) + 0.5
    oracle = FrechetInceptionDistance(feature=FirstPixels(), input_img_size=(3, 4, 4))
    oracle.set_dtype(torch.float64)
    oracle.update(real, real=True)
    oracle.update(generated, real=False)
    a, b = (Moments.of(FirstPixels()(images)) for images in (real, generated))
    given_ = frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
    assert given_ == pytest.approx(oracle.compute().item(), rel=1e-5)


def test_frechet_distance_of_fewer_samples_than_features() -> None:
    a, b = (torch.randn(5, 20, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in (3, 4))
    of_a, of_b = Moments.of(a), Moments.of(b)
    # tr (AB)^½ is the nuclear norm of the product of the centered samples, whatever the rank
    x, y = (m - m.mean(0) for m in (a, b))
    overlap = torch.linalg.svdvals(x @ y.T).sum() / 4
    expected = (of_a.mean - of_b.mean).square().sum() + of_a.covariance.trace() + of_b.covariance.trace() - 2 * overlap
    given_ = frechet_distance(of_a.mean, of_a.covariance, of_b.mean, of_b.covariance)
    assert given_ == pytest.approx(expected.item(), rel=1e-6)


def naive_mmd(x: Tensor, y: Tensor) -> float:
    def kernel(a: Tensor, b: Tensor) -> float:
        return (float(a @ b) / len(a) + 1) ** 3

    n = len(x)
    same = sum(kernel(z[i], z[j]) for z in (x, y) for i in range(n) for j in range(n) if i != j)
    cross = sum(kernel(a, b) for a in x for b in y)
    return same / (n * (n - 1)) - 2 * cross / n**2


def test_kernel_distance_is_the_unbiased_estimate() -> None:
    draw = torch.Generator().manual_seed(5)
    x, y = (torch.randn(6, 3, generator=draw, dtype=torch.float64) + shift for shift in (0, 1))
    assert kernel_distance(x, y, subsets=3) == pytest.approx(naive_mmd(x, y), rel=1e-12)


def test_kernel_distance_averages_the_seeded_subsets() -> None:
    draw = torch.Generator().manual_seed(6)
    x, y = (torch.randn(n, 3, generator=draw, dtype=torch.float64) for n in (9, 7))
    draw = torch.Generator().manual_seed(8)
    expected = [
        naive_mmd(x[torch.randperm(9, generator=draw)[:4]], y[torch.randperm(7, generator=draw)[:4]]) for _ in range(5)
    ]
    assert kernel_distance(x, y, subsets=5, size=4, seed=8) == pytest.approx(sum(expected) / 5, rel=1e-12)


def test_kernel_distance_needs_two_of_each() -> None:
    with pytest.raises(UsageError, match="given 5 and 1"):
        kernel_distance(torch.ones(5, 3), torch.ones(1, 3))


def test_psnr_of_a_known_error() -> None:
    reference = torch.full((3, 1, 4, 4), 0.5)
    images = reference + torch.tensor([0.1, 0.01, 0.0]).view(3, 1, 1, 1)
    assert psnr(images, reference).tolist() == pytest.approx([20.0, 40.0, CEILING], abs=1e-3)


def test_ssim_of_constant_images_is_its_luminance_term() -> None:
    a, b, c1 = 0.8, 0.4, 0.01**2
    reference = torch.full((2, 1, 16, 16), b, dtype=torch.float64)
    images = torch.stack([torch.full_like(reference[0], a), reference[0]])
    expected = [(2 * a * b + c1) / (a * a + b * b + c1), 1.0]
    assert ssim(images, reference).tolist() == pytest.approx(expected, abs=1e-9)


def test_ssim_of_one_image_keeps_its_axis() -> None:
    image = torch.rand(1, 1, 16, 16)
    assert ssim(image, image).tolist() == pytest.approx([1.0])


def test_sqnr_is_summed_over_a_step() -> None:
    draw = np.random.default_rng(7)
    reference, other = draw.normal(size=(3, 5, 2, 4)), draw.normal(size=(3, 5, 2, 4))
    expected = []
    for k in range(3):
        signal = sum(v * v for v in reference[k].ravel())
        noise = sum((v - w) ** 2 for v, w in zip(reference[k].ravel(), other[k].ravel(), strict=True))
        expected.append(10 * math.log10(signal / noise))
    given_ = sqnr_per_step(torch.from_numpy(reference), torch.from_numpy(other))
    assert given_.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("change", "expected"), [(lambda x: x, CEILING), (lambda x: x * 0, 0.0), (lambda x: x * 0.9, 20.0)]
)
def test_sqnr_at_its_ends(change: Callable[[Tensor], Tensor], expected: float) -> None:
    x = torch.randn(1, 8, dtype=torch.float64)
    assert sqnr_per_step(x, change(x)).tolist() == pytest.approx([expected])


def test_sqnr_of_nothing_is_finite() -> None:
    zero = torch.zeros(1, 4)
    assert sqnr_per_step(zero, zero).tolist() == [CEILING]
    assert sqnr_per_step(zero, zero + 1).tolist() == [-CEILING]


def test_sqnr_of_unequal_shapes_is_refused() -> None:
    with pytest.raises(UsageError, match=r"\[2, 3\] and \[2, 4\]"):
        sqnr_per_step(torch.ones(2, 3), torch.ones(2, 4))
