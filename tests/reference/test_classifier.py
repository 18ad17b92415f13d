from __future__ import annotations

import pytest
import torch

from tcaq.errors import UsageError
from tcaq.reference.classifier import GarmentClassifier
from tcaq.reference.features import GarmentFeatures


@pytest.fixture
def classifier() -> GarmentClassifier:
    torch.manual_seed(0)
    model = GarmentClassifier()
    model(torch.randn(16, 1, 32, 32))  # in training mode: running statistics away from their initial 0 and 1
    return model.eval()


def test_logits_are_the_head_of_the_features(classifier: GarmentClassifier) -> None:
    x = torch.randn(3, 1, 32, 32)
    expected = classifier.features(x) @ classifier.head.weight.T + classifier.head.bias
    assert classifier.features(x).shape == (3, 64)
    torch.testing.assert_close(classifier(x), expected)


def test_size_is_as_documented(classifier: GarmentClassifier) -> None:
    assert sum(p.numel() for p in classifier.parameters()) == 208_890


def test_features_of_bytes_are_those_of_the_signal(classifier: GarmentClassifier) -> None:
    images = torch.randint(0, 256, (4, 1, 32, 32), dtype=torch.uint8)
    expected = classifier.features(images.double().div(127.5).sub(1).float())
    torch.testing.assert_close(GarmentFeatures(classifier)(images), expected)


def test_extractor_freezes_the_classifier() -> None:
    extractor = GarmentFeatures(GarmentClassifier().train())
    assert not extractor.classifier.training
    assert not any(p.requires_grad for p in extractor.parameters())


@pytest.mark.parametrize("images", [torch.zeros(1, 1, 32, 32), torch.zeros(1, 3, 32, 32, dtype=torch.uint8)])
def test_other_images_are_refused(classifier: GarmentClassifier, images: torch.Tensor) -> None:
    with pytest.raises(UsageError, match=r"uint8 images \[N, 1, 32, 32\]"):
        GarmentFeatures(classifier)(images)
