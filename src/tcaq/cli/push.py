"""`tcaq push`: a checkpoint to the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tcaq.checkpoint import verify
from tcaq.cli.app import app, console
from tcaq.models.publish import publish


@app.command("push")
def push_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that `tcaq quantize` wrote.")],
    repository: Annotated[str, typer.Argument(help="Its name on the Hub: owner/name.")],
    private: Annotated[bool, typer.Option("--private", help="Nobody else sees it.")] = False,
) -> None:
    """Check a checkpoint and upload it with its model card; its run and evaluations stay here."""
    verify(folder)
    console.print(publish(folder, repository, private=private))
