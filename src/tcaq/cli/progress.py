"""Progress bars for stages, on standard error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from tcaq.cli.app import notes
from tcaq.runs import OnProgress, silent


@contextmanager
def stage_progress(quiet: bool = False) -> Iterator[OnProgress]:
    """A callback that draws one bar a stage; stages taken from disk say so."""
    if quiet:
        yield silent
        return
    columns = (
        TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[remark]}"),
    )  # fmt: skip
    with Progress(*columns, console=notes) as progress:
        tasks: dict[str, TaskID] = {}

        def on_progress(stage: str, done: int, total: int, resumed: bool) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total, remark="")
            progress.update(tasks[stage], completed=done, remark="from disk" if resumed else "")

        yield on_progress
