"""A calibration that repeats its measurements as little as it can: the same code, rougher prices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from trainer.prices import calibration, machine_samples


@contextmanager
def few_sweeps() -> Iterator[None]:
    """For tests of what is measured, what comes of it and what is left alone; none of them judges a price."""
    with (
        mock.patch.object(calibration, "_MAX_SWEEPS", 1), mock.patch.object(calibration, "_SHORT_S", 0.0),
        mock.patch.object(calibration, "_EMPTY_STEPS", 2), mock.patch.object(machine_samples, "_REPEATS", 1),
    ):
        yield
