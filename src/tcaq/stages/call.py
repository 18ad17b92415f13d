"""The arguments of a unit's calls, and what it puts out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tcaq.models.inputs import is_row
from tcaq.models.nested import leaves, mapped


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a unit, or of several calls joined along the batch.

    Attributes: rows: paths of the tensors with a row for each sample; everything else is the same for all samples.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rows: frozenset[str]

    @staticmethod
    def of(args: tuple[Any, ...], kwargs: dict[str, Any], count: int, shared: frozenset[str] = frozenset()) -> Call:
        """A call over `count` samples. Args: shared: names of arguments without rows, whatever their size."""
        found = {path for path, value in leaves({**_numbered(args), **kwargs}) if is_row(path, value, count, shared)}
        return Call(args, kwargs, frozenset(found))

    def map(self, change: Callable[[Tensor], Tensor]) -> Call:
        """The call with `change` applied to every tensor that has rows."""
        return self._mapped(lambda path, value: change(value) if path in self.rows else value)

    def cast(self, dtype: torch.dtype) -> Call:
        """The call with every floating tensor, with rows or not, in a dtype."""
        floating = (torch.float16, torch.bfloat16, torch.float32)
        return self._mapped(
            lambda _, value: value.to(dtype) if isinstance(value, Tensor) and value.dtype in floating else value
        )

    def zip(self, other: Call, mix: Callable[[Tensor, Tensor], Tensor]) -> Call:
        """Combine with another call of the same unit, tensor by tensor, where there are rows."""
        others = dict(leaves({**_numbered(other.args), **other.kwargs}))
        return self._mapped(lambda path, value: mix(value, others[path]) if path in self.rows else value)

    def _mapped(self, change: Callable[[str, Any], Any]) -> Call:
        args = tuple(mapped(value, change, str(i)) for i, value in enumerate(self.args))
        return replace(
            self, args=args, kwargs={name: mapped(value, change, name) for name, value in self.kwargs.items()}
        )

    def __call__(self, module: nn.Module) -> list[Tensor]:
        """Run a unit on these arguments; the tensors that it puts out."""
        return tensors_of(module(*self.args, **self.kwargs))


def tensors_of(result: Any) -> list[Tensor]:
    """The tensors in what a unit puts out: a tensor, a tuple of tensors and Nones, or a denoiser's output."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, tuple):
        return [part for part in result if isinstance(part, Tensor)]
    return [result.sample]


def join(calls: Sequence[Call]) -> Call:
    """Batches of calls as one call."""
    first = calls[0]
    parts = [dict(leaves({**_numbered(call.args), **call.kwargs})) for call in calls]
    rows = frozenset.intersection(*(call.rows for call in calls))

    def joined(path: str, value: Any) -> Any:
        return torch.cat([part[path] for part in parts]) if path in rows else value

    return replace(first._mapped(joined), rows=rows)


def rows_of(call: Call, rows: Tensor) -> Call:
    """Some rows of a joined call."""
    return call.map(lambda value: value[rows])


def _numbered(args: tuple[Any, ...]) -> dict[str, Any]:
    return {str(i): value for i, value in enumerate(args)}
