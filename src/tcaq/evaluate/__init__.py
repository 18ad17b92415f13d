"""Measuring: distances to real data, fidelity to the float model, time and memory, in one record."""

from tcaq.evaluate.evaluate import Evaluation, Sampled, score
from tcaq.evaluate.features import DataStatistics, FeatureExtractor, load_features
from tcaq.evaluate.memory import Peak, track_peak
from tcaq.evaluate.real import RealStatistics, load_real

__all__ = [
    "DataStatistics",
    "Evaluation",
    "FeatureExtractor",
    "Peak",
    "RealStatistics",
    "Sampled",
    "load_features",
    "load_real",
    "score",
    "track_peak",
]
