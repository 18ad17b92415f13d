"""The command line: one file a verb, each thin over the Python API."""

from tcaq.cli import bench, compare, demo, evaluate, export, plan, quantize, sample  # noqa: F401  (each adds its verb to the app)
from tcaq.cli.app import app

__all__ = ["app"]
