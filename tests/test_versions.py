"""The lower bounds of pyproject.toml are those that are tested."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
NEEDED = ("hypothesis", "pytest", "pytest-timeout")
"""Of the tools for development, what a run of the tests itself takes."""


def test_the_oldest_versions_are_the_lower_bounds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    tools = project["optional-dependencies"]["dev"]
    bounds = dict(line.split(">=") for line in project["dependencies"])
    bounds |= {name: bound for name, bound in (line.split(">=") for line in tools) if name in NEEDED}
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints-oldest.txt").read_text().splitlines()
        if not line.startswith("#")
    )
    del bounds["torch"]  # no build of that age for the CPU is at hand
    assert pins.keys() == bounds.keys()
    for name, pin in pins.items():
        assert re.fullmatch(rf"{re.escape(bounds[name])}(\.0)*", pin), name
