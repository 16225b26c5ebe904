"""Tiers: memory of bounded size below the device, to which activations are swapped.

``store`` copies a tensor out, ``load`` copies it back into another tensor. Both only start the copy, which runs in
parallel with the computation (on a worker thread or its own CUDA stream); ``Transfer.wait`` waits for it.
``memory.disk_tier`` is the tier below the host tier of this module.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from memory.ledger import MemoryFullError, MemoryLedger, Regions
from memory.timeline import Timeline, waiting
from planner.errors import LonghaulError
from planner.measured.copy_times import BACK, OUT
from planner.units import format_bytes

HOST = "host"
_HOST_ALIGNMENT_BYTES = 512
_WHAT = "swapped activations"
_REMEDY = ": raise --memory.tier-budget, lower --swap-fraction or use shorter samples"


class TierError(LonghaulError):
    """A tier failed: the disk is full, or a read or write failed or was short. The text names file and offset."""


class Transfer(Protocol):
    """A copy in flight."""

    def wait(self) -> None:
        """Return when the copy is done (CPU), or make the current stream wait for it (CUDA). Raises TierError."""


@dataclass(frozen=True, slots=True)
class Stored:
    """What ``store`` copied out: ``num_bytes`` at ``offset``; ``transfer`` is the copy from the device. The source
    tensor must not change or be freed until it is done. ``generation``: running number of all stores of the tier; it
    tells a place that was released and reused from the original one."""

    offset: int
    num_bytes: int
    generation: int
    transfer: Transfer


class Places:
    """A tier's bookkeeping: the ledger decides whether bytes fit, ``Regions`` decides where."""

    def __init__(self, account: str, capacity_bytes: int, ledger: MemoryLedger, *, alignment_bytes: int) -> None:
        self._account = account
        self._ledger = ledger
        self._regions = Regions(capacity_bytes, alignment_bytes=alignment_bytes)
        self._generations = itertools.count()
        self._live: dict[int, int] = {}  # generation by offset

    def take(self, num_bytes: int) -> tuple[int, int]:
        """(offset, generation) of a reserved place. Raises MemoryFullError."""
        size = self._regions.size_bytes(num_bytes)
        self._ledger.reserve(self._account, size, _WHAT, _REMEDY)
        offset = self._regions.take(num_bytes)
        if offset is None:
            self._ledger.release(self._account, size)
            largest = self._regions.largest_free_bytes
            raise MemoryFullError(
                f"{self._account}: need {format_bytes(size)} in one piece for {_WHAT}, the largest free piece has "
                f"{format_bytes(largest)}{_REMEDY}",
                account=self._account, needed_bytes=size, available_bytes=largest,
            )
        self._live[offset] = next(self._generations)
        return offset, self._live[offset]

    def check(self, stored: Stored, num_bytes: int | None = None) -> None:
        """Raise TierError unless ``stored`` still owns its place: loading a reused place would return wrong numbers of
        the right shape, and so a wrong gradient without an error. Raise ValueError if it does not have
        ``num_bytes``."""
        if num_bytes not in (None, stored.num_bytes):
            raise ValueError(f"{stored.num_bytes} bytes were stored, {num_bytes} are asked for")
        if self._live.get(stored.offset) != stored.generation:
            raise TierError(f"{self._account}: the place at byte {stored.offset} is asked for after it was released")

    def give(self, stored: Stored) -> None:
        self.check(stored)
        del self._live[stored.offset]
        self._regions.give(stored.offset, stored.num_bytes)
        self._ledger.release(self._account, self._regions.size_bytes(stored.num_bytes))


class Tier(ABC):
    """One level below the device, with the ``capacity_bytes`` of the ledger's account ``name``. Tensors are contiguous,
    of any dtype and shape, with at least one element. ``timeline``: where copies record their times, if it is set."""

    name: str

    def __init__(self, capacity_bytes: int, ledger: MemoryLedger, *, alignment_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.written_bytes = 0
        self.read_bytes = 0
        self.timeline: Timeline | None = None
        self._places = Places(self.name, capacity_bytes, ledger, alignment_bytes=alignment_bytes)

    def store(self, source: torch.Tensor) -> Stored:
        """Start copying ``source`` out. Raises MemoryFullError, before any copy, if it does not fit."""
        data = flat_bytes(source)
        offset, generation = self._places.take(data.numel())
        self.written_bytes += data.numel()
        return Stored(offset, data.numel(), generation, self._write_behind(data, offset))

    def overwrite(self, stored: Stored, source: torch.Tensor) -> Stored:
        """Start copying the same number of bytes into the same place, which no copy may be using. ``stored`` must not
        be used afterwards. Raises TierError if it was released before."""
        data = flat_bytes(source)
        self._places.check(stored, data.numel())
        self.written_bytes += data.numel()
        return replace(stored, transfer=self._write_behind(data, stored.offset))

    def load(self, stored: Stored, into: torch.Tensor) -> Transfer:
        """Start copying back into ``into`` (as many bytes as were stored). Raises TierError if ``stored`` was released:
        its place may hold other data by now."""
        data = flat_bytes(into)
        self._places.check(stored, data.numel())
        self.read_bytes += data.numel()
        return self._read_ahead(stored, data)

    def release(self, stored: Stored) -> None:
        """Free the place. All transfers to and from it must have been waited for."""
        self._places.give(stored)

    @abstractmethod
    def close(self) -> None:
        """Free everything. Waits for copies in flight and ignores their errors, as the data is no longer needed."""

    @abstractmethod
    def _write_behind(self, data: torch.Tensor, offset: int) -> Transfer:
        """Start copying these bytes to ``offset``."""

    @abstractmethod
    def _read_ahead(self, stored: Stored, data: torch.Tensor) -> Transfer:
        """Start copying the stored bytes into ``data``, which has the same size."""


@dataclass(frozen=True, slots=True)
class _Done:
    def wait(self) -> None:
        return


@dataclass(frozen=True, slots=True)
class _StreamCopy:
    """A copy on another CUDA stream: ``wait`` makes the current stream wait for it, not the host."""

    event: torch.cuda.Event
    device: torch.device

    def wait(self) -> None:
        torch.cuda.current_stream(self.device).wait_event(self.event)


class HostTier(Tier):
    """One pinned buffer, allocated once, with separate CUDA streams for copies out and copies back.

    The source's memory may be freed after ``transfer.wait()``: the caching allocator reuses it in the order of the
    computing stream, which by then waits for the copy. A released place may be reused at once: the next store runs on
    the offload stream after the computing stream's event, which comes after the wait for the place's load. On CPU the
    buffer is ordinary memory and copies are immediate.
    """

    name = HOST

    def __init__(self, capacity_bytes: int, ledger: MemoryLedger, device: torch.device) -> None:
        super().__init__(capacity_bytes, ledger, alignment_bytes=_HOST_ALIGNMENT_BYTES)
        self._device = device
        on_cuda = device.type == "cuda"
        self._buffer = torch.empty(capacity_bytes, dtype=torch.uint8, pin_memory=on_cuda)
        self._offload = torch.cuda.Stream(device) if on_cuda else None
        self._prefetch = torch.cuda.Stream(device) if on_cuda else None

    def close(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def _write_behind(self, data: torch.Tensor, offset: int) -> Transfer:
        return self._copy(OUT, self._buffer[offset : offset + data.numel()], data, self._offload)

    def _read_ahead(self, stored: Stored, data: torch.Tensor) -> Transfer:
        place = self._buffer[stored.offset : stored.offset + stored.num_bytes]
        return self._copy(BACK, data, place, self._prefetch)

    def _copy(
        self, lane: str, target: torch.Tensor, source: torch.Tensor, stream: torch.cuda.Stream | None
    ) -> Transfer:
        timeline = self.timeline
        if stream is None:
            with waiting(timeline, "for a copy to host memory"):  # the computing thread makes the copy itself
                start = timeline.stamp() if timeline is not None else None
                target.copy_(source)
                if timeline is not None:
                    timeline.add(lane, timeline.subject, start, source.numel())
            return _Done()
        stream.wait_stream(torch.cuda.current_stream(self._device))  # it computes the source and frees the target
        start = timeline.stamp(stream) if timeline is not None else None
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
            event = torch.cuda.Event()
            event.record(stream)
        if timeline is not None:
            timeline.add(lane, timeline.subject, start, source.numel(), timeline.stamp(stream))
        return _StreamCopy(event, self._device)


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous tensor as one dimension, sharing its memory."""
    if not tensor.is_contiguous() or not tensor.numel():
        raise ValueError(f"a tier takes contiguous tensors with elements, got {tuple(tensor.shape)}")
    return tensor.detach().view(-1).view(torch.uint8)
