"""Get the inputs of one unit after another without running the units before it again.

A unit that was passed once answers from the cache, separately for the float and the quantized stream; only the glue between units
is computed again. All units together cost one forward pass, however many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tcaq.layers.modes import Mode, running
from tcaq.models.units import Unit
from tcaq.stages.cache import ActivationCache


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a unit, or of several calls joined along the batch."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def map(self, change: Callable[[Tensor], Tensor]) -> Call:
        """The call with `change` applied to every tensor among the arguments."""
        return Call(
            tuple(change(a) if isinstance(a, Tensor) else a for a in self.args),
            {k: change(a) if isinstance(a, Tensor) else a for k, a in self.kwargs.items()},
        )

    def zip(self, other: Call, mix: Callable[[Tensor, Tensor], Tensor]) -> Call:
        """Combine with another call of the same unit, tensor by tensor."""
        pairs = zip(self.args, other.args, strict=True)
        return Call(
            tuple(mix(a, b) if isinstance(a, Tensor) else a for a, b in pairs),
            {k: mix(a, other.kwargs[k]) if isinstance(a, Tensor) else a for k, a in self.kwargs.items()},
        )

    def __call__(self, module: nn.Module) -> Tensor:
        """Run a unit on these arguments."""
        result = module(*self.args, **self.kwargs)
        return result if isinstance(result, Tensor) else result[0]


def join(calls: Sequence[Call]) -> Call:
    """Batches of calls as one call."""
    first = calls[0]
    return Call(
        tuple(torch.cat([c.args[i] for c in calls]) if isinstance(a, Tensor) else a for i, a in enumerate(first.args)),
        {k: torch.cat([c.kwargs[k] for c in calls]) if isinstance(a, Tensor) else a for k, a in first.kwargs.items()},
    )


class _ReachedError(Exception):
    """Carries the arguments of the unit that a pass was looking for out of the forward pass."""

    def __init__(self, call: Call) -> None:
        super().__init__("unit reached")
        self.call = call


class Replay:
    """Passes of a denoiser over fixed batches of inputs, unit by unit."""

    def __init__(
        self,
        denoiser: nn.Module,
        units: Sequence[Unit],
        batches: Sequence[tuple[Tensor, Tensor]],
        cache: ActivationCache,
    ) -> None:
        """Batches: (x_t [n, ...], t [n]) each."""
        self.denoiser, self.units, self.batches, self.cache = denoiser, units, batches, cache

    @torch.no_grad()
    def inputs(self, unit: Unit, mode: Mode) -> Call:
        """The arguments that `unit` receives over all batches when the units before it run in `mode`."""
        return join([self._reach(unit, mode, batch) for batch in range(len(self.batches))])

    def _reach(self, target: Unit, mode: Mode, batch: int) -> Call:
        with running(self.denoiser, mode), self._intercepting(target, mode, batch):
            try:
                self.denoiser(*self.batches[batch])
            except _ReachedError as reached:
                return reached.call
        raise RuntimeError(f"unit {target.name} was not reached")

    @contextmanager
    def _intercepting(self, target: Unit, mode: Mode, batch: int) -> Iterator[None]:
        def stop(*args: Any, **kwargs: Any) -> Tensor:
            raise _ReachedError(Call(args, kwargs))

        for unit in self.units:
            # an instance attribute hides the class's forward until it is deleted again
            unit.module.forward = stop if unit is target else self._replaying(unit, mode, batch)
        try:
            yield
        finally:
            for unit in self.units:
                del unit.module.forward

    def _replaying(self, unit: Unit, mode: Mode, batch: int) -> Callable[..., Tensor]:
        original, key = unit.module.forward, (mode.value, unit.name, batch)

        def answer(*args: Any, **kwargs: Any) -> Tensor:
            if key not in self.cache:
                # one memory layout whether computed, kept or spilled: kernels round differently for different strides
                self.cache.put(key, original(*args, **kwargs).contiguous())
            return self.cache.get(key)

        return answer
