"""Feature extractors with published weights, fetched by the user's machine: Inception-v3 and DINOv2."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from tcaq.errors import MissingExtraError, ModelError

DINOV2 = "facebook/dinov2-large"


class InceptionFeatures(nn.Module):
    """The 2048 pooled features that the Fréchet inception distance is defined on (weights of the TensorFlow original).

    torch-fidelity's network is called directly rather than through torchmetrics' metric, which resizes with
    antialiasing: only TensorFlow's plain bilinear resize gives the numbers that papers publish.
    """

    num_features = 2048
    channels = 3

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Features of uint8 images [N, 3, H, W]: float32 [N, 2048]."""
        features: Tensor = self.network(images)[0]
        return features.float()


def load_inception() -> InceptionFeatures:
    """Load Inception-v3 through torch-fidelity, which keeps the weights in torch.hub's cache.

    Raises: MissingExtraError without torch-fidelity; ModelError if the weights can be neither fetched nor read.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise MissingExtraError("torch-fidelity", "fidelity") from error
    try:
        return InceptionFeatures(FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]))
    except (OSError, RuntimeError, EOFError) as error:
        raise ModelError(
            f"the Inception weights could not be fetched or read ({error}). Connect to the internet once, or put the "
            f"file torch-fidelity names into {torch.hub.get_dir()}/checkpoints; 'reference' needs no download"
        ) from error


class Dinov2Features(nn.Module):
    """The normalized class token of DINOv2 (Oquab et al. 2023), as Stein et al. 2023 propose for Fréchet distances."""

    channels = 3
    mean: Tensor
    std: Tensor

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        self.num_features: int = network.config.hidden_size
        # the colours of ImageNet, which the network was trained on
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Features of uint8 images [N, 3, H, W], resized to 224x224: float32 [N, D]."""
        x = interpolate(images.float() / 255, size=(224, 224), mode="bicubic", align_corners=False, antialias=True)
        normalized = (x.clamp(0, 1) - self.mean) / self.std
        features: Tensor = self.network(pixel_values=normalized).pooler_output
        return features.float()


def load_dinov2(name: str = DINOV2) -> Dinov2Features:
    """Load DINOv2 through transformers: a Hub id or a local folder.

    Raises: MissingExtraError without transformers; ModelError if the weights can be neither fetched nor read.
    """
    try:
        from transformers import Dinov2Model
    except ImportError as error:
        raise MissingExtraError("transformers", "transformers") from error
    try:
        return Dinov2Features(Dinov2Model.from_pretrained(name))
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"DINOv2 ({name}) could not be fetched or read ({error}). Connect to the internet once; "
            "'reference' needs no download"
        ) from error
