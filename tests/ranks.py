"""Ranks for tests: as threads with an in-memory wire (cheap, thousands of cases), or as a pool of gloo processes."""

from __future__ import annotations

import multiprocessing
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any

import torch

from parallel import comm
from parallel.comm import Message

TIMEOUT_S = 60.0
ANSWER_S = 240.0
"""Of a pool: below pytest's own limit, so that the test says which rank is missing."""


Pair = tuple[int, int]  # (from, to)


class ThreadFabric:
    """Point-to-point messages between threads of one process, in order per pair, as strict as the strictest real wire:
    a send is through only when its receive has been posted (NCCL), and both ends must mean the same exchange.

    ``posted``: (from, to, what) of every message sent. A rank that waits longer than ``timeout_s`` fails with who waits
    for whom.
    """

    def __init__(self, num_ranks: int, *, timeout_s: float = TIMEOUT_S) -> None:
        pairs = [(a, b) for a in range(num_ranks) for b in range(num_ranks)]
        self.num_ranks = num_ranks
        self.timeout_s = timeout_s
        self.posted: list[tuple[int, int, str]] = []
        self._changed = threading.Condition()
        self._sent: dict[Pair, list[tuple[torch.Tensor, str] | None]] = {pair: [] for pair in pairs}
        self._num_receives = dict.fromkeys(pairs, 0)
        self._waiting: dict[int, str] = {}

    def wire(self, rank: int) -> ThreadWire:
        return ThreadWire(self, rank)

    def post(
        self, rank: int, sends: SequenceOf[Message], receives: SequenceOf[Message], what: str
    ) -> tuple[list[tuple[Pair, int]], list[tuple[Pair, int]]]:
        """The places of these messages, (pair, number of the message between the two), sends and receives."""
        with self._changed:
            sent, wanted = [], []
            for message in sends:
                pair = (rank, message.rank)
                sent.append((pair, len(self._sent[pair])))
                self._sent[pair].append((message.tensor.detach().clone(), what))
                self.posted.append((*pair, what))
            for message in receives:
                pair = (message.rank, rank)
                wanted.append((pair, self._num_receives[pair]))
                self._num_receives[pair] += 1
            self._changed.notify_all()
        return sent, wanted

    def take(self, rank: int, place: tuple[Pair, int], what: str) -> torch.Tensor:
        pair, number = place
        with self._changed:
            self._wait(rank, pair[0], what, lambda: len(self._sent[pair]) > number)
            message = self._sent[pair][number]
            assert message is not None, "a message was received twice"
            self._sent[pair][number] = None
        tensor, sent_as = message
        assert sent_as == what, f"rank {rank} expects {what} of rank {pair[0]}, which sent {sent_as}"
        return tensor

    def wait_for_receiver(self, rank: int, place: tuple[Pair, int], what: str) -> None:
        pair, number = place
        with self._changed:
            self._wait(rank, pair[1], what, lambda: self._num_receives[pair] > number)

    def _wait(self, rank: int, peer: int, what: str, ready: Callable[[], bool]) -> None:
        self._waiting[rank] = f"rank {rank} waits for rank {peer} in {what}"
        if not self._changed.wait_for(ready, self.timeout_s):
            raise TimeoutError(f"deadlock: {self.who_waits()}")
        del self._waiting[rank]

    def who_waits(self) -> str:
        states = [self._waiting.get(rank, f"rank {rank} waits for nobody") for rank in range(self.num_ranks)]
        return "; ".join(states)

    def undelivered(self) -> list[Pair]:
        """(from, to) where a message was sent that nobody has received, or a receive posted that nobody served."""
        return [
            pair for pair, sent in self._sent.items()
            if any(message is not None for message in sent) or len(sent) != self._num_receives[pair]
        ]


@dataclass(frozen=True)
class _PendingMessages:
    fabric: ThreadFabric
    rank: int
    receives: tuple[Message, ...]
    sent_places: list[tuple[Pair, int]]
    wanted_places: list[tuple[Pair, int]]
    what: str

    def wait(self) -> None:
        for message, place in zip(self.receives, self.wanted_places, strict=True):
            sent = self.fabric.take(self.rank, place, self.what)
            assert sent.shape == message.tensor.shape and sent.dtype == message.tensor.dtype
            message.tensor.copy_(sent)
        for place in self.sent_places:
            self.fabric.wait_for_receiver(self.rank, place, self.what)


@dataclass(frozen=True)
class ThreadWire:
    fabric: ThreadFabric
    rank: int

    def post(self, sends: SequenceOf[Message], receives: SequenceOf[Message], what: str) -> _PendingMessages:
        leaving = tuple(message for message in sends if message.tensor.numel())
        wanted = tuple(message for message in receives if message.tensor.numel())
        assert all(message.tensor.is_contiguous() for message in (*leaving, *wanted))
        return _PendingMessages(
            self.fabric, self.rank, wanted, *self.fabric.post(self.rank, leaving, wanted, what), what
        )


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


class RankPool:
    """Processes for tests that need the real ``torch.distributed``. Torch and megatron-core are imported once, in a
    fork server; every rank is a cheap fork of it. Use one pool per file.

    ``run(target, *args)`` calls ``target(rank, world_size, init_method, *args)`` (a module-level function) on
    ``world_size`` ranks and returns the results by rank. A rank that raises fails the call with its traceback. One that
    ended, or gave no answer to an earlier call, is replaced before the next: no test inherits another's trouble.
    """

    def __init__(self, num_processes: int) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["trainer.build"])
        self._folder = tempfile.TemporaryDirectory()
        self._num_runs = 0
        self._ranks = [self._fork() for _ in range(num_processes)]
        self._unanswered: set[int] = set()

    def run(
        self, target: Callable[..., Any], *args: Any, world_size: int | None = None, timeout_s: float = ANSWER_S
    ) -> list[Any]:
        size = world_size or len(self._ranks)
        self.start(target, *args, world_size=size)
        return self.collect(range(size), timeout_s=timeout_s)

    def start(self, target: Callable[..., Any], *args: Any, world_size: int) -> None:
        """Begin a run without waiting for its results."""
        for rank, (_, process) in enumerate(self._ranks):
            if rank in self._unanswered or not process.is_alive():
                self._end(rank)
                self._ranks[rank] = self._fork()
        self._num_runs += 1
        self._unanswered = set(range(world_size))
        init_method = f"file://{self._folder.name}/store-{self._num_runs}"
        for rank in range(world_size):
            self._ranks[rank][0].send((target, (rank, world_size, init_method, *args)))

    def collect(self, ranks: Iterable[int], *, timeout_s: float = ANSWER_S) -> list[Any]:
        """Results of these ranks of the run, in order. A rank that raised fails the call with its traceback."""
        results, stop_s = {}, time.monotonic() + timeout_s
        for rank in ranks:
            pipe = self._ranks[rank][0]
            if not pipe.poll(max(0.0, stop_s - time.monotonic())):
                raise TimeoutError(f"rank {rank} did not answer within {timeout_s} s")
            try:
                results[rank] = pipe.recv()
            except EOFError:
                results[rank] = False, "ended without an answer"
            self._unanswered.discard(rank)
        failures = [f"rank {rank}:\n{text}" for rank, (ok, text) in results.items() if not ok]
        if failures:
            raise AssertionError("\n".join(failures))
        return [value for _, value in results.values()]

    def close(self) -> None:
        for rank in range(len(self._ranks)):
            self._end(rank)
        self._folder.cleanup()

    def _fork(self) -> tuple[Any, Any]:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        return ours, process

    def _end(self, rank: int) -> None:
        pipe, process = self._ranks[rank]
        process.kill()
        process.join()
        pipe.close()


def _serve(pipe: Any) -> None:
    torch.set_num_threads(1)
    while True:
        target, args = pipe.recv()
        try:
            pipe.send((True, target(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
        finally:
            comm.shutdown()
