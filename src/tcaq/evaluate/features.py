"""Feature extractors by name: images in, features out, the real data's statistics beside them where they are known."""

from __future__ import annotations

from importlib import import_module
from inspect import signature
from typing import Protocol

import torch
from torch import Tensor, nn

from tcaq.errors import ModelError, NumericalError, UsageError

# Floor 8's rooms do not import each other: the bundled extractor is reached the way a user's own is, by its address.
ADDRESSES = {
    "reference": "tcaq.reference:load_features",
    "inception": "tcaq.evaluate.pretrained:load_inception",
    "dinov2": "tcaq.evaluate.pretrained:load_dinov2",
}
LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in a gray value (ITU-R BT.601)."""


class DataStatistics(Protocol):
    """Features of real data: mean [D] and covariance [D, D] in float64, and some of the features themselves [N, D]."""

    @property
    def mean(self) -> Tensor: ...
    @property
    def covariance(self) -> Tensor: ...
    @property
    def real_features(self) -> Tensor | None: ...


def match_channels(images: Tensor, channels: int | None) -> Tensor:
    """Give uint8 images [N, C, H, W] the wanted number of channels: gray is repeated, color becomes its luma.

    Raises: UsageError for any other pair of channel numbers.
    """
    given = images.shape[1]
    if channels is None or channels == given:
        return images
    if given == 1:
        return images.expand(-1, channels, -1, -1)
    if (given, channels) == (3, 1):
        weights = torch.tensor(LUMA, device=images.device).view(3, 1, 1)
        return (images * weights).sum(1, keepdim=True).round().clamp(0, 255).to(torch.uint8)
    raise UsageError(f"images of {given} channels cannot be shown to an extractor that takes {channels}")


class FeatureExtractor(nn.Module):
    """A network that maps uint8 images [N, C, H, W] to features [N, D], under one name.

    channels: how many the network takes, None for as many as the images have. statistics: those of the real data the
    network is meant to judge, None where they must come from a folder of real images.
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        num_features: int,
        channels: int | None = None,
        statistics: DataStatistics | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.network = network.eval().requires_grad_(False)
        self.num_features = num_features
        self.channels = channels
        self.statistics = statistics

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Features of images.

        Args: images, uint8 [N, C, H, W].
        Returns: float32 [N, D].
        Raises: UsageError if the images are not uint8 or their channels do not fit; ModelError if the network returns
        something else than [N, D]; NumericalError if a feature is NaN or infinite.
        """
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise UsageError(f"images must be uint8 [N, C, H, W], given {images.dtype} {list(images.shape)}")
        features = self.network(match_channels(images, self.channels))
        expected = [len(images), self.num_features]
        if not isinstance(features, Tensor) or list(features.shape) != expected:
            shape = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ModelError(f"the feature extractor {self.name!r} returned {shape}, expected a tensor {expected}")
        if not features.isfinite().all():
            raise NumericalError(f"the feature extractor {self.name!r} returned NaN or infinite features")
        return features.float()

    def extract(self, images: Tensor, batch_size: int = 100) -> Tensor:
        """Features of many images: uint8 [N, C, H, W] to float32 [N, D] on the CPU, `batch_size` at a time."""
        device = next((p.device for p in self.parameters()), torch.device("cpu"))
        parts = [self(batch.to(device)).cpu() for batch in torch.split(images, batch_size)]
        return torch.cat(parts) if parts else torch.empty(0, self.num_features)


def _resolve(address: str) -> object:
    module, _, attribute = address.partition(":")
    if not module or not attribute:
        raise UsageError(
            f"unknown features {address!r}; allowed: {', '.join(ADDRESSES)}, or module:attribute of an nn.Module"
        )
    try:
        found: object = getattr(import_module(module), attribute)
    except ModuleNotFoundError as error:
        # a module that is found but misses one of its own imports is not the user's typing error: let it show
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise UsageError(f"features {address!r}: no module {module!r}; is its folder on PYTHONPATH?") from error
    except AttributeError as error:
        raise UsageError(f"features {address!r}: module {module!r} has no {attribute!r}") from error
    return found if isinstance(found, nn.Module) else _call(address, found)


def _call(address: str, found: object) -> object:
    if not callable(found):
        raise UsageError(f"features {address!r} is a {type(found).__name__}, neither an nn.Module nor yields one")
    try:
        signature(found).bind()
    except TypeError as error:
        raise UsageError(f"features {address!r} cannot be called without arguments: {error}") from error
    except ValueError:  # of some that are written in C nothing is known before they are called
        pass
    return found()


def _probe(name: str, network: nn.Module, channels: int | None) -> int:
    images = torch.zeros(1, channels or 3, 64, 64, dtype=torch.uint8)
    try:
        with torch.no_grad():
            return int(network.eval()(images).shape[1])
    except (RuntimeError, ValueError, AttributeError, IndexError) as error:
        raise ModelError(
            f"features {name!r}: the width could not be found with uint8 images {list(images.shape)} ({error}); "
            "give the module an attribute num_features, and channels if it takes a fixed number"
        ) from error


def load_features(name: str) -> FeatureExtractor:
    """Load a feature extractor.

    Args: name: "reference" (bundled, offline), "inception", "dinov2" (weights fetched once), or "module:attribute": an
    nn.Module, or a class or function that returns one when called without arguments. The module takes uint8 images
    [N, C, H, W] and returns [N, D]. It may have `num_features` (D, else found by a trial), `channels` (C, if fixed) and
    `statistics` (`DataStatistics` of its real data).
    Raises: UsageError for an unknown name; MissingExtraError; ModelError if the weights cannot be had.
    """
    network = _resolve(ADDRESSES.get(name, name))
    if not isinstance(network, nn.Module):
        raise UsageError(f"features {name!r} yields a {type(network).__name__}, expected an nn.Module")
    channels = getattr(network, "channels", None)
    width = getattr(network, "num_features", None)
    return FeatureExtractor(
        name=name,
        network=network,
        num_features=_probe(name, network, channels) if width is None else int(width),
        channels=channels,
        statistics=getattr(network, "statistics", None),
    )
