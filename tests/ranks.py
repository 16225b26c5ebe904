"""Ranks for tests: as threads with an in-memory wire (cheap, thousands of cases), or as a pool of gloo processes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any

import torch

from parallel.comm import Message

TIMEOUT_S = 60.0


class ThreadFabric:
    """Point-to-point messages between threads of one process, in order per pair, like the real wire."""

    def __init__(self, num_ranks: int) -> None:
        pairs = [(a, b) for a in range(num_ranks) for b in range(num_ranks)]
        self.queues: dict[tuple[int, int], queue.Queue[torch.Tensor]] = {pair: queue.Queue() for pair in pairs}

    def wire(self, rank: int) -> ThreadWire:
        return ThreadWire(self, rank)


@dataclass(frozen=True)
class _PendingReceives:
    fabric: ThreadFabric
    rank: int
    receives: tuple[Message, ...]

    def wait(self) -> None:
        for message in self.receives:
            sent = self.fabric.queues[(message.rank, self.rank)].get(timeout=TIMEOUT_S)
            assert sent.shape == message.tensor.shape and sent.dtype == message.tensor.dtype
            message.tensor.copy_(sent)


@dataclass(frozen=True)
class ThreadWire:
    fabric: ThreadFabric
    rank: int

    def post(self, sends: SequenceOf[Message], receives: SequenceOf[Message], what: str) -> _PendingReceives:
        for message in sends:
            assert message.tensor.is_contiguous()
            if message.tensor.numel():
                self.fabric.queues[(self.rank, message.rank)].put(message.tensor.detach().clone())
        wanted = tuple(message for message in receives if message.tensor.numel())
        assert all(message.tensor.is_contiguous() for message in wanted)
        return _PendingReceives(self.fabric, self.rank, wanted)


def run_threads(num_ranks: int, target: Callable[[int], Any]) -> list[Any]:
    """``target(rank)`` on every rank at once; the results by rank. The first exception of any rank is raised."""
    results: list[Any] = [None] * num_ranks
    errors: list[BaseException] = []

    def body(rank: int) -> None:
        try:
            results[rank] = target(rank)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=body, args=(rank,), daemon=True) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    if errors:
        raise errors[0]
    if any(thread.is_alive() for thread in threads):
        raise TimeoutError("a rank is still waiting: deadlock")
    return results
