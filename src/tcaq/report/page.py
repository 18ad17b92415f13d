"""The page: what `Entry` objects tell, laid out by a template into one HTML file that needs nothing beside itself."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tcaq.errors import UsageError
from tcaq.records import JSON
from tcaq.report import table
from tcaq.report.figures import (
    Curve,
    daq_figure,
    layer_widths_figure,
    loss_figure,
    noise_figure,
    ranges_figure,
    sqnr_figure,
    widths_figure,
)
from tcaq.report.story import Choice, EqualizedLayer, StepWidths, Story, imbalance, read_story, spread, weight_bytes
from tcaq.report.strips import strips
from tcaq.report.template import write_page
from tcaq.spec.plan import LayerGrids

TELLING_LAYERS = 3


@dataclass(frozen=True)
class Trial:
    """Both models sampled in one way, from the same seeds.

    sampler: what the page calls it, such as "DDIM, 50 steps"; evaluation: the JSON of `tcaq evaluate`, None if it was not
    evaluated; images, float_images: uint8 [N, C, H, W], the quantized and the float model's.
    """

    sampler: str
    evaluation: Mapping[str, JSON] | None
    images: Tensor
    float_images: Tensor


@dataclass(frozen=True)
class Entry:
    """One quantized model: how the page calls it, its checkpoint's folder with the run in it, and how it was sampled."""

    name: str
    folder: Path
    trials: Sequence[Trial]


def write_report(
    path: Path, title: str, entries: Sequence[Entry], details: Mapping[str, str], *, float_bytes: int | None = None
) -> None:
    """Write the page, replacing `path` in one go. Equal inputs give equal bytes.

    Args: details: lines under the title, as label and text; float_bytes: size of the float denoiser's weight files, if known.
    Raises: UsageError for two entries of one name, or images no grid can show; RunError if a run cannot be read or
        the page cannot be written.
    """
    names = [entry.name for entry in entries]
    if len(set(names)) != len(names):
        raise UsageError(f"entries of a report need names that differ, given {', '.join(map(repr, names))}")
    write_page(path, "page.html.j2", _context(title, entries, details, float_bytes))


def _context(
    title: str, entries: Sequence[Entry], details: Mapping[str, str], float_bytes: int | None
) -> dict[str, Any]:
    stories = [read_story(entry.folder) for entry in entries]
    measured = [
        table.Measured(entry.name, story.bits, trial.evaluation, weight_bytes(entry.folder), story.seconds)
        for entry, story in zip(entries, stories, strict=True)
        for trial in entry.trials
    ]
    blocks = table.blocks(measured, float_bytes)
    curves = _curves(entries)
    return {
        "title": title,
        "details": details,
        "columns": table.columns(blocks),
        "blocks": blocks,
        "samplers": _samplers(entries),
        "sqnr": sqnr_figure(curves, "sqnr") if curves else None,
        "parts": [_part(e, s, f"entry-{i}") for i, (e, s) in enumerate(zip(entries, stories, strict=True))],
    }


def _samplers(entries: Sequence[Entry]) -> dict[str, list[list[dict[str, str]]]]:
    """For each way of sampling, strips of images: the float model's row, and a row for each entry that has it."""
    rows: dict[str, list[tuple[str, Tensor]]] = {}
    for entry in entries:
        for trial in entry.trials:
            rows.setdefault(trial.sampler, [("float", trial.float_images)]).append((entry.name, trial.images))
    return {sampler: strips(models) for sampler, models in rows.items()}


def _curves(entries: Sequence[Entry]) -> list[Curve]:
    """A curve for each evaluation, named by its sampler too where the page has several."""
    several = len({trial.sampler for entry in entries for trial in entry.trials}) > 1
    curves = []
    for entry in entries:
        for trial in entry.trials:
            steps = trial.evaluation["paired"]["sqnr_per_step"] if trial.evaluation else []
            name = f"{entry.name}, {trial.sampler}" if several else entry.name
            if steps:
                curves.append(Curve(name, [s["timestep"] for s in steps], [s["sqnr"] for s in steps]))
    return curves


def _part(entry: Entry, story: Story, name: str) -> dict[str, Any]:
    """What the page shows of one entry alone; a missing stage leaves its key empty."""
    return {
        "id": name,
        "name": entry.name,
        "bits": story.bits,
        "by_layer": _by_layer(story, name),
        "widths": story.widths,
        "widths_figure": widths_figure(story.widths, f"{name}-widths") if story.widths else None,
        "width_rows": _width_rows(story.widths) if story.widths else [],
        "ranges": _ranges(story.equalized, name),
        "daq_figure": daq_figure(story.choices, f"{name}-daq") if story.choices else None,
        "daq_rows": _daq_rows(story.choices),
        "losses": story.losses,
        "loss_figure": loss_figure(story.losses, f"{name}-loss") if story.losses else None,
        "scores": story.scores,
        "noise": story.noise,
        "noise_figure": noise_figure(story.noise, f"{name}-noise") if story.noise else None,
        "criterion": story.recipe["daq"]["criterion"] if story.recipe["daq"] else None,
        "kept": min(story.scores, key=lambda score: score.fd).round if story.scores else None,
        "plan": story.plan,
        "plan_summary": _plan_summary(story.plan),
        "recipe": _pretty(story.recipe),
        "identity": _pretty({k: v for k, v in story.identity.items() if k not in ("recipe", "plan")}),
        "evaluation_versions": next((_pretty(t.evaluation["versions"]) for t in entry.trials if t.evaluation), None),
        "protocol": "; ".join(table.protocol(trial.evaluation) for trial in entry.trials),
        "seed": story.recipe["seed"],
        "costs": [(c.stage, table.seconds_text(c.seconds), table.bytes_text(c.peak_memory)) for c in story.costs],
        "total": table.seconds_text(story.seconds),
        "number": table.number,
    }


def _by_layer(story: Story, name: str) -> list[dict[str, Any]]:
    """What chose its width by layer, each with its figure."""
    found = {"weights": story.layer_widths, "inputs": story.input_widths}
    return [
        {"what": what, "layers": layers, "figure": layer_widths_figure(layers, f"{name}-{what}")}
        for what, layers in found.items()
        if layers
    ]


def _width_rows(widths: StepWidths) -> list[list[str]]:
    """A row for every calibration step: timestep, the forward process, each width, and the one that runs."""
    columns = [widths.forward, *widths.quantized.values()]
    return [
        [f"{t:g}", *(table.number(column[i]) for column in columns), str(bits)]
        for i, (t, bits) in enumerate(zip(widths.timesteps, widths.bits, strict=True))
    ]


def _ranges(layers: Sequence[EqualizedLayer], name: str) -> dict[str, Any] | None:
    """Figures of the layers whose r differs most between channels, and a row for every layer."""
    if not layers:
        return None
    ordered = sorted(layers, key=lambda layer: (-layer.contrast, layer.name))
    rows = [
        {
            "layer": layer.name,
            "channels": len(layer.vector),
            "r": [f"{value:.2f}" for value in spread(layer.vector)],
            "scaled": f"{float((layer.vector > 1).float().mean()):.0%}",
            "before": f"{imbalance(layer.maxima):.2f}",
            "after": f"{imbalance(layer.equalized):.2f}",
        }
        for layer in ordered
    ]
    figures = [ranges_figure(layer, f"{name}-range-{i}") for i, layer in enumerate(ordered[:TELLING_LAYERS])]
    return {"figures": list(zip(figures, rows, strict=False)), "rows": rows}


def _daq_rows(choices: Mapping[str, Sequence[Choice]]) -> list[dict[str, Any]]:
    rows = []
    for layer, groups in choices.items():
        ratios = sorted(choice.ratio for choice in groups)
        wins = sum((c.error_log2 < c.error_even) == c.use_log2 for c in groups)
        rows.append(
            {
                "layer": layer,
                "groups": len(groups),
                "log2": sum(choice.use_log2 for choice in groups),
                "ratios": [table.number(ratios[0]), table.number(ratios[-1])],
                "even_error": table.number(sum(c.error_even for c in groups) / len(groups)),
                "log2_error": table.number(sum(c.error_log2 for c in groups) / len(groups)),
                "wins": wins,
            }
        )
    return rows


def _plan_summary(plan: Sequence[LayerGrids]) -> str:
    """How many layers got which grids, the most frequent first."""
    counts = Counter("float" if layer.is_float else " × ".join(map(str, _grids(layer))) for layer in plan)
    return ", ".join(f"{count} at {grids}" for grids, count in counts.most_common())


def _grids(layer: LayerGrids) -> list[object]:
    return [grid for grid in (layer.weight, *layer.inputs) if grid is not None]


def _pretty(value: JSON) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)
