"""Trajectories of the float model, sampled once for several quantizations of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from tcaq.records import Record, canonical
from tcaq.runs import Run

SHARED = ("weights", "scheduler", "versions")
OPTIONAL = ("conditioners",)
"""Of a run's identity, what float trajectories depend on beside the calibration's size and seed; only some have the latter."""


def share_collection(
    folder: Path, identity: dict[str, Any], items: Sequence[str], compute: Callable[[str], Record]
) -> Callable[[str], Record]:
    """A source of `items` that computes all of them, once, in a run of its own below `folder`.

    Args: identity: of the quantization; quantizations that differ only in what does not matter here find the same run.
    """
    recipe = identity["recipe"]
    calibration = recipe["calibration"]
    sizes = {name: calibration[name] for name in ("images", "steps", "batch", "conditions") if name in calibration}
    known = {name: identity[name] for name in (*SHARED, *OPTIONAL) if name in identity}
    who = known | {"calibration": sizes, "seed": recipe["seed"]}
    found: dict[str, Record] = {}

    def obtain(item: str) -> Record:
        if not found:
            with Run.share(folder / sha256(canonical(who).encode()).hexdigest()[:12], who) as run:
                run.series("collect", items, compute, found.__setitem__)
        return found[item]

    return obtain
