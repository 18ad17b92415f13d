"""Get the inputs of one unit after another without running the units before it again.

A unit that was passed once answers from the cache, separately for the float and the quantized stream; only the glue between units
is computed again. All units together cost one forward pass, however many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from tcaq.layers.modes import Mode, running
from tcaq.models.architectures import architecture
from tcaq.models.device import device_of
from tcaq.models.trajectories import Drawn
from tcaq.models.units import Unit
from tcaq.stages.cache import ActivationCache
from tcaq.stages.call import Call, join


class _ReachedError(Exception):
    """Carries the arguments of the unit that a pass was looking for out of the forward pass."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__("unit reached")
        self.args_, self.kwargs = args, kwargs


class Replay:
    """Passes of a denoiser over fixed batches of inputs, unit by unit."""

    def __init__(
        self, denoiser: nn.Module, units: Sequence[Unit], batches: Sequence[Drawn], cache: ActivationCache
    ) -> None:  # fmt: skip
        """Args: units: in execution order; batches: what the denoiser is given; cache: for the outputs of units."""
        self.denoiser, self.units, self.batches, self.cache = denoiser, units, batches, cache
        self._shared, self._device = frozenset(architecture(denoiser).shared), device_of(denoiser)
        self._forms: dict[tuple[str, str, int], list[bool] | None] = {}

    @torch.no_grad()
    def inputs(self, unit: Unit, mode: Mode, batches: Iterable[int] | None = None) -> Call:
        """The arguments that `unit` receives when the units before it run in `mode`.

        Args: batches: numbers of those to join, whose texts must be of one length; None: all.
        """
        numbers = range(len(self.batches)) if batches is None else batches
        return join([self._reach(unit, mode, batch) for batch in numbers])

    def _reach(self, target: Unit, mode: Mode, batch: int) -> Call:
        inputs = self.batches[batch]
        with running(self.denoiser, mode), self._intercepting(target, mode, batch):
            try:
                inputs(self.denoiser)
            except _ReachedError as reached:
                return Call.of(reached.args_, reached.kwargs, len(inputs), self._shared)
        raise RuntimeError(f"unit {target.name} was not reached")

    @contextmanager
    def _intercepting(self, target: Unit, mode: Mode, batch: int) -> Iterator[None]:
        def stop(*args: Any, **kwargs: Any) -> Tensor:
            raise _ReachedError(args, kwargs)

        # a module that accelerate moves between devices has a forward of its own already
        before = [vars(unit.module).get("forward") for unit in self.units]
        for unit in self.units:
            # an instance attribute hides the class's forward until it is deleted again
            unit.module.forward = stop if unit is target else self._replaying(unit, mode, batch)
        try:
            yield
        finally:
            for unit, forward in zip(self.units, before, strict=True):
                del unit.module.forward
                if forward is not None:
                    unit.module.forward = forward

    def _replaying(self, unit: Unit, mode: Mode, batch: int) -> Callable[..., Any]:
        original, numbers = unit.module.forward, count()

        def answer(*args: Any, **kwargs: Any) -> Any:
            # a layer that a model uses twice in a pass has two outputs
            key = (mode.value, f"{unit.name}@{next(numbers)}", batch)
            if key not in self._forms:
                self._keep(key, original(*args, **kwargs))
            return self._recall(key)

        return answer

    def _keep(self, key: tuple[str, str, int], result: Any) -> None:
        """Put a unit's output into the cache: a tensor, or a tuple of tensors of which some may be None."""
        mode, unit, batch = key
        parts = result if isinstance(result, tuple) else (result,)
        for i, part in enumerate(parts):
            if part is not None:
                # one memory layout whether computed, kept or spilled: kernels round differently for different strides
                self.cache.put((mode, f"{unit}#{i}", batch), part.contiguous())
        self._forms[key] = [part is not None for part in parts] if isinstance(result, tuple) else None

    def _recall(self, key: tuple[str, str, int]) -> Any:
        mode, unit, batch = key
        form = self._forms[key]
        if form is None:
            return self._output(mode, unit, 0, batch)
        return tuple(self._output(mode, unit, i, batch) if there else None for i, there in enumerate(form))

    def _output(self, mode: str, unit: str, number: int, batch: int) -> Tensor:
        return self.cache.get((mode, f"{unit}#{number}", batch)).to(self._device)
