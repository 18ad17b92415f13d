"""The command line: one file a verb, each thin over the Python API."""

from tcaq.cli import (  # noqa: F401  (each adds its verb to the app)
    bench,
    compare,
    demo,
    evaluate,
    export,
    plan,
    push,
    quantize,
    report,
    sample,
)
from tcaq.cli.app import app

__all__ = ["app"]
