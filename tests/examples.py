"""How many cases a random test draws: some by day, many under ``make nightly``."""

from __future__ import annotations

import pytest


def by_day_and_nightly(by_day: int, nightly: int) -> pytest.MarkDecorator:
    """Gives the test ``num_examples``, for the ``max_examples`` of the random cases inside it."""
    return pytest.mark.parametrize("num_examples", [by_day, pytest.param(nightly, marks=pytest.mark.nightly)])
