"""Attention of one chunk's queries over the chunk itself and over stored K/V of the document it continues.

K/V of earlier chunks stand still, only what belongs to the chunk travels, so the traffic of a group does not depend on
the number of chunks:

- alone: none;
- ``ulysses``: heads for tokens, chunk by chunk; each rank stores all tokens of some heads;
- ring groups: queries move. Each rank stores the K/V of its own part of every chunk, sees the chunk's queries of all
  members, and sends back partial outputs, which their owners merge by log-sum-exp; in the backward dq comes home the
  same way, and dK/dV never travel.

Shapes: T own rows of the chunk, S the chunk's rows of all members that this rank computes on, R own key rows,
N query heads, K KV heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from parallel.chunk_exchange import ChunkExchange
from parallel.kernel import AttentionKernel, Pairs
from parallel.lse import RunningResult, accumulate_dtype, add_rows
from planner.plan import Span

Rows = tuple[int, int]

_PIECE_ROWS = 2048
"""Most stored rows that one call of the backward works on, or as many as the chunk has: the call's dK/dV exist beside
those of the store, and for a whole long document they would be one layer's share of all dK/dV."""


class KeyValueStore(Protocol):
    """Where K/V of chunks and the gradients that later chunks leave for them are kept, by layer."""

    def prepare(self, layer: int, rows: Rows, carried: Rows, following: int | None) -> None:
        """Layer ``layer`` is about to read these rows of K/V and of the carried dK/dV (empty: none), then layer
        ``following`` (None: not known)."""

    def write(self, layer: int, rows: Rows, k_TKH: torch.Tensor, v_TKH: torch.Tensor) -> None:
        """Store K/V."""

    def keys_values(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """All stored K and V; rows that were prepared count."""

    def add_gradients(self, layer: int, rows: Rows, dk_TKH: torch.Tensor, dv_TKH: torch.Tensor) -> None:
        """Add to the gradients carried for these rows."""

    def gradients(self, layer: int, rows: Rows) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What later chunks left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkPlaces:
    """Rows of this rank's store. ``parts``: the first document's earlier tokens, each run with the rows that carry
    their dK/dV (None: not wanted, so not computed). ``tail``: where the last own key rows are stored (empty: nowhere).
    ``carried``: where later chunks leave the gradients of the tail. ``hop_weight``: what these are multiplied by.
    """

    parts: tuple[tuple[Rows, Rows | None], ...] = ()
    tail: Rows = (0, 0)
    carried: Rows | None = None
    hop_weight: float = 1.0


@dataclass(frozen=True, slots=True)
class _Part:
    """One run of stored keys and the query rows that see all of it."""

    pairs: Pairs
    rows: Rows
    carried: Rows | None


class ChunkAttention:
    """Callable ``(q_TNH, k_TKH, v_TKH) -> out_TNH`` for the layers of one forward of one chunk, in order.

    ``members``: the chunk's spans by group member; ``key_member``: the one whose tokens this rank has keys of, None
    for all. ``keys_only``: the last layer only stores its K/V and returns None. Communicates with the chunk's group.
    """

    def __init__(
        self, members: SequenceOf[tuple[Span, ...]], *, key_member: int | None, places: ChunkPlaces,
        store: KeyValueStore, exchange: ChunkExchange, kernel: AttentionKernel, scale: float, num_layers: int,
        keys_only: bool, device: torch.device,
    ) -> None:
        self.exchange, self.kernel, self.scale = exchange, kernel, scale
        self.places, self.store = places, store
        self._num_layers, self._keys_only, self._next_layer = num_layers, keys_only, 0
        self.own = _own_pairs(members, key_member, device)
        first = _first_document_rows(members)
        self.parts = tuple(
            _Part(Pairs(False, ((0, first),), (rows,), device), rows, carried)
            for rows, carried in _pieces(places.parts, max(_PIECE_ROWS, first))
        ) if first else ()
        self.prefix = (places.parts[0][0][0], places.parts[-1][0][1]) if self.parts else (0, 0)
        self.prefix_pairs = Pairs(False, ((0, first),), (self.prefix,), device)
        runs = [carried for part in self.parts if (carried := part.carried)] + [places.carried or (0, 0)]
        runs = [run for run in runs if run[0] < run[1]]
        # places are given chunk by chunk: what the prefix and this chunk carry lies side by side
        self.carried = (runs[0][0], runs[-1][1]) if runs else (0, 0)

    def __call__(self, q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor) -> torch.Tensor | None:
        layer, self._next_layer = self._next_layer, self._next_layer + 1
        if self._keys_only and layer == self._num_layers - 1:
            self.keep_tail(layer, *self.exchange.gather_keys(q_TNH, k_TKH, v_TKH))
            return None
        out_TNH: torch.Tensor = _ChunkAttention.apply(q_TNH, k_TKH, v_TKH, self, layer)
        return out_TNH

    def keep_tail(self, layer: int, k_RKH: torch.Tensor, v_RKH: torch.Tensor) -> None:
        """Store what later chunks will read."""
        start, stop = self.places.tail
        if start < stop:
            self.store.write(layer, (start, stop), k_RKH[start - stop :], v_RKH[start - stop :])

    def forward(
        self, layer: int, q_SNH: torch.Tensor, k_RKH: torch.Tensor, v_RKH: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Over this rank's keys: out ``[S, N, H]``, lse ``[S, N]``, -inf where a query sees none of them."""
        total = RunningResult(q_SNH)
        for pairs in self.own:
            total.add(pairs.query_index, *self.kernel.forward(q_SNH, k_RKH, v_RKH, pairs, self.scale))
        if self.parts:
            following, last = layer + 1, self._num_layers - 1 - self._keys_only
            self.store.prepare(layer, self.prefix, (0, 0), following if following <= last else None)
            keys, values = self.store.keys_values(layer)
            part = self.kernel.forward(q_SNH, keys, values, self.prefix_pairs, self.scale)
            total.add(self.prefix_pairs.query_index, *part)
        return total.finish()

    def backward(
        self, layer: int, dout_SNH: torch.Tensor, q_SNH: torch.Tensor, k_RKH: torch.Tensor, v_RKH: torch.Tensor,
        out_SNH: torch.Tensor, lse_SN: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(dq over this rank's keys, dk, dv of own key rows, what later chunks left for them included), all wide."""
        wide = accumulate_dtype(q_SNH.dtype)
        self.store.prepare(layer, self.prefix, self.carried, layer - 1 if layer else None)
        dq = torch.zeros_like(q_SNH, dtype=wide)
        dk, dv = torch.zeros_like(k_RKH, dtype=wide), torch.zeros_like(v_RKH, dtype=wide)
        if self.places.carried is not None:
            left = self.store.gradients(layer, self.places.carried)
            if left is not None:
                rows = self.places.carried[0] - self.places.carried[1]
                dk[rows:] += left[0] * self.places.hop_weight
                dv[rows:] += left[1] * self.places.hop_weight
        for pairs in self.own:
            grads = self.kernel.backward(dout_SNH, q_SNH, k_RKH, v_RKH, out_SNH, lse_SN, pairs, self.scale)
            for total, index, grad in zip(
                (dq, dk, dv), (pairs.query_index, pairs.key_index, pairs.key_index), grads, strict=True
            ):
                add_rows(total, index, grad)
        if self.parts:
            keys, values = self.store.keys_values(layer)
        for part in self.parts:
            arguments = (dout_SNH, q_SNH, keys, values, out_SNH, lse_SN, part.pairs, self.scale)
            if part.carried is None:
                add_rows(dq, part.pairs.query_index, self.kernel.query_gradient(*arguments))
                continue
            grads = self.kernel.backward(*arguments)
            add_rows(dq, part.pairs.query_index, grads[0])
            self.store.add_gradients(layer, part.carried, grads[1], grads[2])
        return dq, dk, dv


class _ChunkAttention(torch.autograd.Function):
    """Own K/V and stored K/V enter differently: gradients of the stored ones are not returned but left in the store
    for the backward of the chunk they belong to, which returns them as its own."""

    @staticmethod
    def forward(
        ctx: Any, q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor, chunk: ChunkAttention, layer: int
    ) -> torch.Tensor:
        q_SNH, k_RKH, v_RKH = chunk.exchange.gather_qkv(q_TNH, k_TKH, v_TKH)
        chunk.keep_tail(layer, k_RKH, v_RKH)
        partial = chunk.forward(layer, q_SNH, k_RKH, v_RKH)
        out_TNH, *saved = chunk.exchange.return_out(q_TNH, q_SNH, *partial)
        ctx.save_for_backward(k_RKH, v_RKH, *saved)
        ctx.chunk, ctx.layer = chunk, layer
        return out_TNH

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (dout_TNH,) = grad_outputs
        chunk: ChunkAttention = ctx.chunk
        k_RKH, v_RKH, *saved = ctx.saved_tensors
        dout_SNH, q_SNH, out_SNH, lse_SN = chunk.exchange.gather_backward(dout_TNH, *saved)
        dq, dk, dv = chunk.backward(ctx.layer, dout_SNH, q_SNH, k_RKH, v_RKH, out_SNH, lse_SN)
        return (*chunk.exchange.return_gradients(dq, dk, dv, dout_TNH.dtype), None, None)


def _own_pairs(
    members: SequenceOf[tuple[Span, ...]], key_member: int | None, device: torch.device
) -> tuple[Pairs, ...]:
    """The chunk's queries over own keys of the chunk: a triangle for each document piece; where keys are one member's,
    the rows of that piece that lie behind it see all of it."""
    documents: dict[int, Rows] = {}  # rows of each document in the chunk
    places: list[list[tuple[Span, Rows]]] = []
    row = 0
    for spans in members:
        placed = []
        for span in spans:
            placed.append((span, (row, row + span.num_tokens)))
            documents[span.sequence] = (documents.get(span.sequence, (row, row))[0], row + span.num_tokens)
            row += span.num_tokens
        places.append(placed)
    if key_member is None:
        rows = tuple(documents.values())
        return (Pairs(True, rows, rows, device),) if rows else ()
    triangles: list[tuple[Rows, Rows]] = []
    behind: list[tuple[Rows, Rows]] = []
    key = 0
    for span, (start, stop) in places[key_member]:
        triangles.append(((start, stop), (key, key + span.num_tokens)))
        if stop < documents[span.sequence][1]:
            behind.append(((stop, documents[span.sequence][1]), (key, key + span.num_tokens)))
        key += span.num_tokens
    calls = ((True, triangles), (False, behind))
    return tuple(
        Pairs(causal, tuple(query for query, _ in pairs), tuple(keys for _, keys in pairs), device)
        for causal, pairs in calls
        if pairs
    )


def _pieces(parts: SequenceOf[tuple[Rows, Rows | None]], most_rows: int) -> Iterator[tuple[Rows, Rows | None]]:
    """The same rows in runs of at most ``most_rows``."""
    for (start, stop), carried in parts:
        for low in range(start, stop, most_rows):
            high = min(low + most_rows, stop)
            shift = None if carried is None else carried[0] - start
            yield (low, high), None if shift is None else (low + shift, high + shift)


def _first_document_rows(members: SequenceOf[tuple[Span, ...]]) -> int:
    """Rows of the chunk's first document if it began in an earlier chunk, else 0."""
    spans = [span for member in members for span in member]
    if not spans or spans[0].start_token == 0:
        return 0
    return sum(span.num_tokens for span in spans if span.sequence == spans[0].sequence)
