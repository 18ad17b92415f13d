"""What the documentation points at is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
TESTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py")}


def test_every_test_that_the_table_of_families_names_exists():
    page = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    files = set(re.findall(r"tests/[\w/]+\.py", page))
    assert files
    assert files <= TESTS.keys()
    names = re.findall(r"`(test_\w+)(?:…[^`]*)?`", page)
    assert len(names) >= 7
    functions = [name for text in TESTS.values() for name in re.findall(r"^def (test_\w+)", text, flags=re.MULTILINE)]
    for name in names:
        assert any(function.startswith(name) for function in functions), name
    for family in re.findall(r"`(test_\w+\.py)`", page):
        assert f"tests/families/{family}" in TESTS, family


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target
