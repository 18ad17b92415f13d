"""The page opens in a real browser."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tcaq.report import Entry, write_report
from tests.report.conftest import CONV
from tests.report.reading import Page

QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
)  # fmt: skip


def browser() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.fail("no Chromium found: install Debian's package chromium (apt-get install chromium)")
    return found


def opened(path: Path, profile: Path) -> tuple[str, list[str]]:
    """The document as the browser holds it after loading, and what its console says."""
    command = [browser(), *QUIET, f"--user-data-dir={profile}", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_it_opens_without_errors(tmp_path: Path, whole: Callable[..., Entry], bare: Callable[..., Entry]) -> None:
    path = tmp_path / "report.html"
    write_report(path, "Opened <in> a browser", [bare(), whole()], {})
    dom, console = opened(path, tmp_path / "profile")
    assert console == []
    page = Page(dom.replace("<!doctype html>", ""))
    assert page.table("The run keeps")[1:] == [["0", "31.25", "yes"], ["1", "33.50", "no"]]
    assert page.table("at each strength")[1:] == [
        ["0.0", "7.000", "no"],
        ["0.5", "4.500", "yes"],
        ["1.0", "5.000", "no"],
    ]
    assert "Opened <in> a browser" in page.text
    assert page.text.count(CONV) > 3
    assert {"quality", "samples", "sqnr-by-step", "ranges", "daq", "reconstruction", "correction"} <= set(
        page.values("id")
    )


def test_a_broken_page_would_be_noticed(tmp_path: Path) -> None:
    path = tmp_path / "broken.html"
    path.write_text("<!doctype html><title>x</title><script>missing()</script>")
    _, console = opened(path, tmp_path / "profile")
    assert any("missing is not defined" in line for line in console)
