from __future__ import annotations

import time

import numpy as np
import pytest

from tcaq.evaluate.memory import track_peak

MEBIBYTE = 2**20


def test_peak_is_of_the_block_not_of_the_process() -> None:
    with track_peak() as large:
        block = np.ones(200 * MEBIBYTE, np.uint8)
        time.sleep(0.1)
        del block
    with track_peak() as small:
        time.sleep(0.05)
    assert 150 * MEBIBYTE < large.bytes - small.bytes < 400 * MEBIBYTE


def test_watching_ends_with_an_error() -> None:
    with pytest.raises(KeyError), track_peak() as peak:
        raise KeyError
    seen = peak.bytes
    time.sleep(0.05)
    assert peak.bytes == seen > 0
