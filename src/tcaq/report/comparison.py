"""One table of several recipes at several widths: for a terminal, as Markdown, and as a page with samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from torch import Tensor

from tcaq.records import JSON
from tcaq.report.strips import strips
from tcaq.report.table import DASH, bytes_text, number, seconds_text
from tcaq.report.template import write_page

HEADINGS = ("Recipe", "Bits", "FD / float", "FD", "KID", "PSNR dB", "FD to float", "Quantization", "Memory", "Weights")


@dataclass(frozen=True)
class MeasuredCell:
    """A recipe at a width.

    seeds: what each seed gave - `quantize_seconds`, `quantize_peak_memory`, `weight_bytes` and `evaluation`.
    """

    recipe: str
    bits: str
    seeds: Mapping[str, Mapping[str, JSON]]


def cells_of(results: Mapping[str, JSON]) -> list[MeasuredCell]:
    """The cells that the JSON of a comparison holds, those with a result."""
    found = [MeasuredCell(cell["recipe"], cell["bits"], cell["seeds"]) for cell in results["cells"]]
    return [cell for cell in found if cell.seeds]


def rows(results: Mapping[str, JSON]) -> list[tuple[str, ...]]:
    """The table's text under HEADINGS: the float model, then cell by cell."""
    cells = cells_of(results)
    return [_float_row(cells), *map(_row, cells)] if cells else []


def markdown(results: Mapping[str, JSON]) -> str:
    """The table as Markdown."""
    lines = [HEADINGS, ("---",) * len(HEADINGS), *rows(results)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def write_comparison(
    path: Path, title: str, results: Mapping[str, JSON], samples: Mapping[str, Sequence[tuple[str, Tensor]]]
) -> None:
    """Write the page. Args: samples: by width, label and images [N, C, H, W] of each model, the float one first."""
    context = {
        "title": title,
        "details": {name: str(value) for name, value in results["protocol"].items()},
        "headings": HEADINGS,
        "rows": rows(results),
        "blocks": {bits: strips(models, most=1) for bits, models in samples.items()},
    }
    write_page(path, "comparison.html.j2", context)


def spread(values: Sequence[float | None]) -> str:
    """Mean and, from two seeds on, standard deviation over seeds."""
    known = [value for value in values if value is not None]
    if not known:
        return DASH
    return number(mean(known)) + (f" ± {number(stdev(known))}" if len(known) > 1 else "")


def _row(cell: MeasuredCell) -> tuple[str, ...]:
    seeds = list(cell.seeds.values())
    scores = [seed["evaluation"] for seed in seeds]
    return (
        cell.recipe,
        cell.bits.upper(),
        spread([s["ratio"]["fd"] for s in scores]),
        spread([s["quantized"]["fd"] for s in scores]),
        spread([s["quantized"]["kid"] for s in scores]),
        spread([s["paired"]["psnr"] for s in scores]),
        spread([s["paired"]["fd_to_float"] for s in scores]),
        seconds_text(mean(seed["quantize_seconds"] for seed in seeds)),
        bytes_text(max(seed["quantize_peak_memory"] for seed in seeds)),
        bytes_text(seeds[0]["weight_bytes"]),
    )


def _float_row(cells: Sequence[MeasuredCell]) -> tuple[str, ...]:
    by_seed = {seed: result["evaluation"]["float"] for cell in cells for seed, result in cell.seeds.items()}
    scores = list(by_seed.values())
    known = any(score["fd"] is not None for score in scores)
    start = ("float", "32", "1" if known else DASH)
    return (*start, spread([s["fd"] for s in scores]), spread([s["kid"] for s in scores]), *(DASH,) * 5)
