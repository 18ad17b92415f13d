"""Matplotlib figures as inline SVG whose colours and fonts follow the page, light or dark."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from io import StringIO
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.figure import Figure

# Figures are drawn in stand-in colours that nothing else uses; each becomes a variable of the page's style sheet.
INK, MUTED, LINES, PAPER = "#010101", "#010102", "#010103", "#010104"
SERIES = ("#010201", "#010202", "#010203", "#010204", "#010205", "#010206")
_VARIABLES = {INK: "ink", MUTED: "muted", LINES: "lines", PAPER: "paper"} | {
    color: f"series-{index}" for index, color in enumerate(SERIES)
}

_STYLE: dict[Any, Any] = {  # newer matplotlib types the keys one by one, older ones as text
    "axes.axisbelow": True,
    "axes.edgecolor": LINES,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "font.size": 9,
    "grid.color": LINES,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "savefig.transparent": True,
    "svg.fonttype": "none",  # text stays text: selectable, and in the page's font
    "text.color": INK,
    "text.parse_math": False,  # a layer's name may hold a dollar sign
    "xtick.color": LINES,
    "xtick.labelcolor": MUTED,
    "ytick.color": LINES,
    "ytick.labelcolor": MUTED,
}


@contextmanager
def style(name: str) -> Iterator[None]:
    """Draw and render the figure `name` inside this block; equal figures of equal names give equal text."""
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
        yield


def render(figure: Figure, name: str, description: str) -> Markup:
    """The figure as an `<svg>` element, to be called inside `style(name)`.

    Args: name: unique in the page, it prefixes every id; description: what a screen reader says.
    """
    buffer = StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    body = text[text.index("<svg") :].strip()
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r'(href="|url\()#', rf"\1#{name}-", body)
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"\s*\bxmlns(:\w+)?=\"[^\"]*\"", "", body)  # HTML knows both namespaces by itself
    for color, variable in _VARIABLES.items():
        body = body.replace(color, f"var(--{variable})")
    return Markup(body.replace("<svg", f'<svg role="img" aria-label="{escape(description)}"', 1))
