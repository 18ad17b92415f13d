"""Pages from templates."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from tcaq.records import replacing


def write_page(path: Path, template: str, context: Mapping[str, Any]) -> None:
    """Fill in one of this package's templates and replace `path` by it in one go."""
    environment = Environment(
        loader=PackageLoader("tcaq", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template(template).render(context)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
