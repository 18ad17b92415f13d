"""`tcaq compare`: several recipes at several widths, one protocol, one table."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from diffusers import DiffusionPipeline
from rich.table import Table
from torch import Tensor

from tcaq.checkpoint import load
from tcaq.cli import options as opt
from tcaq.cli.app import app, console, notes
from tcaq.cli.asking import asks
from tcaq.cli.checking import check_asked, find_features
from tcaq.cli.models import executed, open_float, placed
from tcaq.cli.progress import stage_progress
from tcaq.errors import RunError, UsageError
from tcaq.evaluate.evaluate import versions
from tcaq.evaluate.features import load_features
from tcaq.evaluate.protocol import Protocol, evaluate
from tcaq.evaluate.real import load_real
from tcaq.evaluate.sampling import sample_for_evaluation
from tcaq.models.prompting import resolve_conditions
from tcaq.recipes.quantize import RUN_FOLDER, outcome
from tcaq.recipes.registry import RECIPES
from tcaq.records import read_json, replacing, write_json
from tcaq.report.comparison import HEADINGS, markdown, rows, write_comparison
from tcaq.report.grid import side_by_side
from tcaq.report.story import weight_bytes
from tcaq.runs import Run
from tcaq.spec.conditions import Conditions
from tcaq.spec.plan import Plan
from tcaq.spec.recipe import Recipe

SHOWN = 16


@dataclass(frozen=True)
class Cell:
    """A recipe at a width. Attributes: label: what the table calls it; plan: rules in place of the recipe's own."""

    label: str
    recipe: Recipe
    plan: Plan | None = None

    @property
    def bits(self) -> str:
        """As the command takes it."""
        return f"w{self.recipe.weights}a{self.recipe.activations}"

    @property
    def content(self) -> dict[str, Any]:
        """All that makes it what it is, whatever the files are called that say so; the seed changes from run to run."""
        values = outcome(self.recipe)
        del values["seed"]
        return values if self.plan is None else values | {"rules": self.plan.model_dump(mode="json")}

    def folder(self, output: Path, seed: int) -> Path:
        """Where its checkpoint goes."""
        return output / "cells" / f"{self.label}-{self.bits}-{seed}"


@app.command("compare")
@asks
def compare_command(
    model: opt.ModelArgument,
    output: Annotated[Path, typer.Option(help="Folder for everything; run again to go on.")],
    recipes: Annotated[str, typer.Option(help="Names or recipes' JSON files, with commas between.")] = ",".join(
        RECIPES
    ),
    bits: Annotated[
        str, typer.Option(help="Widths of weights and activations, with commas between.")
    ] = "w8a8,w6a6,w4a8,w4a4",
    preset: opt.PresetOption = None,
    plan: opt.PlanOption = None,
    num: Annotated[int, typer.Option(min=SHOWN, help="Images of each model and seed.")] = 2000,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps.")] = 50,
    seeds: Annotated[
        str, typer.Option(help="Each seed calibrates anew and samples anew; calibration and evaluation share no noise.")
    ] = "1",
    features: opt.FeaturesOption = None,
    real: Annotated[
        Path | None, typer.Option(help="Real images (folder) or statistics (.npz), if the extractor brings none.")
    ] = None,
    asked: Conditions | None = None,
    execution: opt.ExecutionOption = opt.Execution.FAKE,
    device: opt.DeviceOption = opt.DEVICE,
) -> None:
    """Quantize MODEL by every recipe at every width, measure all of them alike, and write compare.json, .md and .html."""
    cells = list(parse_cells(recipes, bits, preset, plan, asked))
    numbers = parse_seeds(seeds)
    pipe = placed(open_float(model), device)
    check_asked(pipe, steps, resolve_conditions(pipe, asked))
    extractor = find_features(pipe, features, asked, real)
    protocol = {
        "model": model, "preset": preset or opt.PRESET, "images": num, "steps": steps, "versions": versions(),
    }  # fmt: skip
    given = {
        "features": extractor and extractor.name, "plan": plan, "real": real and str(real),
        "conditions": asked and asked.model_dump(mode="json"), "device": None if device == opt.DEVICE else device,
        "execution": None if execution is opt.Execution.FAKE else execution.value,
    }  # fmt: skip
    protocol |= {name: value for name, value in given.items() if value is not None}
    results = open_results(output / "compare.json", protocol)
    entries = [entry_of(results, cell) for cell in cells]
    for cell, entry in zip(cells, entries, strict=True):
        for seed in numbers:
            if str(seed) in entry["seeds"]:
                continue
            notes.print(f"{cell.label} {cell.bits}, seed {seed}")
            entry["seeds"][str(seed)] = measure(model, cell, seed, protocol, output)
            write_json(output / "compare.json", results)
    finish(model, cells, numbers, results, output)


def parse_cells(
    recipes: str, bits: str, preset: str | None, plan: str | None, conditions: Conditions | None
) -> Iterator[Cell]:  # fmt: skip
    """Width by width, every recipe.

    Raises: UsageError for an unknown recipe, preset, width or plan, and for two cells of one name, before anything runs.
    """
    rules, names, there = opt.read_plan(plan), parts(recipes), set[tuple[str, str]]()
    if not names or not parts(bits):
        raise UsageError(f"--recipes {recipes!r}, --bits {bits!r}: give at least one of each")
    for width in parts(bits.lower()):
        found = re.fullmatch(r"w(\d+)a(\d+)", width)
        if found is None:
            raise UsageError(f"--bits {width!r}: give widths like w4a8, with commas between")
        for name in names:
            # a preset is for those that are named; of files alone it is refused
            applied = None if opt.is_file(name) and not all(map(opt.is_file, names)) else preset
            recipe = opt.make_recipe(
                name, applied, weights=int(found[1]), activations=int(found[2]), plan=plan, conditions=conditions
            )
            cell = Cell(Path(name).stem, recipe, rules)
            if (cell.label, cell.bits) in there:
                raise UsageError(
                    f"two cells are {cell.label} at {cell.bits}: give every recipe's file a name of its own"
                )
            there.add((cell.label, cell.bits))
            yield cell


def parts(text: str) -> list[str]:
    """What stands between commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def parse_seeds(seeds: str) -> list[int]:
    """Whole numbers. Raises: UsageError."""
    parts = [part.strip() for part in seeds.split(",")]
    if not all(part.isdecimal() for part in parts) or len(set(parts)) != len(parts):
        raise UsageError(f"--seeds {seeds!r}: give different whole numbers from 0, with commas between")
    return [int(part) for part in parts]


def open_results(path: Path, protocol: dict[str, Any]) -> dict[str, Any]:
    """What was measured so far. Raises: UsageError if it was measured by another protocol."""
    if not path.exists():
        return {"protocol": protocol, "cells": []}
    results: dict[str, Any] = read_json(path)
    there = results.get("protocol", {})
    # what one of them has not, say guidance, is another way as well
    if changed := [name for name in protocol | there if there.get(name) != protocol.get(name)]:
        lines = ", ".join(f"{name} {there.get(name)!r} there, {protocol.get(name)!r} now" for name in changed)
        raise UsageError(f"{path} was measured another way ({lines}); give another --output")
    return results


def entry_of(results: dict[str, Any], cell: Cell) -> dict[str, Any]:
    """The cell's entry in the results, made if it is not there. Raises: UsageError if it is of another recipe or plan."""
    content = cell.content
    entry: dict[str, Any] | None = next(
        (e for e in results["cells"] if (e["recipe"], e["bits"]) == (cell.label, cell.bits)), None
    )
    if entry is None:
        results["cells"].append(entry := {"recipe": cell.label, "bits": cell.bits, "seeds": {}})
    if not entry["seeds"]:
        entry["content"] = content
    was = entry.get("content", content)
    if changed := [name for name in content | was if content.get(name) != was.get(name)]:
        raise UsageError(
            f"{cell.label} at {cell.bits} was measured with other {', '.join(changed)}; "
            "give another --output, or the recipe's file another name"
        )
    return entry


def measure(model: str, cell: Cell, seed: int, protocol: dict[str, Any], output: Path) -> dict[str, Any]:
    """Quantize and evaluate one cell with one seed; both go on where they stopped."""
    folder = cell.folder(output, seed)
    make_checkpoint(model, cell, seed, protocol, output)
    with stage_progress() as on_progress:
        how = evaluation(protocol, seed, output)
        original = placed(open_float(model), device_in(protocol))
        result, _, _ = evaluate(original, quantized_in(protocol, folder), how, on_progress)
    timings = Run.read(folder / RUN_FOLDER).timings().values()
    return {
        "quantize_seconds": round(sum(t["seconds"] for t in timings), 1),
        "quantize_peak_memory": max(t["peak_memory"] for t in timings),
        "weight_bytes": weight_bytes(folder),
        "evaluation": result.model_dump(mode="json"),
    }


def make_checkpoint(model: str, cell: Cell, seed: int, protocol: dict[str, Any], output: Path) -> None:
    """Quantize in a process of its own, so that its peak memory is its own. Raises: RunError if that fails."""
    recipe = output / "recipes" / f"{cell.label}-{cell.bits}.json"
    write_json(recipe, cell.recipe.model_dump(mode="json"))
    command = [
        sys.executable, "-m", "tcaq", "quantize", model, "--output", cell.folder(output, seed), "--recipe", recipe,
        "--seed", seed, "--share", output / "trajectories", "--device", device_in(protocol),
    ]  # fmt: skip
    command += ["--plan", protocol["plan"]] if "plan" in protocol else []
    code = subprocess.run([str(part) for part in command], stdout=subprocess.DEVNULL, check=False).returncode
    if code != 0:
        raise RunError(f"quantizing {cell.label} {cell.bits} with seed {seed} ended with exit code {code}; see above")


def device_in(protocol: dict[str, Any]) -> str:
    """Where the protocol says that models compute."""
    return str(protocol.get("device", opt.DEVICE))


def quantized_in(protocol: dict[str, Any], folder: Path) -> DiffusionPipeline:
    """A checkpoint where and how the protocol says that it runs."""
    pipe = placed(load(folder), device_in(protocol))
    return executed(pipe, opt.Execution(protocol.get("execution", opt.Execution.FAKE)))


def evaluation(protocol: dict[str, Any], seed: int, output: Path) -> Protocol:
    """The protocol of one seed."""
    extractor = load_features(protocol["features"]) if "features" in protocol else None
    real, conditions = protocol.get("real"), protocol.get("conditions")
    return Protocol(
        extractor=extractor, work=output / "samples", num=protocol["images"], steps=protocol["steps"], seed=seed,
        real=None if real is None or extractor is None else load_real(Path(real), extractor),
        conditions=None if conditions is None else Conditions.parse(conditions, where="--conditions"),
    )  # fmt: skip


def finish(model: str, cells: list[Cell], seeds: list[int], results: dict[str, Any], output: Path) -> None:
    """Print the table and write it as Markdown and as a page with samples of the first seed."""
    samples: dict[str, list[tuple[str, Tensor]]] = {}
    how = evaluation(results["protocol"], seeds[0], output)
    float_images = first_images(placed(open_float(model), device_in(results["protocol"])), how)
    for cell in cells:
        images = first_images(quantized_in(results["protocol"], cell.folder(output, seeds[0])), how)
        samples.setdefault(cell.bits, [("float", float_images)]).append((cell.label, images))
    for bits, strips in samples.items():
        with replacing(output / f"samples-{bits}.png") as path:
            side_by_side(strips, columns=SHOWN).save(path, format="PNG")
    with replacing(output / "compare.md") as path:
        path.write_text(markdown(results), encoding="utf-8")
    write_comparison(output / "compare.html", f"Recipes compared: {model}", results, samples)
    table = Table()
    for heading in HEADINGS:
        table.add_column(heading, overflow="fold")  # a narrow terminal breaks figures rather than cut them
    for row in rows(results):
        table.add_row(*row)
    console.print(table)
    console.print(f"open {output / 'compare.html'} in a browser")


def first_images(pipe: Any, how: Protocol) -> Tensor:
    """Some of a model's evaluation images, which are on disk by now."""
    sampled = sample_for_evaluation(
        pipe, how.work, num=how.num, steps=how.steps, seed=how.seed, batch=how.batch, conditions=how.conditions
    )  # fmt: skip
    return sampled.images[:SHOWN]
