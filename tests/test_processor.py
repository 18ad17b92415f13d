"""What is read from the kernel's description of the processor."""

from __future__ import annotations

import pytest

from tcaq import processor


@pytest.fixture(autouse=True)
def _forget():
    processor.has_vnni.cache_clear()
    yield
    processor.has_vnni.cache_clear()


@pytest.mark.parametrize(("flags", "expected"), [("sse avx512_vnni", True), ("fp asimddp", True), ("avx512f", False)])
def test_instructions_are_found_among_the_flags(flags, expected, tmp_path, monkeypatch) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(f"model name\t: Some Processor\nflags\t\t: {flags}\n")
    monkeypatch.setattr(processor, "_CPUINFO", file)
    assert processor.has_vnni() is expected
    assert processor.processor().startswith("Some Processor, ")


def test_where_nothing_can_be_read_nothing_is_claimed(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(processor, "_CPUINFO", tmp_path / "missing")
    assert processor.has_vnni() is None
    assert processor.processor().startswith("unknown processor, ")
