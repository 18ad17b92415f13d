"""The demo on the bundled model, with a preset that is cut down to seconds."""

from __future__ import annotations

import json

from PIL import Image
from typer.testing import CliRunner

from tcaq.cli import app
from tcaq.recipes.presets import PRESETS
from tcaq.report.table import number
from tests.report.reading import Page

TINY = {
    "calibration": {"images": 2, "steps": 2},
    "ranges": {"input_candidates": 4, "weight_candidates": 4, "values": 500},
    "reconstruction": {"iterations": 2, "inputs": 4, "batch": 4},
    "alignment": None,
    "network": {"iterations": 2, "inputs": 4, "batch": 4},
}


def test_demo_writes_models_figures_and_page(tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "quick", TINY)
    result = CliRunner().invoke(app, ["demo", "--output", str(tmp_path), "--num", "32", "--steps", "2"])
    assert result.exit_code == 0, result.output
    scores = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in ("tcaq", "minmax")}
    assert scores["tcaq"]["float"] == scores["minmax"]["float"]  # the float model is sampled once
    assert scores["tcaq"]["paired"]["psnr"] > scores["minmax"]["paired"]["psnr"]
    page = Page((tmp_path / "report.html").read_text())
    headings, *rows = page.table("The float model and its quantized versions")
    columns = [heading.rstrip(" ↓↑") for heading in headings]
    for name, program in (("TCAQ-DM W4A4", "tcaq"), ("min-max W4A4", "minmax")):
        (row,) = [dict(zip(columns, row, strict=True)) for row in rows if row[0] == name]
        assert row["FD"] == number(scores[program]["quantized"]["fd"])
        assert row["PSNR"] == number(scores[program]["paired"]["psnr"])
    with Image.open(tmp_path / "samples.png") as picture:
        assert picture.width > picture.height > 3 * 32
    assert (tmp_path / "tcaq" / "model_index.json").is_file()
