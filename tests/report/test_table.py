"""The headline table: how numbers are written, and who stands beside whom."""

from __future__ import annotations

import pytest

from tcaq.report.table import Measured, blocks, bytes_text, columns, number, seconds_text
from tests.report.conftest import evaluation


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (1.0, "1.000"), (12.3456, "12.35"), (999.96, "1000"), (12345.6, "12346"), (0.0021304, "0.002130"),
     (-3.5, "−3.500"), (-1072.4, "−1072"), (0.0, "0.000"), (123.45, "123.5")],
)  # fmt: skip
def test_numbers(value: float | None, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (0.04, "0.0 s"), (119.9, "119.9 s"), (150, "2.5 min"), (9000, "2.5 h")]
)
def test_seconds(value: float | None, text: str) -> None:
    assert seconds_text(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (1234, "1.2 kB"), (9_200_000, "9.20 MB"), (812e6, "812 MB"), (1.25e9, "1.25 GB")]
)
def test_bytes(value: float | None, text: str) -> None:
    assert bytes_text(value) == text


def test_entries_measured_alike_share_one_float_row() -> None:
    entries = [
        Measured("unmeasured", "W4A4", None, None, None),
        Measured("a", "W8A8", evaluation(), 500, 84.75),
        Measured("b", "W4A4", evaluation(fd=82.0), None, None),
        Measured("c", "W4A4", evaluation(num=100), None, None),
    ]
    found = blocks(entries, 2000)
    assert [(block.protocol, [row.name for row in block.rows]) for block in found] == [
        ("DDIMScheduler, 40 steps, N = 2000, seed 11, features reference", ["float", "a", "b"]),
        ("DDIMScheduler, 40 steps, N = 100, seed 11, features reference", ["float", "c"]),
        ("Not evaluated", ["unmeasured"]),
    ]
    lead, a, b = found[0].rows
    assert lead.cells == {
        "bits": "32", "fd": "20.50", "ratio": "1.000", "kid": "0.01230", "size": "2.0 kB", "sampling": "71.0 s", "memory": "912 MB"
    }  # fmt: skip
    assert a.cells == {
        "bits": "W8A8", "fd": "42.62", "ratio": "2.079", "kid": "0.04560", "psnr": "18.38", "ssim": "0.8125",
        "fd_to_float": "9.750", "size": "0.5 kB (25%)", "sampling": "5.0 min", "memory": "1.25 GB", "quantization": "84.8 s",
    }  # fmt: skip
    assert b.cells["ratio"] == "4.000"


def test_columns_without_a_value_are_left_out() -> None:
    keys = [c.key for c in columns(blocks([Measured("a", "W4A4", evaluation(fd=None), None, None)], None))]
    assert keys == ["bits", "kid", "fd_to_float", "psnr", "ssim", "sampling", "memory"]
