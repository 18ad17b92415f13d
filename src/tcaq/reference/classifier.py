"""The small Fashion-MNIST classifier whose penultimate layer is the bundled feature extractor."""

from __future__ import annotations

from torch import Tensor, nn

FEATURES = 64


def _block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class GarmentClassifier(nn.Module):
    """Six convolutions from 32x32 down to 4x4, a spatial mean, one linear layer; about 210 000 parameters.

    `num_features` (64) is the width of the penultimate layer.
    """

    num_features = FEATURES

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _block(1, 16),
            nn.MaxPool2d(2),
            _block(16, 32),
            nn.MaxPool2d(2),
            _block(32, 64),
            _block(64, 64),
            nn.MaxPool2d(2),
            _block(64, 128),
            _block(128, FEATURES),
        )
        self.head = nn.Linear(FEATURES, classes)

    def features(self, x: Tensor) -> Tensor:
        """Penultimate features of images. Args: x, float [N, 1, 32, 32] in [-1, 1]. Returns: float [N, 64]."""
        pooled: Tensor = self.body(x).mean(dim=(2, 3))
        return pooled

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of images. Args: x, float [N, 1, 32, 32] in [-1, 1]. Returns: logits, float [N, 10]."""
        logits: Tensor = self.head(self.features(x))
        return logits
