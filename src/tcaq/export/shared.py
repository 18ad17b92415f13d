"""A batch's images shared out among threads, each of which computes its own from the first operator to the last.

ONNX Runtime shares work within an operator, but transpositions, concatenations and normalizations run on one thread: on two cores a
seventh of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tcaq.export.runtime import Predict

UNEVEN = 1.25
"""The largest share of a batch over a fair one, up to which it is shared out."""


class Shared:
    """Predicts with one thread for all operators of an image, or with all threads for each operator where images are few.

    Either way needs a session of its own, and one is kept: samplers seldom change the size of a batch.
    """

    def __init__(
        self, single: Predict, opened: Callable[[int], Predict], by_image: Sequence[bool], threads: int
    ) -> None:
        """Args: single: a session of one thread, which several threads may call at once; opened: makes one of so many; by_image:
        for each input, whether it has a row for each image."""
        self._kept, self._opened = (1, single), opened
        self._by_image, self._threads, self._pool = by_image, threads, ThreadPoolExecutor(threads)

    def __call__(self, *arrays: NDArray[Any]) -> NDArray[np.float32]:
        """See Predict."""
        images = min((len(array) for array, own in zip(arrays, self._by_image, strict=True) if own), default=1)
        if not self._worth_sharing(images):
            return self._session(self._threads)(*arrays)
        session, shares = self._session(1), zip(*map(self._shares, arrays, self._by_image), strict=True)
        return np.concatenate(list(self._pool.map(lambda share: session(*share), shares)))

    def _worth_sharing(self, images: int) -> bool:
        return -(-images // self._threads) * self._threads <= UNEVEN * images

    def _shares(self, array: NDArray[Any], by_image: bool) -> list[NDArray[Any]]:
        return np.array_split(array, self._threads) if by_image else [array] * self._threads

    def _session(self, threads: int) -> Predict:
        if self._kept[0] != threads:
            self._kept = threads, self._opened(threads)
        return self._kept[1]
