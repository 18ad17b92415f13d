"""The notebook under `examples/` runs as it stands, offline."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

NOTEBOOK = Path(__file__).parents[1] / "examples" / "quantize.ipynb"


def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    names: dict = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []  # pictures would make it large, and old
            exec("".join(cell["source"]), names)
    original, images, integers = (names[name].float() for name in ("original", "images", "in_integers"))
    assert (original - images).abs().mean() < 8  # of 255
    assert (images - integers).abs().mean() < 8
    assert not torch.equal(original, images)
    assert names["picture"].width > 8 * 32
    assert type(DiffusionPipeline.from_pretrained("notebook-w8a8")).__name__ == "DDIMPipeline"
