"""K/V of earlier chunks and their dK/dV in a tier: only the current layer's and the next layer's are on the device.

Rows and arithmetic are those of ``memory.chunked_kv.ChunkStore``, so the results are bit for bit the same. A chunk's
K/V of a layer are written once, when the layer has computed them. A later chunk reads those of its document before its
attention, while the previous layer computes (``prepare``). dK/dV are read in the same way, added to, and written back
while the next layer computes. K/V have two buffers (in use, loading), dK/dV three (in use, loading, storing).
Shapes: S stored rows, G rows whose gradients are carried, K KV heads of this rank, H head dim.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import torch

from memory.chunked import Rows, StoredRows
from memory.ledger import MemoryFullError
from memory.tiers import Stored, Tier, Transfer
from memory.timeline import waiting
from planner.units import format_bytes

NUM_KV_BUFFERS = 2
NUM_DKV_BUFFERS = 3
_STORES_IN_FLIGHT = 1
"""How many layers' K/V may still be in flight to the tier while the next layer computes."""


@dataclass(slots=True, eq=False)
class _Buffer:
    """``rows`` of one layer on the device, or being copied in (``loads``) or out (``stores``). ``dirty``: first rows of
    the pieces that changed since they were loaded."""

    tensor: torch.Tensor
    layer: int = -1
    rows: Rows = (0, 0)
    loads: list[Transfer] = field(default_factory=list)
    stores: list[Transfer] = field(default_factory=list)
    dirty: set[int] = field(default_factory=set)


class _TieredRows:
    """One kind of rows (K/V or dK/dV) of all layers. ``pieces``: row ranges that are always written and read whole. A
    piece that was never written reads as zeros."""

    def __init__(self, tier: Tier, pieces: Iterable[Rows], *, num_buffers: int, what: str) -> None:
        self._tier, self.pieces, self._num_buffers, self._what = tier, tuple(pieces), num_buffers, what
        self.num_rows = max((stop for _, stop in self.pieces), default=0)
        self._stored: dict[tuple[int, int], Stored] = {}  # by layer and first row
        self._buffers: list[_Buffer] = []  # least recently requested first

    def put(self, layer: int, rows: Rows, source: torch.Tensor) -> Transfer:
        """Start writing the piece ``rows``; ``source`` must not change until the copy is done."""
        key = (layer, rows[0])
        old = self._stored.get(key)
        self._name_copies(layer)
        self._stored[key] = self._tier.store(source) if old is None else self._tier.overwrite(old, source)
        return self._stored[key].transfer

    def want(self, layer: int, rows: Rows, like: torch.Tensor) -> None:
        """Start reading ``rows`` of a layer if they are not loaded. ``like``: one row ``[1, 2, K, H]`` of this kind."""
        buffer = next((buffer for buffer in self._buffers if buffer.layer == layer), None)
        if buffer is not None and buffer.rows[0] <= rows[0] and rows[1] <= buffer.rows[1]:
            self._buffers.remove(buffer)
            self._buffers.append(buffer)
            self._wait(buffer.stores)  # rows must not change while they are being written
            return
        if buffer is not None:
            self._buffers.remove(buffer)
        elif len(self._buffers) < self._num_buffers:
            buffer = _Buffer(like.new_empty((self.num_rows, *like.shape[1:])))
        else:
            buffer = self._buffers.pop(0)
        self._buffers.append(buffer)
        self._write_back(buffer)
        self._wait(buffer.stores)
        self._wait(buffer.loads)
        buffer.layer, buffer.rows = layer, rows
        self._name_copies(layer)
        for start, stop in self._inside(rows):
            stored = self._stored.get((layer, start))
            if stored is None:
                buffer.tensor[start:stop].zero_()
                continue
            self._wait([stored.transfer])  # on CUDA different streams read and write
            buffer.loads.append(self._tier.load(stored, buffer.tensor[start:stop]))

    def ready(self, layer: int) -> torch.Tensor:
        """The buffer ``[S or G, 2, K, H]`` of a layer; only rows that were requested are valid."""
        buffer = self._buffer_of(layer)
        self._wait(buffer.loads)
        return buffer.tensor

    def mark(self, layer: int, rows: Rows) -> None:
        """These rows of the layer's buffer were changed."""
        self._buffer_of(layer).dirty.update(start for start, _ in self._inside(rows))

    def write_back(self, *, but: int) -> None:
        """Start writing all changed pieces of layers other than ``but``."""
        for buffer in self._buffers:
            if buffer.layer != but:
                self._write_back(buffer)

    def close(self) -> None:
        """Wait for all copies and free the tier's places. Changes that were not written back are lost."""
        for buffer in self._buffers:
            self._wait(buffer.loads)
            self._wait(buffer.stores)
        self._buffers.clear()
        self._wait([stored.transfer for stored in self._stored.values()])
        for stored in self._stored.values():
            self._tier.release(stored)
        self._stored.clear()

    @property
    def num_bytes(self) -> int:
        return sum(buffer.tensor.nbytes for buffer in self._buffers)

    def _buffer_of(self, layer: int) -> _Buffer:
        return next(buffer for buffer in self._buffers if buffer.layer == layer)

    def _inside(self, rows: Rows) -> list[Rows]:
        """Pieces that overlap ``rows``."""
        return [(start, stop) for start, stop in self.pieces if start < rows[1] and rows[0] < stop]

    def _write_back(self, buffer: _Buffer) -> None:
        for start, stop in self.pieces if buffer.dirty else ():
            if start in buffer.dirty:
                buffer.stores.append(self.put(buffer.layer, (start, stop), buffer.tensor[start:stop]))
        buffer.dirty.clear()

    def _wait(self, transfers: list[Transfer]) -> None:
        """Wait until these copies are done, and empty the list."""
        if transfers:
            with waiting(self._tier.timeline, f"for {self._what}"):
                for transfer in transfers:
                    transfer.wait()
            transfers.clear()

    def _name_copies(self, layer: int) -> None:
        if self._tier.timeline is not None:
            self._tier.timeline.subject = f"{self._what} of layer {layer}"


class TieredChunkStore:
    """K/V and dK/dV of one group on one rank, with the rows that ``memory.chunked.place_rows`` assigns.

    Raises MemoryFullError, before the first byte is written, if the tier cannot hold all of it.
    """

    def __init__(self, places: SequenceOf[StoredRows], tier: Tier, *, num_layers: int) -> None:
        self._tier, self._num_layers = tier, num_layers
        tails = (place.tail for place in places if place.tail[0] < place.tail[1])
        carried = (place.carried for place in places if place.carried is not None)
        self._kv = _TieredRows(tier, tails, num_buffers=NUM_KV_BUFFERS, what="K/V")
        self._dkv = _TieredRows(tier, carried, num_buffers=NUM_DKV_BUFFERS, what="dK/dV")
        self._outgoing: deque[tuple[Transfer, torch.Tensor]] = deque()
        self._kv_row: torch.Tensor | None = None
        self._dkv_row: torch.Tensor | None = None

    def prepare(self, layer: int, rows: Rows, carried: Rows, following: int | None) -> None:
        """This layer will now read these rows of K/V and of dK/dV; layer ``following`` comes after it."""
        self._dkv.write_back(but=layer)
        for place in (layer,) if following is None else (layer, following):
            if rows[0] < rows[1] and self._kv_row is not None:
                self._kv.want(place, rows, self._kv_row)
            if carried[0] < carried[1] and self._dkv_row is not None:
                self._dkv.want(place, carried, self._dkv_row)

    def write(self, layer: int, rows: Rows, k_TKH: torch.Tensor, v_TKH: torch.Tensor) -> None:
        """Store the K/V of these rows."""
        if self._kv_row is None:
            self._begin(k_TKH)
        self._limit_in_flight(_STORES_IN_FLIGHT)
        both_T2KH = torch.stack((k_TKH, v_TKH), dim=1)
        self._outgoing.append((self._kv.put(layer, rows, both_T2KH), both_T2KH))

    def keys_values(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V ``[S, K, H]`` of a layer; only rows that were prepared are valid."""
        kv_S2KH = self._kv.ready(layer)
        return kv_S2KH[:, 0], kv_S2KH[:, 1]

    def add_gradients(self, layer: int, rows: Rows, dk_TKH: torch.Tensor, dv_TKH: torch.Tensor) -> None:
        """Add one chunk's gradients to the carried rows ``rows``, which must have been prepared."""
        place = self._dkv.ready(layer)[rows[0] : rows[1]]
        place[:, 0] += dk_TKH
        place[:, 1] += dv_TKH
        self._dkv.mark(layer, rows)

    def gradients(self, layer: int, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """(dK, dV) that later chunks accumulated for these rows, which must have been prepared; zeros if none did."""
        place = self._dkv.ready(layer)[rows[0] : rows[1]]
        return place[:, 0], place[:, 1]

    def close(self) -> None:
        """Wait for copies in flight and free the tier's places. The store cannot be used afterwards."""
        self._limit_in_flight(0)
        self._kv.close()
        self._dkv.close()

    @property
    def num_bytes(self) -> int:
        """Bytes on the device: the buffers, and K/V in flight to the tier."""
        return self._kv.num_bytes + self._dkv.num_bytes + sum(source.nbytes for _, source in self._outgoing)

    def _limit_in_flight(self, most_in_flight: int) -> None:
        """Wait for the oldest copies until at most ``most_in_flight`` K/V are in flight to the tier."""
        while len(self._outgoing) > most_in_flight:
            with waiting(self._tier.timeline, "for copies out"):
                self._outgoing.popleft()[0].wait()

    def _begin(self, k_TKH: torch.Tensor) -> None:
        wide = torch.promote_types(k_TKH.dtype, torch.float32)
        self._kv_row = k_TKH.new_empty((1, 2, *k_TKH.shape[1:]))
        self._dkv_row = torch.empty_like(self._kv_row, dtype=wide)
        row_bytes = (self._kv_row.nbytes, self._dkv_row.nbytes)
        rows = (self._kv.num_rows, self._dkv.num_rows)
        needed = self._num_layers * sum(size * count for size, count in zip(row_bytes, rows, strict=True))
        if needed > self._tier.capacity_bytes:
            available = self._tier.capacity_bytes
            raise MemoryFullError(
                f"{self._tier.name}: need {format_bytes(needed)} for K/V of {rows[0]} tokens of earlier chunks and "
                f"dK/dV of {rows[1]}, have {format_bytes(available)}: raise --memory.tier-budget or use shorter "
                "samples",
                account=self._tier.name, needed_bytes=needed, available_bytes=available,
            )
