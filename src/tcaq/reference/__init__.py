"""The bundled reference: a small trained pipeline, its feature extractor, and the statistics of its data."""

from tcaq.reference.classifier import GarmentClassifier
from tcaq.reference.features import GarmentFeatures, ReferenceStatistics
from tcaq.reference.load import load_classifier, load_features, load_pipeline, load_statistics

__all__ = [
    "GarmentClassifier",
    "GarmentFeatures",
    "ReferenceStatistics",
    "load_classifier",
    "load_features",
    "load_pipeline",
    "load_statistics",
]
