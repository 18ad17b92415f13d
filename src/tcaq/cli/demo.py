"""`tcaq demo`: the main job on the bundled model, with a page to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tcaq.checkpoint import load
from tcaq.cli.app import app, console
from tcaq.cli.evaluate import scores_table
from tcaq.cli.judging import make_judge
from tcaq.cli.models import REFERENCE, open_float
from tcaq.cli.progress import stage_progress
from tcaq.cli.report import float_bytes
from tcaq.evaluate.evaluate import Evaluation
from tcaq.evaluate.features import load_features
from tcaq.evaluate.protocol import Protocol, evaluate
from tcaq.recipes.presets import preset_recipe
from tcaq.recipes.quantize import quantize
from tcaq.records import replacing, write_json
from tcaq.report.grid import side_by_side
from tcaq.report.page import Entry, Trial, write_report
from tcaq.runs import OnProgress

TITLES = {"tcaq": "TCAQ-DM W4A4", "minmax": "min-max W4A4"}
SHOWN = 32


@app.command("demo")
def demo_command(
    output: Annotated[Path, typer.Option(help="Folder for everything the demo makes.")] = Path("demo"),
    num: Annotated[int, typer.Option(min=SHOWN, help="Images of each model that are measured.")] = 200,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps.")] = 20,
    seed: Annotated[int, typer.Option(help="Seed of the measured images.")] = 1,
) -> None:
    """Quantize the bundled model to W4A4 with TCAQ-DM and with min-max, sample, measure, and write report.html."""
    protocol = Protocol(load_features(REFERENCE), output / "evaluation", num, steps, seed)
    results: dict[str, Evaluation] = {}
    entries: list[Entry] = []
    with stage_progress() as on_progress:
        for program, title in TITLES.items():
            make_checkpoint(program, output / program, prefixed(on_progress, program))
            pipe = load(output / program)
            result, float_, quantized = evaluate(open_float(REFERENCE), pipe, protocol, prefixed(on_progress, program))
            results[title] = result
            scores = result.model_dump(mode="json")
            write_json(output / f"{program}.json", scores)
            trial = Trial(f"DDIM, {steps} steps", scores, quantized.images[:SHOWN], float_.images[:SHOWN])
            entries.append(Entry(title, output / program, [trial]))
    rows = [("float", float_.images), *((entry.name, entry.trials[0].images) for entry in entries)]
    with replacing(output / "samples.png") as path:
        side_by_side(rows, columns=SHOWN // 2).save(path, format="PNG")
    details = {"model": "bundled reference", "preset": "quick"}
    title = "TCAQ-DM at 4 bits: the bundled model"
    write_report(output / "report.html", title, entries, details, float_bytes=float_bytes(REFERENCE))
    console.print(scores_table(results))
    console.print(f"open {output / 'report.html'} in a browser")


def make_checkpoint(program: str, folder: Path, on_progress: OnProgress) -> None:
    """Quantize the bundled model at the quick preset."""
    recipe = preset_recipe(program, "quick")
    quantize(open_float(REFERENCE), recipe, folder, judge=make_judge(REFERENCE, None), on_progress=on_progress)


def prefixed(on_progress: OnProgress, prefix: str) -> OnProgress:
    """Progress under a prefix, so that stages of two runs do not share a bar."""
    return lambda stage, done, total, resumed: on_progress(f"{prefix}: {stage}", done, total, resumed)
