"""Every call into ``torch.distributed`` that moves data or makes process groups.

Point-to-point batches carry all attention traffic (rings and head exchanges alike), so any set of ranks can work
together at any step without a process group being created for it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from planner.errors import LonghaulError

Group = dist.ProcessGroup


class ExchangeError(LonghaulError, RuntimeError):
    """A peer died or stalled. The text names the operation and the peer, or the whole group if the backend does not
    say which peer it was."""


@dataclass(frozen=True, slots=True)
class Message:
    """One contiguous tensor to or from ``rank`` (its index within the exchange's group). Both ends know the size."""

    rank: int
    tensor: torch.Tensor


class Pending(Protocol):
    """Messages in flight."""

    def wait(self) -> None:
        """Block (CPU) or make the current stream wait (CUDA) until all messages have arrived."""


class Exchange(Protocol):
    """What the attention engine needs from the network. ``GroupExchange`` is the real one; tests use threads."""

    def post(self, sends: SequenceOf[Message], receives: SequenceOf[Message], what: str) -> Pending:
        """Start all messages at once and return. Messages between two ranks arrive in the order they were posted."""


@dataclass(frozen=True, slots=True)
class _PendingBatch:
    """``peers``: action and group rank of each message, in the order they were posted."""

    group: Group
    works: tuple[dist.Work, ...]
    peers: tuple[tuple[str, int], ...]
    what: str

    def wait(self) -> None:
        for number, work in enumerate(self.works):
            try:
                work.wait()
            except RuntimeError as error:
                # gloo returns one work per message, so the peer is known; NCCL returns one work for the whole batch
                which = self.peers[number : number + 1] if len(self.works) == len(self.peers) else self.peers
                raise _exchange_error(self.what, self.group, which, error) from error


def _exchange_error(
    what: str, group: Group, peers: SequenceOf[tuple[str, int]], error: RuntimeError
) -> ExchangeError:
    """Names the peers by group rank, and by global rank where that differs."""
    names = []
    for action, rank in dict.fromkeys(peers):
        global_rank = dist.get_global_rank(group, rank)
        names.append(f"{action} rank {rank}" + (f" (global rank {global_rank})" if global_rank != rank else ""))
    return ExchangeError(f"{what}: {', '.join(names)} failed: {_reason(error)}")


def _reason(error: RuntimeError) -> str:
    """The first sentence of the backend's message, without the source location that it starts with."""
    return re.sub(r"^\[[^\]]*\]\s*", "", str(error)).split(". ")[0].partition("\n")[0]


@contextmanager
def _collective(what: str, group: Group) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        ranks = dist.get_process_group_ranks(group)
        raise ExchangeError(f"{what} of ranks {ranks} failed: {_reason(error)}") from error


@dataclass(frozen=True, slots=True)
class GroupExchange:
    """Point-to-point batches over one communicator. Empty messages are skipped on both ends.

    gloo runs all posted messages at the same time. NCCL runs the batches of one communicator concurrently with the
    compute stream's kernels but one after the other, so a batch posted later also arrives later. The caller must keep
    the messages' memory alive until the batch has completed; after that no other stream uses it.
    """

    group: Group

    def post(self, sends: SequenceOf[Message], receives: SequenceOf[Message], what: str) -> Pending:
        messages: list[tuple[Callable[..., Any], str, Message]]
        messages = [(dist.irecv, "receive from", message) for message in receives if message.tensor.numel()]
        messages += [(dist.isend, "send to", message) for message in sends if message.tensor.numel()]
        ops = [dist.P2POp(op, message.tensor, group=self.group, group_peer=message.rank) for op, _, message in messages]
        peers = tuple((action, message.rank) for _, action, message in messages)
        try:
            works = dist.batch_isend_irecv(ops) if ops else []
        except RuntimeError as error:
            raise _exchange_error(what, self.group, peers, error) from error
        return _PendingBatch(self.group, tuple(works), peers, what)


def init_process_group(
    *, device: torch.device, rank: int, world_size: int, timeout_s: float, init_method: str = "env://"
) -> None:
    """Join the job's process group (NCCL for CUDA, gloo for CPU). ``env://``: rendezvous by torchrun's variables."""
    dist.init_process_group(
        backend="cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        init_method=init_method,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
        device_id=device if device.type == "cuda" else None,
    )


def shutdown() -> None:
    """Leave the job's process group; does nothing if there is none."""
    if dist.is_initialized():
        dist.destroy_process_group()


def new_group(ranks: SequenceOf[int], *, timeout_s: float, backend: str | None = None) -> Group:
    """A process group of these global ranks. Every rank of the job must call it, in the same order."""
    return dist.new_group(ranks=list(ranks), timeout=timedelta(seconds=timeout_s), backend=backend)


def all_reduce_sum(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """Sum over the group, in place; returns ``tensor``."""
    with _collective("sum", group):
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=group)
    return tensor


def all_reduce_max(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """Element-wise maximum over the group, in place; returns ``tensor``."""
    with _collective("maximum", group):
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group)
    return tensor


def barrier(group: Group) -> None:
    """Wait until every rank of the group is here."""
    with _collective("barrier", group):
        dist.barrier(group=group)


def broadcast_bytes(payload: bytes | None, *, source: int, group: Group) -> bytes:
    """``payload`` of global rank ``source``, on every rank of a CPU-capable group. Two broadcasts: size, then bytes."""
    size = torch.tensor([len(payload) if payload is not None else 0], dtype=torch.int64)
    with _collective(f"broadcast from rank {source}", group):
        dist.broadcast(size, src=source, group=group)
    data = torch.empty(int(size.item()), dtype=torch.uint8)
    if not data.numel():
        return b""
    if payload is not None:
        data.copy_(torch.frombuffer(bytearray(payload), dtype=torch.uint8))
    with _collective(f"broadcast from rank {source}", group):
        dist.broadcast(data, src=source, group=group)
    return data.numpy().tobytes()


def all_gather_bytes(payload: bytes, group: Group) -> list[bytes]:
    """Everyone's payload, by group rank. All payloads must have the same length (bytes)."""
    mine = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
    parts = [torch.empty_like(mine) for _ in range(group.size())]
    with _collective("gather", group):
        dist.all_gather(parts, mine, group=group)
    return [part.numpy().tobytes() for part in parts]


def collect_bytes(
    payload: bytes, *, sources: SequenceOf[int], destination: int, group: Group
) -> list[bytes]:
    """Send the payloads (of any length) of the global ranks ``sources`` to global rank ``destination`` of a CPU-capable
    group. Returns them in the order of ``sources`` there, and an empty list elsewhere. Other ranks do not take part, so
    the cost does not grow with the size of the group."""
    rank = dist.get_rank()
    if rank == destination:
        return [payload if source == rank else _receive_bytes(source, group) for source in sources]
    if rank in sources:
        data = torch.frombuffer(bytearray(payload), dtype=torch.uint8) if payload else torch.empty(0, dtype=torch.uint8)
        with _collective(f"send to rank {destination}", group):
            dist.send(torch.tensor([len(payload)], dtype=torch.int64), dst=destination, group=group)
            if payload:
                dist.send(data, dst=destination, group=group)
    return []


def _receive_bytes(source: int, group: Group) -> bytes:
    size = torch.empty(1, dtype=torch.int64)
    with _collective(f"receive from rank {source}", group):
        dist.recv(size, src=source, group=group)
        data = torch.empty(int(size.item()), dtype=torch.uint8)
        if data.numel():
            dist.recv(data, src=source, group=group)
    return data.numpy().tobytes()
