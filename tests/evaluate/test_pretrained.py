from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tcaq.errors import ModelError
from tcaq.evaluate.features import load_features
from tcaq.evaluate.pretrained import Dinov2Features, InceptionFeatures


class Network(nn.Module):
    """Stands in for the published networks, whose weights are not in the repository: keeps what it is shown."""

    config = SimpleNamespace(hidden_size=3)

    def forward(self, pixel_values: Tensor) -> Any:
        self.seen = pixel_values
        return SimpleNamespace(pooler_output=pixel_values.mean((2, 3)))


def test_dinov2_is_shown_imagenet_colors_at_its_size() -> None:
    network = Network()
    images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 8, 8)
    features = Dinov2Features(network)(images)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    assert network.seen.shape == (2, 3, 224, 224)
    torch.testing.assert_close(features, torch.stack([(0 - mean) / std, (1 - mean) / std]), rtol=1e-4, atol=1e-4)


def test_inception_is_shown_the_bytes() -> None:
    class Tuple(nn.Module):
        def forward(self, images: Tensor) -> tuple[Tensor]:
            return (images.double().flatten(1),)

    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    assert torch.equal(InceptionFeatures(Tuple())(images), images.flatten(1).float())


def refuse(*args: object) -> None:
    raise OSError("no route to host")


@pytest.mark.parametrize(
    ("name", "module", "attribute"),
    [
        ("inception", "torch_fidelity.feature_extractor_inceptionv3", "FeatureExtractorInceptionV3"),
        ("dinov2", "transformers", "Dinov2Model"),
    ],
)
def test_weights_that_cannot_be_fetched(
    monkeypatch: pytest.MonkeyPatch, name: str, module: str, attribute: str
) -> None:
    stand_in = ModuleType(module)
    vars(stand_in)[attribute] = refuse if name == "inception" else SimpleNamespace(from_pretrained=refuse)
    if "." in module:
        monkeypatch.setitem(sys.modules, module.partition(".")[0], ModuleType(module.partition(".")[0]))
    monkeypatch.setitem(sys.modules, module, stand_in)
    with pytest.raises(ModelError, match=r"no route to host.*Connect to the internet"):
        load_features(name)
