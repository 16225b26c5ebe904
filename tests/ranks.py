"""Ranks for tests: as threads with an in-memory wire (cheap, thousands of cases), or as a pool of gloo processes."""

from __future__ import annotations

import multiprocessing
import queue
import tempfile
import threading
import traceback
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any

import torch

from parallel import comm
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


class RankPool:
    """Processes for tests that need the real ``torch.distributed``. Torch and megatron-core are imported once, in a
    fork server; every rank is a cheap fork of it. Use one pool per test class.

    ``run(target, *args)`` calls ``target(rank, world_size, init_method, *args)`` (a module-level function) on
    ``world_size`` ranks and returns the results by rank. A rank that raises fails the call with its traceback.
    """

    def __init__(self, num_processes: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["trainer.build"])
        self._folder = tempfile.TemporaryDirectory()
        self._num_runs = 0
        self._pipes, self._processes = [], []
        for _ in range(num_processes):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(
        self, target: Callable[..., Any], *args: Any, world_size: int | None = None, timeout_s: float = 300
    ) -> list[Any]:
        size = world_size or len(self._pipes)
        self._num_runs += 1
        init_method = f"file://{self._folder.name}/store-{self._num_runs}"
        for rank, pipe in enumerate(self._pipes[:size]):
            pipe.send((target, (rank, size, init_method, *args)))
        results = []
        for rank, pipe in enumerate(self._pipes[:size]):
            if not pipe.poll(timeout_s):
                raise TimeoutError(f"rank {rank} did not answer within {timeout_s} s")
            results.append(pipe.recv())
        failures = [f"rank {rank}:\n{text}" for rank, (ok, text) in enumerate(results) if not ok]
        if failures:
            raise AssertionError("\n".join(failures))
        return [value for _, value in results]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()


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
