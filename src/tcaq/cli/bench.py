"""`tcaq bench`: how fast, how large and how close to float a checkpoint is, beside other ways to run the same model."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from rich.table import Table

from tcaq.bench.bout import Bout
from tcaq.bench.contenders import CONTENDERS
from tcaq.bench.measure import FLOAT, Benchmark, Settings, benchmark
from tcaq.cli.app import app, console, notes
from tcaq.cli.models import open_float
from tcaq.errors import UsageError
from tcaq.records import write_json

OURS = "bf16,fake,integer,onnx,openvino"
"""By default: what needs neither a compiler nor another tool."""


@app.command("bench")
def bench_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that `tcaq quantize` wrote.")],
    reference: Annotated[str, typer.Option(help="The float MODEL it was made from.")],
    against: Annotated[str, typer.Option(help=f"all, or some of: {', '.join(CONTENDERS)}.", metavar="NAME,...")] = OURS,
    batches: Annotated[str, typer.Option(help="Images at a time.", metavar="N,...")] = "1,8",
    size: Annotated[int | None, typer.Option(min=8, help="Height and width.", show_default="the model's")] = None,
    repeat: Annotated[int, typer.Option(min=1, help="Timed repetitions, in turn; the median counts.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps of the compared images.")] = 10,
    images: Annotated[int, typer.Option(min=1, help="Compared images.")] = 4,
    memory: Annotated[bool, typer.Option("--memory", help="Peak memory too, each in a process of its own.")] = False,
    work: Annotated[Path | None, typer.Option(help="Folder that keeps what is built.", show_default="none")] = None,
    as_json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result here.")] = None,
) -> None:
    """Time a checkpoint beside its float original and other tools' models, all in one run, with the PSNR of each to float."""
    names = list(CONTENDERS) if against == "all" else [name.strip() for name in against.split(",")]
    settings = Settings(batches=_numbers(batches), size=size, repeat=repeat, steps=steps, images=images, memory=memory)
    with TemporaryDirectory(prefix="tcaq-bench-") as temporary:
        bout = Bout(folder, reference, work or Path(temporary), lambda: open_float(reference))
        result = benchmark(bout, names, settings, lambda text: notes.print(text, highlight=False))
    if as_json is not None:
        write_json(as_json, result.model_dump(mode="json"))
    console.print(bench_table(result))
    for row in result.rows:
        if row.problem is not None:
            said = row.name if row.seconds else f"{row.name} left out"
            notes.print(f"{said}: {row.problem}", markup=False, highlight=False)


def _numbers(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"--batches {text!r}: give whole numbers from 1, with commas between them")
    return tuple(int(part) for part in parts)


def bench_table(result: Benchmark) -> Table:
    """A row for each contender that ran: milliseconds a step with the ratio to float, images a second, fidelity, memory, size."""
    batches, steps = result.settings.batches, result.settings.steps
    where = f"{result.processor}, {'with' if result.vnni else 'no'} VNNI, {result.threads} threads"
    times = [f"ms a step, batch {n}" for n in batches]
    table = Table("model", *times, f"images/s, {steps} steps", "PSNR to float", "memory", "size", title=where)
    base = next(row.seconds for row in result.rows if row.name == FLOAT)
    for row in result.rows:
        if row.seconds:
            seconds = {n: result.calls_a_step * row.seconds[n] for n in batches}
            cells = (f"{1e3 * seconds[n]:.1f} ({base[n] / row.seconds[n]:.2f}x)" for n in batches)
            rate = max(n / (steps * seconds[n]) for n in batches)
            closeness = "" if row.psnr is None else f"{row.psnr:.1f} dB"
            table.add_row(row.name, *cells, f"{rate:.3g}", closeness, _mebibytes(row.memory), _mebibytes(row.size))
    return table


def _mebibytes(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:.1f} MiB"
