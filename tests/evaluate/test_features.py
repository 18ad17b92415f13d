from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from tcaq.errors import MissingExtraError, ModelError, NumericalError, UsageError
from tcaq.evaluate.features import FeatureExtractor, load_features, match_channels


class Means(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.float().mean((2, 3))


class WantsSixteen(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.float().reshape(len(images), 3, 16 * 16).mean(2)


@pytest.fixture(autouse=True)
def own(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("own_features")
    instance = Means()
    instance.channels, instance.num_features, instance.statistics = 1, 1, "theirs"  # type: ignore[assignment]
    vars(module).update(instance=instance, Means=Means, make=lambda: Means(), number=3, wrong=dict, Wants=WantsSixteen)
    monkeypatch.setitem(sys.modules, "own_features", module)


def images(channels: int, count: int = 5) -> Tensor:
    draw = torch.Generator().manual_seed(channels)
    return torch.randint(0, 256, (count, channels, 6, 6), dtype=torch.uint8, generator=draw)


@pytest.mark.parametrize("attribute", ["Means", "make"])
def test_own_class_or_function_is_called_and_its_width_found(attribute: str) -> None:
    extractor = load_features(f"own_features:{attribute}")
    assert (extractor.num_features, extractor.channels, extractor.statistics) == (3, None, None)
    given = images(3)
    torch.testing.assert_close(extractor(given), given.double().mean((2, 3)).float())


def test_own_module_says_what_it_takes() -> None:
    extractor = load_features("own_features:instance")
    assert (extractor.num_features, extractor.channels, extractor.statistics) == (1, 1, "theirs")
    given = images(3)
    red, green, blue = given.double().unbind(1)
    luma = (0.299 * red + 0.587 * green + 0.114 * blue).round().mean((1, 2))
    torch.testing.assert_close(extractor(given).squeeze(1), luma.float())


def test_gray_is_repeated() -> None:
    gray = images(1)
    assert torch.equal(match_channels(gray, 3), torch.cat([gray] * 3, dim=1))
    assert match_channels(gray, None) is gray


def test_other_channels_are_refused() -> None:
    with pytest.raises(UsageError, match="4 channels"):
        match_channels(images(4), 3)


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_extraction_does_not_depend_on_the_batch(batch_size: int) -> None:
    extractor, given = load_features("own_features:Means"), images(3)
    assert torch.equal(extractor.extract(given, batch_size), extractor(given))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vgg", "allowed: reference, inception, dinov2, or module:attribute"),
        ("own_features:", "allowed"),
        ("no_such_module:x", "PYTHONPATH"),
        ("own_features:nothing", "has no 'nothing'"),
        ("own_features:number", "is a int"),
        ("json:loads", "cannot be called without arguments"),
        ("own_features:wrong", "yields a dict"),
    ],
)
def test_wrong_names_say_what_is_allowed(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_features(name)


def test_width_that_cannot_be_found_names_the_attribute() -> None:
    with pytest.raises(ModelError, match="attribute num_features"):
        load_features("own_features:Wants")


@pytest.mark.parametrize(("name", "package"), [("inception", "torch_fidelity"), ("dinov2", "transformers")])
def test_missing_extra_is_named(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"{package}.feature_extractor_inceptionv3", raising=False)
    with pytest.raises(MissingExtraError, match=r"pip install 'tcaq\["):
        load_features(name)


def test_images_of_another_type_are_refused() -> None:
    with pytest.raises(UsageError, match="uint8"):
        load_features("own_features:Means")(torch.zeros(1, 3, 6, 6))


def test_features_of_another_shape_are_refused() -> None:
    with pytest.raises(ModelError, match=r"returned \[5, 3\], expected a tensor \[5, 4\]"):
        FeatureExtractor("own", Means(), num_features=4)(images(3))


def test_features_that_are_not_finite_are_refused() -> None:
    class Broken(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.float().mean((2, 3)) / 0

    with pytest.raises(NumericalError, match="'own'"):
        FeatureExtractor("own", Broken(), num_features=3)(images(3))
