"""The command's frame: errors become one line and an exit code - 2 for wrong usage, 130 if stopped, 1 for any other failure."""

from __future__ import annotations

from typing import Any

import typer
from diffusers.utils import logging as diffusers_logging
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from tcaq.allocator import keep_freed_memory
from tcaq.errors import TcaqError, UsageError

console = Console()
notes = Console(stderr=True)
"""Progress and remarks; standard output stays for results, so that a program can read it."""


RESUMED = ("quantize", "evaluate", "report", "compare", "demo")
"""Verbs that go on where they stopped."""


class TcaqGroup(TyperGroup):
    """Turns the errors raised on purpose into one line on standard error and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the verb. Raises: typer.Exit with code 2 for wrong usage, 130 if stopped, 1 for any other failure."""
        keep_freed_memory()
        try:
            return super().invoke(ctx)
        except TcaqError as error:
            notes.print(Text.assemble(("error: ", "bold red"), str(error)))
            raise typer.Exit(2 if isinstance(error, UsageError) else 1) from error
        except KeyboardInterrupt as stop:
            resumed = ctx.invoked_subcommand in RESUMED
            notes.print("stopped; the same command goes on from here" if resumed else "stopped")
            raise typer.Exit(130) from stop


# its bars while loading would run through ours
diffusers_logging.disable_progress_bar()

app = typer.Typer(
    cls=TcaqGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Quantize diffusion models to 4-8 bits after training, and measure what that does to their images.",
)
