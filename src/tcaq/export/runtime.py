"""A denoiser that another runtime computes, in the place of the one in a diffusers pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from numpy.typing import NDArray
from torch import Tensor, nn

from tcaq.errors import UsageError
from tcaq.export.interface import TIMESTEP, UNCONDITIONAL, Interface
from tcaq.models.inputs import IGNORED
from tcaq.models.nested import leaves

Predict = Callable[..., NDArray[np.float32]]
"""The inputs of an interface in its order, the timestep as [1] -> prediction."""


class ExportedDenoiser(nn.Module):
    """Called like the denoiser that it was made from; a batch with several timesteps is run timestep by timestep.

    Attributes: fingerprint: uint8 [32], SHA-256 of the files' checksums: the only state, so that two models can be told apart.
    """

    fingerprint: Tensor

    def __init__(
        self, predict: Predict, config: Any, checksums: Mapping[str, str], interface: Interface = UNCONDITIONAL
    ) -> None:
        super().__init__()
        self._predict, self.config, self.interface = predict, config, interface
        digest = sha256("".join(checksums[name] for name in sorted(checksums)).encode()).digest()
        self.register_buffer("fingerprint", torch.frombuffer(bytearray(digest), dtype=torch.uint8))

    @property
    def dtype(self) -> torch.dtype:
        """Of its inputs and outputs."""
        return torch.float32

    @property
    def device(self) -> torch.device:
        """Where its inputs and outputs live."""
        return self.fingerprint.device

    @property
    def add_embedding(self) -> Any:
        """The width of SDXL's added embedding, which its pipeline looks up there."""
        return SimpleNamespace(linear_1=SimpleNamespace(in_features=self.config.projection_class_embeddings_input_dim))

    @contextmanager
    def cache_context(self, name: str) -> Iterator[None]:
        """Pipelines of transformers name their calls so for caches, of which there are none here."""
        yield

    def forward(self, *args: Any, **kwargs: Any) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict noise; arguments are those of the original denoiser, results have a `sample` alike.

        Raises: UsageError if it is given other arguments than when it was exported.
        """
        given = dict(zip(self.interface.arguments, args, strict=False)) | kwargs
        return_dict = given.pop("return_dict", True)
        values = self._values(given)
        sample = given[self.interface.inputs[0].name]
        times = values[1].reshape(-1)
        times = times[:1] if bool((times == times[0]).all()) else times  # the whole batch at once
        groups = [times] if len(times) == 1 else list(times.unique().split(1))
        result = torch.empty(0)
        for time in groups:
            own = torch.ones(len(sample), dtype=torch.bool) if len(times) == 1 else times == time
            part = torch.from_numpy(self._predict(*self._rows(values, own, time)))
            if result.numel() == 0:
                result = part.new_empty(len(sample), *part.shape[1:])
            result[own] = part
        result = result.to(sample.device, sample.dtype)
        return Transformer2DModelOutput(sample=result) if return_dict else (result,)

    def _values(self, given: Mapping[str, Any]) -> list[Tensor]:
        """The interface's inputs in order. Raises: UsageError naming what is missing and what is too much."""
        found = {path: value for path, value in leaves(given) if value is not None and path not in IGNORED}
        names = self.interface.names
        if found.keys() != set(names):
            missing, more = [n for n in names if n not in found], [n for n in found if n not in names]
            problems = [f"it needs {', '.join(missing)}"] if missing else []
            problems += [f"it takes no {', '.join(more)}"] if more else []
            raise UsageError(f"this denoiser was exported with the inputs {', '.join(names)}: {'; '.join(problems)}")
        return [wanted.cast(found[wanted.name]) for wanted in self.interface.inputs]

    def _rows(self, values: list[Tensor], own: Tensor, time: Tensor) -> list[NDArray[Any]]:
        """The inputs of some rows at their common timestep."""
        pairs = zip(self.interface.inputs, values, strict=True)
        parts = [v[own] if given.by_image else time if given.name == TIMESTEP else v for given, v in pairs]
        return [part.contiguous().numpy() for part in parts]
