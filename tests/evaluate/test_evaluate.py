from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from tcaq.errors import UsageError
from tcaq.evaluate import Evaluation, FeatureExtractor, RealStatistics, Sampled, score
from tcaq.evaluate.metrics import Moments, frechet_distance, kernel_distance, psnr, sqnr_per_step, ssim

HOW = {"steps": 20, "scheduler": "DDIMScheduler", "seed": 4}


class Halves(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.float().reshape(len(images), 2, -1).mean(2) / 255


def sampled(seed: int, spread: int) -> Sampled:
    draw = torch.Generator().manual_seed(seed)
    images = torch.randint(0, spread, (12, 1, 16, 16), dtype=torch.uint8, generator=draw)
    eps = torch.randn(3, 4, 1, 16, 16, generator=draw)
    return Sampled(images, seconds=1.5 * spread, peak_memory=1000 + spread, eps=eps, timesteps=torch.tensor([9, 5, 1]))


@pytest.fixture
def real() -> RealStatistics:
    features = torch.rand(30, 2, generator=torch.Generator().manual_seed(9))
    moments = Moments.of(features)
    return RealStatistics(moments.mean, moments.covariance, features)


FLOAT, QUANTIZED = sampled(0, 256), sampled(1, 200)


def test_every_number_is_that_of_its_metric(real: RealStatistics) -> None:
    extractor = FeatureExtractor("halves", Halves(), num_features=2, statistics=real)
    result = score(FLOAT, QUANTIZED, extractor, **HOW, batch_size=5)
    moments = [Moments.of(Halves()(s.images)) for s in (FLOAT, QUANTIZED)]
    for given, of, sample in zip((result.float, result.quantized), moments, (FLOAT, QUANTIZED), strict=True):
        assert given.fd == pytest.approx(frechet_distance(of.mean, of.covariance, real.mean, real.covariance), rel=1e-6)
        assert real.real_features is not None
        assert given.kid == pytest.approx(kernel_distance(real.real_features, Halves()(sample.images)), rel=1e-6)
        assert (given.seconds, given.peak_memory) == (sample.seconds, sample.peak_memory)
    a, b = FLOAT.images / 255, QUANTIZED.images / 255
    assert result.paired.psnr == pytest.approx(psnr(b, a).mean().item(), rel=1e-6)
    assert result.paired.ssim == pytest.approx(ssim(b, a).mean().item(), rel=1e-5)
    between = frechet_distance(moments[0].mean, moments[0].covariance, moments[1].mean, moments[1].covariance)
    assert result.paired.fd_to_float == pytest.approx(between, rel=1e-6)
    assert FLOAT.eps is not None
    assert QUANTIZED.eps is not None
    steps = [(step.timestep, step.sqnr) for step in result.paired.sqnr_per_step]
    assert steps == list(zip([9, 5, 1], sqnr_per_step(FLOAT.eps, QUANTIZED.eps).tolist(), strict=True))
    assert result.ratio.fd == result.quantized.fd / result.float.fd  # type: ignore[operator]
    assert (result.num, result.seed, result.features) == (12, 4, "halves")


def test_json_has_the_documented_keys_and_comes_back(real: RealStatistics) -> None:
    result = score(FLOAT, QUANTIZED, FeatureExtractor("halves", Halves(), 2), **HOW, real=real)
    text = result.model_dump_json()
    data = json.loads(text)
    assert set(data) == {
        "float",
        "quantized",
        "paired",
        "ratio",
        "num",
        "steps",
        "scheduler",
        "seed",
        "features",
        "versions",
    }
    assert set(data["float"]) == set(data["quantized"]) == {"fd", "kid", "seconds", "peak_memory"}
    assert set(data["paired"]) == {"psnr", "ssim", "sqnr_per_step", "fd_to_float"}
    assert set(data["paired"]["sqnr_per_step"][0]) == {"timestep", "sqnr"}
    assert set(data["ratio"]) == {"fd"}
    assert data["versions"]["torch"] == torch.__version__
    assert Evaluation.model_validate_json(text) == result
    with pytest.raises(ValidationError, match="frozen"):
        result.num = 3  # type: ignore[misc]


def test_without_real_data_the_paired_measures_remain() -> None:
    result = score(FLOAT, QUANTIZED, FeatureExtractor("halves", Halves(), 2), **HOW)
    assert result.float.fd is result.quantized.kid is result.ratio.fd is None
    assert result.paired.fd_to_float > 0


def test_without_features_no_distance_is_made() -> None:
    result = score(FLOAT, QUANTIZED, None, **HOW)
    assert (result.features, result.paired.fd_to_float, result.float.fd, result.ratio.fd) == (None,) * 4
    assert result.paired.psnr > 0
    assert Evaluation.model_validate_json(result.model_dump_json()) == result


def test_a_model_against_itself_is_perfect(real: RealStatistics) -> None:
    result = score(FLOAT, FLOAT, FeatureExtractor("halves", Halves(), 2), **HOW, real=real)
    assert result.ratio.fd == 1
    assert result.paired.fd_to_float == pytest.approx(0, abs=1e-9)
    assert result.paired.ssim == pytest.approx(1)
    assert result.paired.psnr == 100
    assert [step.sqnr for step in result.paired.sqnr_per_step] == [100, 100, 100]


def test_eps_may_be_left_out() -> None:
    bare = [replace(s, eps=None, timesteps=None) for s in (FLOAT, QUANTIZED)]
    assert score(*bare, FeatureExtractor("halves", Halves(), 2), **HOW).paired.sqnr_per_step == ()


@pytest.mark.parametrize(
    ("quantized", "message"),
    [
        (replace(QUANTIZED, images=QUANTIZED.images[:-1]), r"\[12, 1, 16, 16\] and \[11, 1, 16, 16\]"),
        (replace(QUANTIZED, eps=None), "both models or for neither"),
        (replace(QUANTIZED, timesteps=torch.tensor([9, 6, 1])), "different timesteps"),
    ],
)
def test_samples_that_cannot_be_paired(quantized: Sampled, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        score(FLOAT, quantized, FeatureExtractor("halves", Halves(), 2), **HOW)
