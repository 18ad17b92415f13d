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
from tcaq.report.figures import Curve, daq_figure, loss_figure, noise_figure, ranges_figure, sqnr_figure
from tcaq.report.story import Choice, EqualizedLayer, Story, imbalance, read_story, spread, weight_bytes
from tcaq.report.strips import strips
from tcaq.report.template import write_page
from tcaq.spec.plan import LayerGrids

TELLING_LAYERS = 3


@dataclass(frozen=True)
class Entry:
    """One quantized model.

    name: how the page calls it; folder: its checkpoint, with the run in it; evaluation: the JSON of `tcaq evaluate`,
    None if it was not evaluated; images: uint8 [N, C, H, W], image i from the same seed as the float model's image i.
    """

    name: str
    folder: Path
    evaluation: Mapping[str, JSON] | None
    images: Tensor


def write_report(
    path: Path,
    title: str,
    entries: Sequence[Entry],
    float_images: Tensor,
    details: Mapping[str, str],
    *,
    float_bytes: int | None = None,
) -> None:
    """Write the page, replacing `path` in one go. Equal inputs give equal bytes.

    Args: float_images: uint8 [N, C, H, W], the float model's; details: lines under the title, as label and text;
        float_bytes: size of the float denoiser's weight files, if known.
    Raises: UsageError for two entries of one name, or images no grid can show; RunError if a run cannot be read or
        the page cannot be written.
    """
    names = [entry.name for entry in entries]
    if len(set(names)) != len(names):
        raise UsageError(f"entries of a report need names that differ, given {', '.join(map(repr, names))}")
    write_page(path, "page.html.j2", _context(title, entries, float_images, details, float_bytes))


def _context(
    title: str, entries: Sequence[Entry], float_images: Tensor, details: Mapping[str, str], float_bytes: int | None
) -> dict[str, Any]:
    stories = [read_story(entry.folder) for entry in entries]
    measured = [
        table.Measured(e.name, s.bits, e.evaluation, weight_bytes(e.folder), s.seconds)
        for e, s in zip(entries, stories, strict=True)
    ]
    blocks = table.blocks(measured, float_bytes)
    curves = [curve for entry in entries if (curve := _curve(entry)) is not None]
    return {
        "title": title,
        "details": details,
        "columns": table.columns(blocks),
        "blocks": blocks,
        "strips": strips([("float", float_images), *((e.name, e.images) for e in entries)]),
        "sqnr": sqnr_figure(curves, "sqnr") if curves else None,
        "parts": [_part(e, s, f"entry-{i}") for i, (e, s) in enumerate(zip(entries, stories, strict=True))],
    }


def _part(entry: Entry, story: Story, name: str) -> dict[str, Any]:
    """What the page shows of one entry alone; a missing stage leaves its key empty."""
    return {
        "id": name,
        "name": entry.name,
        "bits": story.bits,
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
        "evaluation_versions": _pretty(entry.evaluation["versions"]) if entry.evaluation else None,
        "protocol": table.protocol(entry.evaluation),
        "seed": story.recipe["seed"],
        "costs": [(c.stage, table.seconds_text(c.seconds), table.bytes_text(c.peak_memory)) for c in story.costs],
        "total": table.seconds_text(story.seconds),
        "number": table.number,
    }


def _curve(entry: Entry) -> Curve | None:
    steps = entry.evaluation["paired"]["sqnr_per_step"] if entry.evaluation else []
    return Curve(entry.name, [s["timestep"] for s in steps], [s["sqnr"] for s in steps]) if steps else None


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
