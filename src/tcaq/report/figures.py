"""The figures of the page, each as inline SVG. A figure says nothing that the tables beside it do not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import NullFormatter
from numpy.typing import NDArray

from tcaq.report.story import Choice, EqualizedLayer, LayerWidth, NoiseFit, StepWidths, UnitLoss
from tcaq.report.svg import MUTED, PAPER, SERIES, render, style

WIDTH = 10.0
"""Inches; the page shows one inch as about 108 pixels."""
DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
EVEN, MIDDLE, LOG2 = "#d98b3a", "#ece9e4", "#3f7fae"
DIVERGING = LinearSegmentedColormap.from_list("even-log2", [EVEN, MIDDLE, LOG2])

Floats = NDArray[np.float64]
Colors = str | LinearSegmentedColormap


@dataclass(frozen=True)
class Curve:
    """SQNR in dB over timesteps."""

    label: str
    timesteps: Sequence[float]
    sqnr: Sequence[float]


def sqnr_figure(curves: Sequence[Curve], name: str) -> Markup:
    """Every entry's SQNR over the timesteps, sampling from left to right."""
    with style(name):
        figure = Figure(figsize=(WIDTH, 3.5), layout="constrained")
        axes = figure.subplots()
        for curve, color, dash in zip(curves, cycle(SERIES), cycle(DASHES), strict=False):
            axes.plot(curve.timesteps, curve.sqnr, color=color, linestyle=dash, linewidth=2, label=curve.label)
        axes.invert_xaxis()
        axes.set_xlabel("timestep (sampling runs from left to right, noise to image)")
        axes.set_ylabel("SQNR, dB")
        axes.grid(axis="y")
        axes.margins(x=0.01)
        figure.legend(loc="outside upper left", ncols=min(4, len(curves)), handlelength=3)
        ends = "; ".join(f"{c.label} {c.sqnr[0]:.1f} dB at first, {c.sqnr[-1]:.1f} dB at last" for c in curves)
        return render(figure, name, f"Line chart of the signal-to-quantization-noise ratio per timestep. {ends}.")


def ranges_figure(layer: EqualizedLayer, name: str) -> Markup:
    """Heat maps of log10 max|x| over steps and channels, before and after division by r, on one colour scale."""
    with style(name):
        order = layer.maxima.mean(dim=0).argsort(stable=True)
        parts = [_log10(values[:, order].double().numpy()) for values in (layer.maxima, layer.equalized)]
        norm = Normalize(min(float(np.nanmin(p)) for p in parts), max(float(np.nanmax(p)) for p in parts))
        figure = Figure(figsize=(WIDTH, 2.9), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for axes, values, title in ((left, parts[0], "before: max |x|"), (right, parts[1], "after: max |x / r|")):
            image = _heat(axes, values, "viridis", norm)
            axes.set_title(title)
            axes.set_xlabel("input channel, quietest to loudest")
        _label_steps(left, layer.timesteps.tolist())
        _scale(figure, image, [left, right], "log10 of the range")
        what = f"the input range of {layer.name} by step and channel"
        return render(figure, name, f"Two heat maps of {what}, before and after TCR.")


def daq_figure(choices: Mapping[str, Sequence[Choice]], name: str) -> Markup:
    """Four tile maps of layers against step groups: the choice, R, and the error of either grid."""
    groups = sorted({choice.group for rows in choices.values() for choice in rows})

    def table(field: str) -> Floats:
        found = {(n, c.group): float(getattr(c, field)) for n, rows in choices.items() for c in rows}
        return np.array([[found.get((n, group), np.nan) for group in groups] for n in choices])

    chosen, ratio = 2 * table("use_log2") - 1, table("ratio")
    errors = [_log10(table(field)) for field in ("error_even", "error_log2")]
    limit = max(float(np.nanmax(np.abs(ratio))), 1e-9)
    shared = Normalize(min(float(np.nanmin(e)) for e in errors), max(float(np.nanmax(e)) for e in errors))
    with style(name):
        figure = Figure(figsize=(WIDTH, 2.4 + 0.44 * len(choices)), layout="constrained")
        axes = figure.subplots(2, 2, sharex=True, sharey=True)
        images = [
            _tiles(axes[0, 0], chosen, "chosen grid", DIVERGING, Normalize(-1, 1), ["even", "", "log2"]),
            _tiles(axes[0, 1], ratio, "R: above 0 for log2, below for even", DIVERGING, Normalize(-limit, limit)),
            _tiles(axes[1, 0], errors[0], "log10 error of the even grid", "cividis", shared),
            _tiles(axes[1, 1], errors[1], "log10 error of the log2 grid", "cividis", shared),
        ]
        for row in axes:
            row[0].set_yticks(range(len(choices)), list(choices), fontsize=8)
        for column in axes[1]:
            column.set_xticks(_some(len(groups)), [str(groups[i]) for i in _some(len(groups))])
            column.set_xlabel("step group (0: least noise)")
        _scale(figure, images[1], list(axes[0]), "R")
        _scale(figure, images[3], list(axes[1]), "log10 error")
        picked = f"log2 in {int((chosen == 1).sum())} of {int(np.isfinite(chosen).sum())} tiles"
        return render(figure, name, f"Tile maps of DAQ by layer and step group: {picked}.")


def loss_figure(losses: Sequence[UnitLoss], name: str) -> Markup:
    """A line from the loss before to the loss after for every unit and round, on a log scale."""
    units = list(dict.fromkeys(loss.unit for loss in losses))
    rounds = sorted({loss.round for loss in losses})
    with style(name):
        figure = Figure(figsize=(WIDTH, 1.1 + len(units) * (0.16 + 0.08 * len(rounds))), layout="constrained")
        axes = figure.subplots()
        for index, (number, color) in enumerate(zip(rounds, cycle(SERIES), strict=False)):
            rows = [loss for loss in losses if loss.round == number]
            shift = 0.22 * (index - (len(rounds) - 1) / 2)
            y = [units.index(loss.unit) + shift for loss in rows]
            before, after = ([max(getattr(loss, f), 1e-12) for loss in rows] for f in ("before", "after"))
            axes.hlines(y, before, after, color=color, linewidth=1.6, alpha=0.55)
            for x, fill, moment in ((before, PAPER, "before"), (after, color, "after")):
                label = f"round {number}, {moment}"
                axes.plot(x, y, "o", color=color, markerfacecolor=fill, markersize=4.5, label=label)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_yticks(range(len(units)), units, fontsize=8)
        axes.set_ylim(len(units) - 0.4, -0.6)
        axes.set_xlabel("error of the unit's output, relative to its mean square (log scale)")
        axes.grid(axis="x")
        figure.legend(loc="outside upper left", ncols=min(3, len(rounds)) * 2, handletextpad=0.2, columnspacing=1.4)
        return render(figure, name, f"Loss of {len(units)} units before and after each of {len(rounds)} rounds.")


def noise_figure(noise: NoiseFit, name: str) -> Markup:
    """Slope and bias of quantization noise over the timesteps, sampling from left to right."""
    with style(name):
        figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
        panels = figure.subplots(1, 2)
        rows = ((noise.slope, "slope: the part that follows the prediction"), (noise.bias, "bias: RMS over channels"))
        for axes, (values, title), color in zip(panels, rows, SERIES, strict=False):
            axes.axhline(0.0, color=MUTED, linewidth=0.8)
            axes.plot(noise.timesteps, values, "o-", color=color, linewidth=1.6, markersize=3)
            axes.set_title(title)
            axes.invert_xaxis()
            axes.set_xlabel("timestep (noise to image)")
            axes.grid(axis="y")
        steepest = min(noise.slope)
        return render(
            figure, name, f"Two line charts of quantization noise by timestep; the slope falls to {steepest:.3f}."
        )


def widths_figure(widths: StepWidths, name: str) -> Markup:
    """Signal-to-noise ratios of every width and of the forward process over the timesteps, above the width that runs."""
    with style(name):
        figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        curves = [(f"{bits} bits", ratios) for bits, ratios in widths.quantized.items()]
        for (label, values), color, dash in zip(curves, cycle(SERIES), cycle(DASHES), strict=False):
            above.plot(widths.timesteps, values, color=color, linestyle=dash, linewidth=2, label=label)
        above.plot(widths.timesteps, widths.forward, color=MUTED, linewidth=1.2, label="to exceed: forward process")
        above.set_yscale("log")
        above.set_ylabel("signal to noise")
        above.grid(axis="y")
        below.step(widths.timesteps, widths.bits, where="mid", color=SERIES[0], linewidth=2)
        below.set_yticks(sorted(widths.quantized))
        below.set_ylabel("bits")
        below.invert_xaxis()
        below.set_xlabel("timestep (sampling runs from left to right, noise to image)")
        below.margins(x=0.01, y=0.25)
        figure.legend(loc="outside upper left", ncols=min(4, len(curves) + 1), handlelength=3)
        runs = "; ".join(f"{bits} bits from {first:g} to {last:g}" for first, last, bits, _ in widths.runs)
        return render(
            figure, name, f"Line charts of signal-to-noise ratios and the width that runs, by timestep: {runs}."
        )


def layer_widths_figure(layers: Sequence[LayerWidth], name: str) -> Markup:
    """The width of every layer's weight, beside what the narrowest and the chosen one do to predictions."""
    with style(name):
        figure = Figure(figsize=(WIDTH, 1.1 + 0.17 * len(layers)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=[1, 2])
        y = np.arange(len(layers))
        left.barh(y, [layer.bits for layer in layers], color=SERIES[0], height=0.7)
        left.set_xlabel("bits")
        narrow = [max(layer.sensitivity[min(layer.sensitivity)], 1e-12) for layer in layers]
        chosen = [max(layer.sensitivity[layer.bits], 1e-12) for layer in layers]
        right.hlines(y, narrow, chosen, color=SERIES[0], linewidth=1.6, alpha=0.55)
        right.plot(narrow, y, "o", color=SERIES[0], markerfacecolor=PAPER, markersize=4.5, label="at the fewest bits")
        right.plot(chosen, y, "o", color=SERIES[0], markersize=4.5, label="as it runs")
        right.set_xscale("log")
        right.xaxis.set_major_formatter("{x:g}")
        right.xaxis.set_minor_formatter(NullFormatter())
        right.set_xlabel("error of predictions; all together at one width make about 1 (log scale)")
        for axes in (left, right):
            axes.grid(axis="x")
        left.set_yticks(y, [layer.name for layer in layers], fontsize=8)
        left.set_ylim(len(layers) - 0.4, -0.6)
        figure.legend(loc="outside upper left", ncols=2, handletextpad=0.2)
        loudest = max(layers, key=lambda layer: layer.sensitivity[min(layer.sensitivity)])
        return render(
            figure, name,
            f"Bars of the bits of {len(layers)} layers beside the error that each makes; the most costly is {loudest.name}.",
        )  # fmt: skip


def _heat(axes: Axes, values: Floats, colors: Colors, norm: Normalize) -> AxesImage:
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0)
    return axes.imshow(values, cmap=colors, norm=norm, aspect="auto", interpolation="none")


def _tiles(
    axes: Axes, values: Floats, title: str, colors: Colors, norm: Normalize, words: Sequence[str] = ()
) -> AxesImage:
    """Tiles with seams between the rows; where there are few, each says its value (for -1, 0 and 1 its word, if given)."""
    image = _heat(axes, values, colors, norm)
    axes.set_title(title)
    rows, columns = values.shape
    axes.set_yticks(np.arange(rows + 1) - 0.5, minor=True)
    axes.grid(which="minor", axis="y", color=PAPER, linewidth=2)
    axes.tick_params(which="minor", length=0)
    if columns <= 10:
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                red, green, blue, _ = image.cmap(norm(value))
                dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
                text = words[int(value) + 1] if words else _short(value)
                color = "white" if dark else "#222222"
                axes.text(column, row, text, ha="center", va="center", fontsize=7.5, color=color)
    return image


def _short(value: float) -> str:
    """At most five characters or so, to fit a tile."""
    if abs(value) >= 1000:
        return f"{value / 1000:.1f}k"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.2g}"


def _scale(figure: Figure, image: AxesImage, axes: Sequence[Axes], label: str) -> None:
    """The colour scale on the right of some axes."""
    bar = figure.colorbar(image, ax=axes, label=label, fraction=0.025, pad=0.01)
    bar.ax.tick_params(length=0)
    for spine in bar.ax.spines.values():
        spine.set_visible(False)


def _label_steps(axes: Axes, timesteps: Sequence[float]) -> None:
    ticks = _some(len(timesteps))
    axes.set_yticks(ticks, [f"{timesteps[i]:g}" for i in ticks])
    axes.set_ylabel("timestep", color=MUTED)


def _some(count: int, most: int = 10) -> list[int]:
    """At most `most` positions out of `count`, evenly apart, the first among them."""
    return list(range(0, count, max(1, -(-count // most))))


def _log10(values: Floats) -> Floats:
    """log10, with a floor five decades under the largest value for channels that are always zero."""
    top = float(np.nanmax(values))
    result: Floats = np.log10(np.maximum(values, top * 1e-5 if top > 0 else 1e-12))
    return result
