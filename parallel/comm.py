"""Every call into ``torch.distributed`` that moves data or makes process groups: the few that Longhaul needs.

Point-to-point batches carry all attention traffic (rings and head exchanges alike), so any set of ranks can work
together at any step without a process group being created for it.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist

Group = dist.ProcessGroup


class ExchangeError(RuntimeError):
    """A peer died or stalled during an exchange. The text names the operation and the peers."""


@dataclass(frozen=True, slots=True)
class Message:
    """One contiguous tensor to or from ``rank`` (index within the exchange's group). Both ends know the size."""

    rank: int
    tensor: torch.Tensor


class Pending(Protocol):
    """Messages on their way."""

    def wait(self) -> None:
        """Blocks (CPU) or makes the current stream wait (CUDA) until all messages are through."""


class Exchange(Protocol):
    """What the attention engine needs from the wire. ``GroupExchange`` is the real one; tests use threads."""

    def post(self, sends: SequenceOf[Message], receives: SequenceOf[Message], what: str) -> Pending:
        """Start all messages at once and return. Between two ranks messages arrive in the order posted."""


@dataclass(frozen=True, slots=True)
class _PendingBatch:
    works: tuple[dist.Work, ...]
    what: str

    def wait(self) -> None:
        for work in self.works:
            try:
                work.wait()
            except RuntimeError as error:
                raise ExchangeError(f"{self.what} failed: {str(error).splitlines()[0]}") from error


@dataclass(frozen=True, slots=True)
class GroupExchange:
    """Point-to-point batches over one communicator. Empty messages are skipped on both ends."""

    group: Group

    def post(self, sends: SequenceOf[Message], receives: SequenceOf[Message], what: str) -> Pending:
        ops = [
            dist.P2POp(dist.irecv, message.tensor, group=self.group, group_peer=message.rank)
            for message in receives
            if message.tensor.numel()
        ]
        ops += [
            dist.P2POp(dist.isend, message.tensor, group=self.group, group_peer=message.rank)
            for message in sends
            if message.tensor.numel()
        ]
        peers = sorted({message.rank for message in (*sends, *receives)})
        named = f"{what} with ranks {peers}"
        try:
            works = dist.batch_isend_irecv(ops) if ops else []
        except RuntimeError as error:
            raise ExchangeError(f"{named} failed: {str(error).splitlines()[0]}") from error
        return _PendingBatch(tuple(works), named)


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
    dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=group)
    return tensor


def all_reduce_max(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """Element-wise maximum over the group, in place; returns ``tensor``."""
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group)
    return tensor


def barrier(group: Group) -> None:
    """Wait until every rank of the group is here."""
    dist.barrier(group=group)


def broadcast_bytes(payload: bytes | None, *, source: int, group: Group) -> bytes:
    """``payload`` of global rank ``source``, on every rank of a CPU-capable group. Two broadcasts: size, bytes."""
    size = torch.tensor([len(payload) if payload is not None else 0], dtype=torch.int64)
    dist.broadcast(size, src=source, group=group)
    data = torch.empty(int(size.item()), dtype=torch.uint8)
    if not data.numel():
        return b""
    if payload is not None:
        data.copy_(torch.frombuffer(bytearray(payload), dtype=torch.uint8))
    dist.broadcast(data, src=source, group=group)
    return data.numpy().tobytes()


def all_gather_bytes(payload: bytes, group: Group) -> list[bytes]:
    """Everyone's payload, by group rank. All payloads must have the same length (bytes)."""
    mine = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
    parts = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(parts, mine, group=group)
    return [part.numpy().tobytes() for part in parts]
