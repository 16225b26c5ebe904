"""One microbatch, chunk by chunk: SeCO (all chunks, exact) and SpaCO (a sample of them, an estimate).

Read ``run_chunked`` first. Groups run one after the other in plan order, the same on all their ranks: first a forward
pass over the chunks that stores K/V, then the selected chunks from last to first, each with a forward that builds its
graph and then its backward. Parameters are gathered before the step's first microbatch and gradients are summed after
its last, so each chunk's backward just adds to ``.grad``.

A chunk's tokens are divided evenly among the group's ranks, in token order, whatever layout the plan gives whole
microbatches: queries see only keys of their own and earlier chunks, and every rank should have work in every chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from memory.chunked import Chunk, cut_chunks, place_rows, schedule_chunks
from memory.chunked_kv import ChunkStore
from memory.chunked_loss import IGNORE
from memory.chunked_tier import NUM_DKV_BUFFERS, NUM_KV_BUFFERS, TieredChunkStore
from memory.sparse_chunks import EXACT, ChunkWeight
from memory.tiers import HOST
from parallel.chunk_attention import ChunkAttention, ChunkPlaces
from parallel.chunk_exchange import ChunkExchange, ChunkHeads, NoExchange, QueryExchange
from parallel.heads import HeadExchange, HeadLayout
from parallel.program import GroupProgram, RankMicrobatch
from planner.plan import AttentionKind, Span
from trainer.step.chunk_policy import ChunkPolicy
from trainer.step.runtime import ReadSpans, Runtime


def resident_bytes_per_token(runtime: Runtime) -> float:
    """Bytes of K/V and fp32 dK/dV per local token in the memory whose peak is measured, in chunked training; 0 if the
    run does not train in chunks. On CPU the host tier is in that memory too."""
    if runtime.chunking is None:
        return 0.0
    num_layers, kv_bytes, dkv_bytes = layer_row_bytes(runtime)
    tier = runtime.memory.tier if runtime.chunking.offloads else None
    if tier is None or (tier.name == HOST and runtime.mesh.device.type == "cpu"):
        return num_layers * (kv_bytes + dkv_bytes)
    return min(NUM_KV_BUFFERS, num_layers) * kv_bytes + min(NUM_DKV_BUFFERS, num_layers) * dkv_bytes


def layer_row_bytes(runtime: Runtime) -> tuple[int, float, float]:
    """Number of layers of this rank, and bytes of one token's K/V and of its dK/dV in one layer."""
    spec = runtime.model.spec
    elements = 2 * spec.num_kv_heads * spec.head_dim / runtime.mesh.tensor_size
    wide = torch.promote_types(runtime.compute_dtype, torch.float32)
    return len(runtime.model.layers), elements * runtime.compute_dtype.itemsize, elements * wide.itemsize


def run_chunked(
    runtime: Runtime, microbatch: RankMicrobatch, read_spans: ReadSpans, *, step: int, num_tokens: int
) -> torch.Tensor:
    """Forward and backward of one microbatch without pipeline stages. Adds the gradients of (sum of token losses /
    num_tokens) to ``.grad``.

    Returns this rank's sum of token losses, float64. With a sampler it is an estimate, as the gradients are, and it is
    the same for the same (seed, step, plan).
    """
    total = torch.zeros((), dtype=torch.float64, device=runtime.mesh.device)
    for group in microbatch.groups:
        if group.sequences:
            run = GroupRun(runtime, microbatch, group, read_spans, step=step, num_tokens=num_tokens)
            total += run.run()
    return total


def chunking_of(runtime: Runtime, microbatch: RankMicrobatch) -> ChunkPolicy | None:
    """How a microbatch runs in chunks: by its plan, or else by the run's policy; None if it runs whole. Only the run
    decides whether gradients may be estimates, never a plan."""
    planned = microbatch.memory.chunk_tokens
    if not planned:
        return runtime.chunking
    return ChunkPolicy(chunk_tokens=planned, sampler=None if runtime.chunking is None else runtime.chunking.sampler)


class GroupRun:
    """One group's chunks on one rank, from the first forward to the last backward. A microbatch that runs whole is a
    single chunk."""

    def __init__(
        self, runtime: Runtime, microbatch: RankMicrobatch, group: GroupProgram, read_spans: ReadSpans, *, step: int,
        num_tokens: int,
    ) -> None:
        self._runtime, self._group, self._read, self._num_tokens = runtime, group, read_spans, num_tokens
        whole = ChunkPolicy(chunk_tokens=sum(span.num_tokens for span in group.sequences))
        policy = chunking_of(runtime, microbatch) or whole
        self._chunks = cut_chunks(group.sequences, degree=len(group.ranks), chunk_tokens=policy.chunk_tokens)
        self._weights = self._draw(policy, (step, microbatch.index, group.sequences[0].sequence))
        selected = [weight.selected for weight in self._weights]
        self._schedule = schedule_chunks(self._chunks, selected, keep_rows=policy.keep_rows)
        # ulysses ranks hold all tokens of some heads, other ranks their own tokens of all heads
        self._key_member = None if group.kind is AttentionKind.ULYSSES else group.group_index
        self._places, num_rows, num_carried = place_rows(self._chunks, self._schedule, member=self._key_member)
        tier = runtime.memory.tier if policy.offloads and num_rows else None
        self._store = (
            ChunkStore(num_rows, num_carried) if tier is None
            else TieredChunkStore(self._places, tier, num_layers=len(runtime.model.layers))
        )

    def run(self) -> torch.Tensor:
        """Run both passes. Returns the (weighted) sum of own tokens' losses."""
        total = torch.zeros((), dtype=torch.float64, device=self._runtime.mesh.device)
        kept: dict[int, torch.Tensor] = {}
        for index in self._schedule.forward:
            if index in self._schedule.kept:
                kept[index] = self._forward(self._chunks[index], stores=True)
            else:
                self._store_tail(self._chunks[index])
        for index in self._schedule.backward:
            loss = kept.pop(index) if index in kept else self._forward(self._chunks[index], stores=False)
            weight = self._weights[index].loss_weight
            total += loss.detach() * weight
            with self._recorded(index, "backward"):
                (loss * (weight / self._num_tokens)).backward()
        self.close()
        return total

    def close(self) -> None:
        """Free the stores; call it after the last backward."""
        self._store.close()

    # ---- chunks one by one, for ``zero3`` and for pipeline stages, where no chunk keeps its activations

    @property
    def stored(self) -> tuple[int, ...]:
        """Chunks whose K/V later chunks read, in order."""
        return tuple(index for index, needed in enumerate(self._schedule.needed) if needed)

    @property
    def selected(self) -> tuple[int, ...]:
        """Chunks that run backward, last one first."""
        return self._schedule.backward

    def store(self, index: int) -> None:
        """The first pass of one chunk: store its K/V."""
        self._store_tail(self._chunks[index])

    def backward(self, index: int) -> torch.Tensor:
        """The second pass of one chunk. Returns the (weighted) sum of own tokens' losses."""
        loss, weight = self._forward(self._chunks[index], stores=False), self._weights[index].loss_weight
        with self._recorded(index, "backward"):
            (loss * (weight / self._num_tokens)).backward()
        return loss.detach() * weight

    def num_rows(self, index: int) -> int:
        """Own rows of the chunk in a first pass through the stages: all if it will run backward, else its tail."""
        return sum(span.num_tokens for span in self._own_spans(index))

    @torch.no_grad()
    def stage_forward(self, index: int, hidden_TD: torch.Tensor | None) -> torch.Tensor | None:
        """The first pass of one chunk on this stage; ``hidden_TD`` ``[num_rows, D]`` comes from the previous stage.
        Returns what the next stage needs. The last stage only stores K/V, if they are needed, and returns None."""
        chunk, needed = self._chunks[index], self._schedule.needed[index]
        if not self._runtime.model.stage.is_last:
            chunk = chunk if self._weights[index].selected else chunk.tail()
            rows = self._read(self._own_spans(index))
            attention = self._attention(chunk, stores=needed, keys_only=False)
            return self._runtime.model(rows.tokens_T, rows.positions_T, None, attention, hidden_TD)
        if needed:
            tail = chunk.tail()
            rows = self._read(tail.members[self._group.group_index])
            if hidden_TD is not None:
                hidden_TD = hidden_TD[len(hidden_TD) - len(rows.tokens_T) :]  # the last document's rows come last
            attention = self._attention(tail, stores=True, keys_only=True)
            self._runtime.model(rows.tokens_T, rows.positions_T, None, attention, hidden_TD)
        return None

    def stage_again(self, index: int, hidden_TD: torch.Tensor | None) -> torch.Tensor:
        """A selected chunk's forward on this stage with its graph: returns hidden states, or the sum of losses."""
        chunk = self._chunks[index]
        rows = self._read(chunk.members[self._group.group_index])
        attention = self._attention(chunk, stores=False, keys_only=False)
        output: torch.Tensor = self._runtime.model(
            rows.tokens_T, rows.positions_T, rows.labels_T, attention, hidden_TD
        )
        return output

    def loss_weight(self, index: int) -> float:
        """The factor of the chunk's losses in the (estimated) sum."""
        return self._weights[index].loss_weight

    def _own_spans(self, index: int) -> tuple[Span, ...]:
        chunk = self._chunks[index]
        chunk = chunk if self._weights[index].selected else chunk.tail()
        return chunk.members[self._group.group_index]

    def _draw(self, policy: ChunkPolicy, key: tuple[int, ...]) -> tuple[ChunkWeight, ...]:
        if policy.sampler is None:
            return (EXACT,) * len(self._chunks)
        loss_tokens = [chunk.num_tokens for chunk in self._chunks]
        if policy.sampler.needs_loss_tokens:
            # all ranks of the group must draw the same chunks, so each counts the labels of the whole chunk
            loss_tokens = [int((self._read(chunk.spans).labels_T != IGNORE).sum()) for chunk in self._chunks]
        return policy.sampler.draw(loss_tokens, key)

    def _forward(self, chunk: Chunk, *, stores: bool) -> torch.Tensor:
        """Sum of the chunk's own losses, with its graph. ``stores``: store its K/V if later chunks read them."""
        rows = self._read(chunk.members[self._group.group_index])
        attention = self._attention(chunk, stores=stores, keys_only=False)
        with self._recorded(chunk.index, "forward"):
            loss: torch.Tensor = self._runtime.model(rows.tokens_T, rows.positions_T, rows.labels_T, attention)
        return loss

    @torch.no_grad()
    def _store_tail(self, chunk: Chunk) -> None:
        """Run the chunk's last document as far as its K/V and store them. No loss, no last MLP, no graph."""
        tail = chunk.tail()
        rows = self._read(tail.members[self._group.group_index])
        attention = self._attention(tail, stores=True, keys_only=True)
        with self._recorded(chunk.index, "K/V"):
            self._runtime.model(rows.tokens_T, rows.positions_T, None, attention)

    @contextmanager
    def _recorded(self, index: int, what: str) -> Iterator[None]:
        """Record this pass of a chunk in the run's timeline, if times are recorded."""
        timeline = self._runtime.memory.recorder
        if timeline is not None:
            timeline.begin(f"chunk {index} {what}")
        yield
        if timeline is not None:
            timeline.end()

    def _attention(self, chunk: Chunk, *, stores: bool, keys_only: bool) -> ChunkAttention:
        runtime, placed = self._runtime, self._places[chunk.index]
        places = ChunkPlaces(
            parts=placed.parts, tail=placed.tail if stores else (0, 0), carried=placed.carried,
            hop_weight=self._weights[chunk.index].hop_weight,
        )
        spec, tensor_size = runtime.model.spec, runtime.mesh.tensor_size
        exchange = make_exchange(
            runtime, self._group, chunk, spec.num_query_heads // tensor_size, spec.num_kv_heads // tensor_size
        )
        kernel, device = runtime.engine.kernel, runtime.mesh.device
        if isinstance(exchange, ChunkHeads):
            kernel = exchange.heads.mapped_kernel(kernel, device)
        return ChunkAttention(
            chunk.members, key_member=self._key_member, places=places, store=self._store, exchange=exchange,
            kernel=kernel, scale=spec.head_dim**-0.5, num_layers=len(runtime.model.layers),
            keys_only=keys_only, device=device,
        )


def make_exchange(
    runtime: Runtime, group: GroupProgram, chunk: Chunk, num_query_heads: int, num_kv_heads: int
) -> ChunkExchange:
    """What the group's ranks exchange in one chunk. Head counts are those of one tensor rank."""
    if len(group.ranks) == 1:
        return NoExchange()
    rows = tuple(sum(span.num_tokens for span in spans) for spans in chunk.members)
    wire = runtime.engine.wire
    if group.kind is AttentionKind.ULYSSES:
        layout = HeadLayout(num_query_heads, num_kv_heads, len(group.ranks))
        return ChunkHeads(HeadExchange(layout, group.ranks, group.group_index, rows, wire))
    return QueryExchange(group.ranks, group.group_index, rows, wire)
