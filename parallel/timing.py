"""How long a rank stood still for its peers: the difference between a busy rank and a waiting one."""

from __future__ import annotations

import time
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from parallel.comm import Exchange, Message, Pending


@dataclass(slots=True)
class WaitClock:
    """Seconds spent waiting since the last ``restart``. On CUDA only the launch is seen: the wait is the stream's."""

    waited_s: float = 0.0

    def restart(self) -> None:
        self.waited_s = 0.0


@dataclass(frozen=True, slots=True)
class _TimedPending:
    inner: Pending
    clock: WaitClock

    def wait(self) -> None:
        start_s = time.perf_counter()
        self.inner.wait()
        self.clock.waited_s += time.perf_counter() - start_s


@dataclass(frozen=True, slots=True)
class TimedExchange:
    """An exchange that adds its waiting to ``clock``."""

    inner: Exchange
    clock: WaitClock = field(default_factory=WaitClock)

    def post(self, sends: SequenceOf[Message], receives: SequenceOf[Message], what: str) -> Pending:
        return _TimedPending(self.inner.post(sends, receives, what), self.clock)
