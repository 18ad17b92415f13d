"""Which model a study is about, and what it is asked for: options that several studies share."""

from __future__ import annotations

import argparse

from tcaq import Conditions


def add_model(parser: argparse.ArgumentParser) -> None:
    """`--model` and `--guidance`."""
    parser.add_argument("--model", default="reference")
    parser.add_argument("--guidance", type=float, help="scale of classifier-free guidance, for a conditional model")


def flags(args: argparse.Namespace) -> list[object]:
    """The same as options of the tcaq command."""
    return [] if args.guidance is None else ["--guidance", args.guidance]


def conditions(args: argparse.Namespace) -> Conditions | None:
    """The same as an argument of tcaq's functions."""
    return None if args.guidance is None else Conditions(guidance=args.guidance)
