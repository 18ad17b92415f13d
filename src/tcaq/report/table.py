"""The headline table: the float model and every entry in rows, one block for each way of measuring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tcaq.records import JSON

DASH = "–"


@dataclass(frozen=True)
class Column:
    """A heading, what it means, and whether low or high is good."""

    key: str
    heading: str
    meaning: str
    better: str = ""


COLUMNS = (
    Column("bits", "Bits", "of weights (W) and activations (A)"),
    Column("fd", "FD", "Fréchet distance between the samples and the real data", "lower"),
    Column("ratio", "FD / float", "the same, relative to that of the float model", "lower"),
    Column("kid", "KID", "kernel distance between the samples and the real data", "lower"),
    Column("fd_to_float", "FD to float", "Fréchet distance between the samples and those of the float model", "lower"),
    Column("psnr", "PSNR", "against the float model's image of the same seed, dB, mean over images", "higher"),
    Column("ssim", "SSIM", "structural similarity to the float model's image of the same seed, mean", "higher"),
    Column("size", "Weights", "size of the denoiser's weight files"),
    Column("sampling", "Sampling", "wall time of sampling all images; quantized models run their simulation here"),
    Column("memory", "Memory", "peak resident memory while sampling"),
    Column("quantization", "Quantization", "wall time of the whole quantization"),
)


@dataclass(frozen=True)
class Row:
    """A model's name and the text of its cells, by the key of their column."""

    name: str
    cells: Mapping[str, str]


@dataclass(frozen=True)
class Block:
    """Rows measured alike, under a line that says how."""

    protocol: str
    rows: Sequence[Row]


@dataclass(frozen=True)
class Measured:
    """What the table needs of one entry under one way of sampling."""

    name: str
    bits: str
    evaluation: Mapping[str, JSON] | None
    size: int | None
    seconds: float | None


def blocks(entries: Sequence[Measured], float_size: int | None) -> list[Block]:
    """Entries evaluated alike share a block, which the float model leads; those without an evaluation come last."""
    alike: dict[str, list[Measured]] = {}
    for entry in sorted(entries, key=lambda e: e.evaluation is None):
        alike.setdefault(protocol(entry.evaluation), []).append(entry)
    result = []
    for text, members in alike.items():
        first = members[0].evaluation
        lead = [] if first is None else [_float_row(first, float_size)]
        result.append(Block(text, lead + [_row(entry, float_size) for entry in members]))
    return result


def columns(blocks_: Sequence[Block]) -> list[Column]:
    """The columns in which some cell has a value."""
    return [c for c in COLUMNS if any(row.cells.get(c.key, DASH) != DASH for block in blocks_ for row in block.rows)]


def protocol(evaluation: Mapping[str, JSON] | None) -> str:
    """How an evaluation was made, in words."""
    if evaluation is None:
        return "Not evaluated"
    how = f"{evaluation['scheduler']}, {evaluation['steps']} steps"
    return f"{how}, N = {evaluation['num']}, seed {evaluation['seed']}, features {evaluation['features'] or 'none'}"


def _float_row(evaluation: Mapping[str, JSON], size: int | None) -> Row:
    ratio = None if evaluation["ratio"]["fd"] is None else 1.0
    cells = {"bits": "32", "ratio": number(ratio), "size": bytes_text(size)}
    return Row("float", cells | _scores(evaluation["float"]))


def _row(entry: Measured, float_size: int | None) -> Row:
    size = bytes_text(entry.size)
    if entry.size is not None and float_size:
        size += f" ({entry.size / float_size:.0%})"
    cells = {"bits": entry.bits, "size": size, "quantization": seconds_text(entry.seconds)}
    if entry.evaluation is not None:
        paired = entry.evaluation["paired"]
        cells |= _scores(entry.evaluation["quantized"]) | {"ratio": number(entry.evaluation["ratio"]["fd"])}
        cells |= {key: number(paired[key]) for key in ("psnr", "ssim", "fd_to_float")}
    return Row(entry.name, cells)


def _scores(scores: Mapping[str, JSON]) -> dict[str, str]:
    return {
        "fd": number(scores["fd"]),
        "kid": number(scores["kid"]),
        "sampling": seconds_text(scores["seconds"]),
        "memory": bytes_text(scores["peak_memory"]),
    }


def number(value: float | None) -> str:
    """Four significant digits, without an exponent where that stays readable."""
    if value is None:
        return DASH
    text = f"{value:.0f}" if abs(value) >= 1000 else f"{value:#.4g}".rstrip(".")
    return text.replace("-", "−")  # the sign of a number, not a hyphen


def seconds_text(value: float | None) -> str:
    """Seconds, from two minutes on in minutes, from two hours on in hours."""
    if value is None:
        return DASH
    for unit, length in (("h", 3600), ("min", 60)):
        if value >= 2 * length:
            return f"{value / length:.1f} {unit}"
    return f"{value:.1f} s"


def bytes_text(value: float | None) -> str:
    """Bytes in decimal units."""
    if value is None:
        return DASH
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if value >= size:
            return f"{value / size:#.3g}".rstrip(".") + f" {unit}"
    return f"{value / 1e3:.1f} kB"
