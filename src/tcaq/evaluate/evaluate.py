"""The protocol: float and quantized images of the same seeds, one extractor, one JSON."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from tcaq.errors import UsageError
from tcaq.evaluate.features import DataStatistics, FeatureExtractor
from tcaq.evaluate.metrics import Moments, frechet_distance, kernel_distance, psnr, sqnr_per_step, ssim

PACKAGES = ("tcaq", "torch", "diffusers", "torchmetrics")


@dataclass(frozen=True)
class Sampled:
    """Images a model sampled, and what it cost.

    images: uint8 [N, C, H, W], image i of the same seed in every model compared;
    seconds: wall time of sampling; peak_memory: largest resident set meanwhile, bytes;
    eps: the denoiser's outputs [K, M, ...] at each of K steps on the *float* model's inputs, so that they can be
    compared one by one, None if not recorded; timesteps: int64 [K], those steps' timesteps.
    """

    images: Tensor
    seconds: float
    peak_memory: int
    eps: Tensor | None = None
    timesteps: Tensor | None = None


class Record(BaseModel):
    """Base of the parts of an evaluation: immutable, no unknown field."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelScores(Record):
    """One model's images against the real data. Distances are None where no real data was given."""

    fd: float | None
    kid: float | None
    seconds: float
    peak_memory: int


class StepScore(Record):
    """Noise-prediction SQNR in dB at one timestep."""

    timestep: int | float
    sqnr: float


class PairedScores(Record):
    """Quantized against float images of the same seeds: means of PSNR (dB) and SSIM, distance of the two sets.

    The distance is None without features.
    """

    psnr: float
    ssim: float
    sqnr_per_step: tuple[StepScore, ...]
    fd_to_float: float | None


class Ratio(Record):
    """Quantized over float."""

    fd: float | None


class Evaluation(Record):
    """All that `tcaq evaluate` measures; `model_dump_json()` is the file it writes."""

    float: ModelScores
    quantized: ModelScores
    paired: PairedScores
    ratio: Ratio
    num: int
    steps: int
    scheduler: str
    seed: int
    features: str | None
    versions: dict[str, str]


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that the numbers depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a source tree
            found[name] = "not installed"
    return found


def score(
    float_: Sampled,
    quantized: Sampled,
    extractor: FeatureExtractor | None,
    *,
    steps: int,
    scheduler: str,
    seed: int,
    real: DataStatistics | None = None,
    batch_size: int = 100,
) -> Evaluation:
    """Measure a quantized model against the float one and both against real data.

    Args: extractor: None: no distances at all. steps, scheduler, seed: what the images were sampled with, recorded. real: features
    of real data; by default those the extractor carries; without either, the distances to data are None and the paired measures
    remain.
    Raises: UsageError if the two samples cannot be paired.
    """
    _check_pair(float_, quantized)
    real = extractor.statistics if extractor and real is None else real
    features = [extractor.extract(sampled.images, batch_size) if extractor else None for sampled in (float_, quantized)]
    of_float = _against_data(float_, features[0], real)
    of_quantized = _against_data(quantized, features[1], real)
    return Evaluation(
        float=of_float,
        quantized=of_quantized,
        paired=_paired(float_, quantized, features[0], features[1], batch_size),
        ratio=Ratio(fd=of_quantized.fd / of_float.fd if of_quantized.fd is not None and of_float.fd else None),
        num=len(float_.images),
        steps=steps,
        scheduler=scheduler,
        seed=seed,
        features=extractor.name if extractor else None,
        versions=versions(),
    )


def _check_pair(a: Sampled, b: Sampled) -> None:
    if a.images.shape != b.images.shape or a.images.ndim != 4 or len(a.images) < 2:
        raise UsageError(
            f"the float and quantized images are {list(a.images.shape)} and {list(b.images.shape)}; "
            "they must be [N, C, H, W] of equal shapes with N at least 2, sampled from the same seeds"
        )
    recorded = [value is not None for value in (a.eps, a.timesteps, b.eps, b.timesteps)]
    if any(recorded) != all(recorded):
        raise UsageError("eps and timesteps must be given for both models or for neither")
    if a.timesteps is not None and b.timesteps is not None and not torch.equal(a.timesteps, b.timesteps):
        raise UsageError("the two eps were recorded at different timesteps; record both on the float trajectory")


def _against_data(sampled: Sampled, features: Tensor | None, real: DataStatistics | None) -> ModelScores:
    fd = kid = None
    if features is not None and real is not None:
        moments = Moments.of(features)
        fd = frechet_distance(moments.mean, moments.covariance, real.mean, real.covariance)
        kid = None if real.real_features is None else kernel_distance(real.real_features, features)
    return ModelScores(fd=fd, kid=kid, seconds=sampled.seconds, peak_memory=sampled.peak_memory)


def _paired(
    a: Sampled, b: Sampled, features_a: Tensor | None, features_b: Tensor | None, batch_size: int
) -> PairedScores:  # fmt: skip
    peaks, similarities = [], []
    for x, y in zip(torch.split(a.images, batch_size), torch.split(b.images, batch_size), strict=True):
        x, y = x.float() / 255, y.float() / 255
        peaks.append(psnr(y, x))
        similarities.append(ssim(y, x))
    steps: tuple[StepScore, ...] = ()
    if a.eps is not None and b.eps is not None and a.timesteps is not None:
        steps = _step_scores(a.eps, b.eps, a.timesteps)
    return PairedScores(
        psnr=float(torch.cat(peaks).double().mean()),
        ssim=float(torch.cat(similarities).double().mean()),
        sqnr_per_step=steps,
        fd_to_float=None if features_a is None or features_b is None else _distance(features_a, features_b),
    )


def _distance(a: Tensor, b: Tensor) -> float:
    a_, b_ = Moments.of(a), Moments.of(b)
    return frechet_distance(a_.mean, a_.covariance, b_.mean, b_.covariance)


def _step_scores(a: Tensor, b: Tensor, timesteps: Tensor) -> tuple[StepScore, ...]:
    """A score for each step; the calls that guidance makes at one timestep count together."""
    distinct, step = torch.unique_consecutive(timesteps, return_inverse=True)
    scores = []
    for number, t in enumerate(distinct.tolist()):
        ratio = sqnr_per_step(a[step == number].flatten()[None], b[step == number].flatten()[None])
        scores.append(StepScore(timestep=int(t) if t == int(t) else t, sqnr=float(ratio)))
    return tuple(scores)
