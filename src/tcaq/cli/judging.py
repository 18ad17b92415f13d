"""The judge of alignment rounds: Fréchet distance between calibration images of the float and of the quantized model."""

from __future__ import annotations

from torch import Tensor

from tcaq.cli.models import REFERENCE
from tcaq.evaluate.features import load_features
from tcaq.evaluate.metrics import Moments, frechet_distance
from tcaq.recipes.job import Judge


def make_judge(model: str, features: str | None) -> Judge | None:
    """A judge over an extractor; the bundled one judges only the bundled model unless it is asked for."""
    name = features or (REFERENCE if model == REFERENCE else None)
    if name is None:
        return None
    extractor = load_features(name)

    def judge(float_images: Tensor, images: Tensor) -> float:
        a, b = Moments.of(extractor.extract(float_images)), Moments.of(extractor.extract(images))
        return frechet_distance(a.mean, a.covariance, b.mean, b.covariance)

    return judge
