"""Turns SIGTERM and Ctrl-C into a flag: the training loop finishes its step, writes a checkpoint and stops."""

from __future__ import annotations

import signal
from collections.abc import Iterable
from types import FrameType, TracebackType
from typing import Any, Self


class HandledSignals:
    """While entered, these signals call ``handle`` of a subclass; on exit the previous handlers return."""

    def __init__(self, numbers: Iterable[int]) -> None:
        self._numbers = tuple(numbers)
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in self._numbers:
            self._previous[number] = signal.signal(number, self.handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame: FrameType | None) -> None:
        raise NotImplementedError


class StopFlag(HandledSignals):
    """The first SIGTERM or SIGINT only sets ``requested``; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        super().__init__((signal.SIGTERM, signal.SIGINT))
        self.requested = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
