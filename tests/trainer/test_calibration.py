"""The pure part of the calibration: memory from peaks."""

from __future__ import annotations

import pytest

from trainer.calibration import bytes_per_token


def test_bytes_per_token_ignores_what_small_sets_show_beside_their_tokens():
    peaks = [(128, 1_000 + 12_800 + 50_000), (1024, 1_000 + 102_400), (2048, 1_000 + 204_800 + 2_048)]
    assert bytes_per_token(peaks, 1_000) == pytest.approx(101)


def test_bytes_per_token_is_never_free():
    assert bytes_per_token([(100, 500)], 1_000) == 1.0
