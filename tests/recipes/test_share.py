"""Float trajectories that several quantizations share."""

from __future__ import annotations

from pathlib import Path

import torch

from tcaq.recipes.share import share_collection
from tcaq.records import Record
from tcaq.runs import Run

IDENTITY = {
    "weights": "abc", "scheduler": {"class": "DDIM"}, "versions": {"tcaq": "0"},
    "recipe": {"program": "tcaq", "calibration": {"images": 4, "steps": 2, "batch": 2}, "seed": 1},
}  # fmt: skip
ITEMS = ["batch-0", "batch-1"]


def test_trajectories_are_made_once_and_read_beside_another_process(tmp_path: Path) -> None:
    computed: list[str] = []

    def compute(item: str) -> Record:
        computed.append(item)
        return Record({"x": torch.rand(3)})

    def obtain(program: str) -> list[torch.Tensor]:
        identity = IDENTITY | {"recipe": IDENTITY["recipe"] | {"program": program}}
        source = share_collection(tmp_path, identity, ITEMS, compute)
        return [source(item).tensors["x"] for item in ITEMS]

    first = obtain("tcaq")
    (folder,) = tmp_path.iterdir()
    with Run.open(folder, Run.read(folder).identity):
        second = obtain("minmax")
    assert computed == ITEMS
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
