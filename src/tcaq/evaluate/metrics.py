"""What is measured: Fréchet and kernel distances between sets of features, fidelity between paired images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.image.kid import poly_mmd

from tcaq.errors import UsageError

CEILING = 100.0
"""Decibels at which a ratio counts as perfect: that of equal signals is infinite, which neither means nor JSON hold."""


@dataclass
class Moments:
    """Count, sum and sum of outer products of features; what two of them hold adds up to what one would hold.

    total: float64 [D]; outer: float64 [D, D].
    """

    count: int
    total: Tensor
    outer: Tensor

    @classmethod
    def empty(cls, num_features: int) -> Moments:
        """Moments of no features of the given width."""
        return cls(
            0, torch.zeros(num_features, dtype=torch.float64), torch.zeros((num_features,) * 2, dtype=torch.float64)
        )

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Moments of features [N, D]."""
        moments = cls.empty(features.shape[1])
        moments.update(features)
        return moments

    def update(self, features: Tensor) -> None:
        """Add features [N, D] of any floating type and device."""
        values = features.detach().to("cpu", torch.float64)
        self.count += len(values)
        self.total += values.sum(0)
        self.outer += values.T @ values

    def merge(self, other: Moments) -> Moments:
        """Moments of the two sets together."""
        return Moments(self.count + other.count, self.total + other.total, self.outer + other.outer)

    @property
    def mean(self) -> Tensor:
        """Mean, float64 [D]. Raises: UsageError if nothing was added."""
        self._require(1)
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance, float64 [D, D]. Raises: UsageError for fewer than two features."""
        self._require(2)
        mean = self.mean
        return (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)

    def _require(self, least: int) -> None:
        if self.count < least:
            raise UsageError(f"the moments hold {self.count} samples, at least {least} are needed; add more images")


def frechet_distance(mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor) -> float:
    """Squared 2-Wasserstein distance of two Gaussians, `|μa−μb|² + tr(A + B − 2 (A^½ B A^½)^½)` (Heusel et al. 2017).

    Args: means [D] and covariances [D, D]; computed in float64.
    Returns: the distance, at least 0. Two symmetric eigen-decompositions stand in for the square root of the product
    AB, which is not symmetric; singular covariances (fewer samples than features) are no special case.
    """
    a, b = covariance_a.double(), covariance_b.double()
    values, vectors = torch.linalg.eigh(a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    inner = root @ b @ root
    overlap = torch.linalg.eigvalsh((inner + inner.T) / 2).clamp(min=0).sqrt().sum()
    shift = (mean_a.double() - mean_b.double()).square().sum()
    return max(0.0, float(shift + a.trace() + b.trace() - 2 * overlap))


def kernel_distance(real: Tensor, generated: Tensor, subsets: int = 20, size: int = 1000, seed: int = 0) -> float:
    """Kernel inception distance: unbiased squared MMD with the kernel `(x·y / D + 1)³` (Bińkowski et al. 2018).

    Args: real [N, D] and generated [M, D]; the mean over `subsets` random subsets of `size` of each (fewer where N or M
    is smaller), drawn with `seed`. It may be slightly negative, being unbiased.
    Raises: UsageError if either set has fewer than two members.
    """
    size = min(size, len(real), len(generated))
    if size < 2:
        raise UsageError(f"the kernel distance needs two samples of each, given {len(real)} and {len(generated)}")
    draw = torch.Generator().manual_seed(seed)
    real, generated = real.detach().to("cpu", torch.float64), generated.detach().to("cpu", torch.float64)
    total = 0.0
    for _ in range(subsets):
        some = real[torch.randperm(len(real), generator=draw)[:size]]
        others = generated[torch.randperm(len(generated), generator=draw)[:size]]
        total += float(poly_mmd(some, others))
    return total / subsets


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio per image, dB, at most `CEILING`. Args: float [N, C, H, W] in [0, 1]; returns [N]."""
    ratio: Tensor = peak_signal_noise_ratio(images, reference, data_range=1.0, reduction="none", dim=(1, 2, 3))
    return ratio.clamp(max=CEILING)


def ssim(images: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity per image (Wang et al. 2004). Args: float [N, C, H, W] in [0, 1]; returns [N]."""
    value = structural_similarity_index_measure(images, reference, data_range=1.0, reduction="none")
    if not isinstance(value, Tensor):
        raise TypeError("torchmetrics returned more than the similarity")
    return value.reshape(len(images))


def sqnr_per_step(reference: Tensor, other: Tensor) -> Tensor:
    """Signal-to-quantization-noise ratio at each step, `10 log10(Σ reference² / Σ (reference − other)²)` in dB.

    Args: reference, other: [K, N, ...], step first; summed over all but the step, in float64.
    Returns: float64 [K], between -`CEILING` and `CEILING`.
    Raises: UsageError if the shapes differ.
    """
    if reference.shape != other.shape:
        raise UsageError(f"the two recordings differ in shape: {list(reference.shape)} and {list(other.shape)}")
    ref = reference.double().flatten(1)
    signal, noise = ref.square().sum(1), (ref - other.double().flatten(1)).square().sum(1)
    return (10 * torch.log10(signal / noise)).nan_to_num(nan=CEILING).clamp(-CEILING, CEILING)
