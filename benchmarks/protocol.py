"""How a study samples, and its results so far, which go on by one protocol alone."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tcaq.records import read_json


def add_protocol(parser: argparse.ArgumentParser, num: int = 2000, steps: int = 50, seed: int = 1) -> None:
    """`--num`, `--steps` and `--seed`: how many images are sampled, and how; seeds other than 1 are for what is still tried out."""
    parser.add_argument("--num", type=int, default=num)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--seed", type=int, default=seed)


def stored(path: Path, protocol: Mapping[str, Any]) -> dict[str, Any]:
    """The results in a file, the protocol's own if it is not there. Exits if its cells were measured another way."""
    if not path.exists():
        return {**protocol, "cells": {}}
    results = dict(read_json(path))
    if changed := [name for name, value in protocol.items() if results.get(name) != value]:
        ways = ", ".join(f"{name} {results.get(name)!r} there, {protocol[name]!r} now" for name in changed)
        raise SystemExit(
            f"{path} was measured another way ({ways}); give another --results, or delete it to start over"
        )
    return results
