"""The judge of alignment rounds: Fréchet distance between calibration images of the float and of the quantized model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tcaq.cli.models import REFERENCE
from tcaq.evaluate.features import FeatureExtractor, load_features
from tcaq.evaluate.metrics import Moments, frechet_distance
from tcaq.recipes.job import Judge


@dataclass(frozen=True)
class FeatureJudge:
    """Fréchet distance in the space of an extractor, whose name tells it from other judges."""

    extractor: FeatureExtractor

    @property
    def name(self) -> str:
        """The extractor's."""
        return self.extractor.name

    def __call__(self, float_images: Tensor, images: Tensor) -> float:
        """The distance between two sets, uint8 [images, channels, height, width]."""
        a, b = (Moments.of(self.extractor.extract(part)) for part in (float_images, images))
        return frechet_distance(a.mean, a.covariance, b.mean, b.covariance)


def make_judge(model: str, features: str | None) -> Judge | None:
    """A judge over an extractor; the bundled one judges only the bundled model unless it is asked for."""
    name = features or (REFERENCE if model == REFERENCE else None)
    if name is None:
        return None
    return FeatureJudge(load_features(name))
