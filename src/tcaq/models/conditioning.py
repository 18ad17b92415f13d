"""Everything beside x_t and t that a denoiser was given along a sampling run, each distinct value kept once.

A text embedding is the same at every step; a table of it for each step would be many times the size of the images.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

from tcaq.errors import ModelError, UsageError
from tcaq.models.inputs import Inputs
from tcaq.models.store import Store

ABSENT = -1


@dataclass(frozen=True)
class Argument:
    """One argument over all calls.

    Attributes: values: its distinct values, each [images, ...] if `by_image`, else any tensor or plain value; index: int64 [calls],
        which of them a call was given, -1 for none.
    """

    values: tuple[Any, ...]
    index: Tensor
    by_image: bool

    def at(self, call: int) -> Any:
        """The value of one call; None if it had none."""
        which = int(self.index[call])
        return None if which == ABSENT else self.values[which]

    def form(self, call: int) -> Any:
        """What calls must have in common to be joined: the shape of a row, or which value all rows share."""
        which = int(self.index[call])
        return tuple(self.values[which].shape) if self.by_image and which != ABSENT else which

    def first(self, images: int) -> Argument:
        """Over the first images."""
        return replace(self, values=tuple(value[:images] for value in self.values)) if self.by_image else self

    def of(self, path: str, calls: Tensor, images: Tensor) -> Any:
        """The values of some images in some calls: [n, ...] if `by_image`, else the one that all of them share.

        Raises: UsageError if they cannot be put into one batch.
        """
        which, distinct = self.index[calls], self._common(path, calls)
        if len(distinct) == 1:
            value = None if distinct[0] == ABSENT else self.values[distinct[0]]
            return cast(Tensor, value)[images] if self.by_image and value is not None else value
        first = self.values[distinct[0]]
        rows = first.new_empty((len(which), *first.shape[1:]))
        for i in distinct:
            here = which == i
            rows[here] = self.values[i][images[here]]
        return rows

    def _common(self, path: str, calls: Tensor) -> list[int]:
        """The values that some calls were given, by number. Raises: UsageError if they cannot be put into one batch."""
        distinct: list[int] = self.index[calls].unique().tolist()
        if len(distinct) == 1:
            return distinct
        if ABSENT in distinct or not self.by_image or len({self.values[i].shape for i in distinct}) > 1:
            raise UsageError(
                f"the pipeline gives {path!r} in other shapes, or not at all, to some calls of its denoiser, so that their inputs "
                "make no common batch; pad prompts to one length"
            )
        return distinct


@dataclass(frozen=True)
class Conditioning:
    """The arguments by path; none for an unconditional model."""

    arguments: Mapping[str, Argument] = field(default_factory=dict)

    @staticmethod
    def recorded(calls: Sequence[Inputs]) -> Conditioning:
        """What a sequence of calls was given."""
        paths = dict.fromkeys(path for call in calls for path in (*call.rows, *call.whole))
        return Conditioning({path: _argument(path, calls) for path in paths})

    def at(self, call: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What one call was given, for all images: values by image, and values that they share."""
        found = {path: (argument.at(call), argument.by_image) for path, argument in self.arguments.items()}
        return _sorted(found)

    def of(self, calls: Tensor, images: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The same for one image of each of several calls, int64 [n] both. Raises: UsageError."""
        found = {path: (a.of(path, calls, images), a.by_image) for path, a in self.arguments.items()}
        return _sorted(found)

    def forms(self, calls: int) -> Tensor:
        """A number for each of `calls` calls, int64 [calls]: equal where their inputs make common batches.

        They do where each argument has a row for each image in one shape, or one value for all.
        """
        kinds = [tuple(argument.form(call) for argument in self.arguments.values()) for call in range(calls)]
        known = list(dict.fromkeys(kinds))
        return torch.tensor([known.index(kind) for kind in kinds])

    def first(self, images: int) -> Conditioning:
        """That of the first images."""
        return Conditioning({path: argument.first(images) for path, argument in self.arguments.items()})

    @staticmethod
    def join(parts: Sequence[Conditioning], store: Store | None = None) -> Conditioning:
        """That of several batches of images, images after images. Args: store: where it is put (None: memory)."""
        paths, store = dict.fromkeys(path for part in parts for path in part.arguments), store or Store()
        return Conditioning({p: _joined(p, [part.arguments.get(p) for part in parts], store) for p in paths})


def _sorted(found: Mapping[str, tuple[Any, bool]]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    given = {path: pair for path, pair in found.items() if pair[0] is not None}
    rows = {path: value for path, (value, by_image) in given.items() if by_image}
    return rows, {path: value for path, (value, _) in given.items() if path not in rows}


def _argument(path: str, calls: Sequence[Inputs]) -> Argument:
    values: list[Any] = []
    index: list[int] = []
    for call in calls:
        value = call.rows.get(path, call.whole.get(path))
        if value is None:
            index.append(ABSENT)
            continue
        which = next((i for i, other in enumerate(values) if same(other, value)), len(values))
        if which == len(values):
            values.append(value)
        index.append(which)
    by_image = {path in call.rows for call in calls if path in call.rows or path in call.whole}
    if len(by_image) > 1:
        raise _unclear(path)
    return Argument(tuple(values), torch.tensor(index), by_image.pop())


def _joined(path: str, parts: Sequence[Argument | None], store: Store) -> Argument:
    there = [part for part in parts if part is not None]
    first = there[0]
    if len(there) < len(parts) or any(part.by_image != first.by_image for part in there):
        raise _unclear(path)
    which = list(zip(*(part.index.tolist() for part in there), strict=True))
    distinct = [combination for combination in dict.fromkeys(which) if set(combination) != {ABSENT}]
    values = tuple(_merged(path, first.by_image, c, there, store) for c in distinct)
    index = [ABSENT if set(c) == {ABSENT} else distinct.index(c) for c in which]
    return Argument(values, torch.tensor(index), first.by_image)


def _merged(
    path: str, by_image: bool, combination: Iterable[int], parts: Sequence[Argument], store: Store
) -> Any:  # fmt: skip
    if ABSENT in combination:
        raise _unclear(path)
    values = [part.values[i] for part, i in zip(parts, combination, strict=True)]
    if by_image:
        if len({value.shape[1:] for value in values}) > 1:
            raise ModelError(f"the pipeline gives {path!r} in other shapes to other images; pad it to one length")
        return store.gather(values, (sum(map(len, values)), *values[0].shape[1:]), values[0])
    if not all(same(value, values[0]) for value in values):
        raise _unclear(path)
    return values[0]


def same(value: Any, other: Any) -> bool:
    """Whether two values are equal in type and content."""
    if value is other:
        return True
    if isinstance(value, Tensor) and isinstance(other, Tensor):
        return value.dtype == other.dtype and torch.equal(value, other)
    return type(value) is type(other) and bool(value == other)


def _unclear(path: str) -> ModelError:
    return ModelError(
        f"it is not clear whether the denoiser's argument {path!r} has a row for each image: batches disagree. Name it in "
        "`shared` of the architecture's table if it has none, or calibrate with another batch size"
    )
