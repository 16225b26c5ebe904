"""Attention of one chunk's queries over the chunk's own K/V and over stored K/V of the document it continues.

K/V of earlier chunks are never sent again: only tensors of the current chunk travel, so the bytes that each chunk sends
do not depend on how many chunks came before it.

- A single rank sends nothing.
- ``ulysses`` exchanges heads for tokens in every chunk; each rank stores all tokens of some heads.
- Ring groups send queries instead of K/V. Each rank stores K/V of its own part of every chunk, receives the chunk's
  queries of all members and returns partial outputs, which their owners merge by log-sum-exp (LSE). In the backward
  partial dq return to their owners in the same way; dK/dV are never sent.

Shapes: T own rows of the chunk, S all members' rows of the chunk that this rank computes on, R own key rows,
N query heads, K KV heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from parallel.chunk_exchange import ChunkExchange
from parallel.kernel import AttentionKernel, Pairs, Rows
from parallel.lse import RunningResult, accumulate_dtype, add_rows
from planner.plan import Span

_PIECE_ROWS = 2048
"""Most stored rows per backward kernel call (more if the chunk itself has more). The call's dK/dV are held in addition
to those in the store; without this limit they would be as large as one layer's dK/dV of the whole document."""


class KeyValueStore(Protocol):
    """Holds, by layer, the K/V of chunks and the K/V gradients that later chunks accumulate for them."""

    def prepare(self, layer: int, rows: Rows, carried: Rows, following: int | None) -> None:
        """Announce that layer ``layer`` will now read these rows of K/V and of the carried dK/dV (empty range: none).
        Layer ``following`` comes next (None: not known), so the store can fetch its rows early."""

    def write(self, layer: int, rows: Rows, k_TKH: torch.Tensor, v_TKH: torch.Tensor) -> None:
        """Store K/V in these rows."""

    def keys_values(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of all stored rows. Only rows that were prepared are valid."""

    def add_gradients(self, layer: int, rows: Rows, dk_TKH: torch.Tensor, dv_TKH: torch.Tensor) -> None:
        """Add to the dK/dV carried for these rows."""

    def gradients(self, layer: int, rows: Rows) -> tuple[torch.Tensor, torch.Tensor] | None:
        """dK/dV that later chunks accumulated for these rows; None if there are none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkPlaces:
    """Row ranges in this rank's store.

    ``parts``: the first document's earlier tokens, each range with the range that accumulates its dK/dV (None: these
    gradients are not wanted and not computed). ``tail``: where the last own key rows are stored (empty: they are not).
    ``carried``: where later chunks accumulate dK/dV of the tail. ``hop_weight``: the factor these are multiplied by
    when this chunk reads them.
    """

    parts: tuple[tuple[Rows, Rows | None], ...] = ()
    tail: Rows = (0, 0)
    carried: Rows | None = None
    hop_weight: float = 1.0


@dataclass(frozen=True, slots=True)
class _Part:
    """A range of stored keys, and the query rows that attend to all of it."""

    pairs: Pairs
    rows: Rows
    carried: Rows | None


class ChunkAttention:
    """Callable ``(q_TNH, k_TKH, v_TKH) -> out_TNH`` for the layers of one forward of one chunk, in order.

    ``members``: the chunk's spans by group member. ``key_member``: the member whose keys this rank holds (None: those
    of all members). ``keys_only``: the last layer stores its K/V and returns None. Communicates with the chunk's group.
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
        # rows are assigned chunk by chunk, so the prefix's carried rows and this chunk's are adjacent
        self.carried = (runs[0][0], runs[-1][1]) if runs else (0, 0)

    def __call__(self, q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor) -> torch.Tensor | None:
        layer, self._next_layer = self._next_layer, self._next_layer + 1
        if self._keys_only and layer == self._num_layers - 1:
            self.keep_tail(layer, *self.exchange.gather_keys(q_TNH, k_TKH, v_TKH))
            return None
        out_TNH: torch.Tensor = _ChunkAttention.apply(q_TNH, k_TKH, v_TKH, self, layer)
        return out_TNH

    def keep_tail(self, layer: int, k_RKH: torch.Tensor, v_RKH: torch.Tensor) -> None:
        """Store the last key rows, which later chunks will read."""
        start, stop = self.places.tail
        if start < stop:
            self.store.write(layer, (start, stop), k_RKH[start - stop :], v_RKH[start - stop :])

    def forward(
        self, layer: int, q_SNH: torch.Tensor, k_RKH: torch.Tensor, v_RKH: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention over this rank's keys: out ``[S, N, H]`` and lse ``[S, N]``, -inf for a query that sees no key."""
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
        """dq over this rank's keys, and dk, dv of own key rows with what later chunks accumulated; at least fp32."""
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
    """Own and stored K/V are treated differently: dK/dV of stored rows are not returned but accumulated in the store.
    The backward of the chunk that these rows belong to returns them as its own."""

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
    """The chunk's queries over the chunk's own keys: one causal call per piece of a document. If this rank holds only
    one member's keys, later rows of the same document attend to all of them in a full call."""
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
    """Cut these ranges into ranges of at most ``most_rows`` rows."""
    for (start, stop), carried in parts:
        for low in range(start, stop, most_rows):
            high = min(low + most_rows, stop)
            shift = None if carried is None else carried[0] - start
            yield (low, high), None if shift is None else (low + shift, high + shift)


def _first_document_rows(members: SequenceOf[tuple[Span, ...]]) -> int:
    """Number of rows of the chunk's first document if it began in an earlier chunk, else 0."""
    spans = [span for member in members for span in member]
    if not spans or spans[0].start_token == 0:
        return 0
    return sum(span.num_tokens for span in spans if span.sequence == spans[0].sequence)
