"""The figure of how speed changes as work grows, from what `speed.py` measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

LABELS = {"bf16": "bf16", "integer": "integer", "integer-fused": "integer, fused attention"}
COLORS = {"bf16": "#8a8f98", "integer": "#3f7fae", "integer-fused": "#d98b3a"}
TITLES = {"cifar10": "U-Net of DDPM CIFAR-10, 35.7 M parameters", "reference": "bundled model, 1.5 M parameters"}


def ratios(growth: Mapping[str, Any]) -> dict[str, dict[str, dict[int, float]]]:
    """How many times as fast as fp32: by `batch` or `size`, contender, and number."""
    by_batch = {int(n): _seconds(growth["batch"], n) for n in growth["batch"]["rows"][0]["seconds"]}
    by_size = {int(n): _seconds(found, "1") for n, found in growth["size"].items()}
    names = [name for name in LABELS if all(name in of for of in by_batch.values())]
    return {
        axis: {name: {n: of["fp32"] / of[name] for n, of in sorted(found.items())} for name in names}
        for axis, found in (("batch", by_batch), ("size", by_size))
    }


def _seconds(found: Mapping[str, Any], batch: str) -> dict[str, float]:
    return {row["name"]: row["seconds"][batch] for row in found["rows"] if row["problem"] is None}


def draw(results: Mapping[str, Any], width: str, path: Path) -> None:
    """A row for each model: speed over batch, and over height and width."""
    models = [name for name in TITLES if name in results]
    figure = Figure(figsize=(9, 3.2 * len(models)), layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subplots(len(models), 2, squeeze=False, sharey=True)
    for name, (left, right) in zip(models, rows, strict=True):
        found = ratios(results[name][width]["growth"])
        _plot(left, found["batch"], f"{TITLES[name]}: images at a time", "times as fast as fp32")
        _plot(right, found["size"], "height and width of one image", "")
    figure.legend(*rows[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=len(LABELS))
    figure.savefig(path, dpi=110)


def _plot(axes: Axes, curves: Mapping[str, Mapping[int, float]], label: str, vertical: str) -> None:
    for name, curve in curves.items():
        axes.plot(list(curve), list(curve.values()), marker="o", color=COLORS[name], label=LABELS[name])
    axes.axhline(1.0, color="#444444", linewidth=0.8)
    ticks = list(next(iter(curves.values())))
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel(label)
    axes.set_ylabel(vertical)
    axes.grid(axis="y", linewidth=0.4)
