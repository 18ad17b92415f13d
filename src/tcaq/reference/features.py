"""The classifier as a feature extractor: images in, penultimate features out, the data's statistics beside them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tcaq.errors import UsageError
from tcaq.reference.classifier import FEATURES, GarmentClassifier
from tcaq.reference.data import to_signal


@dataclass(frozen=True)
class ReferenceStatistics:
    """Classifier features of the real data.

    mean: float64 [64] and covariance: float64 [64, 64] of the 60 000 training images;
    real_features: float32 [5000, 64], those of a fixed random subset, for kernel distances;
    floor: Fréchet distance between the 10 000 test images and the training images, what a perfect model would score.
    """

    mean: Tensor
    covariance: Tensor
    real_features: Tensor
    floor: float


class GarmentFeatures(nn.Module):
    """Penultimate features of the bundled classifier; `statistics` are those of the real data, if known."""

    num_features = FEATURES
    channels = 1

    def __init__(self, classifier: GarmentClassifier, statistics: ReferenceStatistics | None = None) -> None:
        super().__init__()
        self.classifier = classifier.eval().requires_grad_(False)
        self.statistics = statistics

    def forward(self, images: Tensor) -> Tensor:
        """Features of images.

        Args: images, uint8 [N, 1, 32, 32].
        Returns: float32 [N, 64].
        Raises: UsageError for images of another type or size.
        """
        if images.dtype != torch.uint8 or images.shape[1:] != (1, 32, 32):
            raise UsageError(
                f"the reference features take uint8 images [N, 1, 32, 32], given {images.dtype} {list(images.shape)}; "
                "measure other images with the features 'inception', 'dinov2' or your own module:attribute"
            )
        return self.classifier.features(to_signal(images))
