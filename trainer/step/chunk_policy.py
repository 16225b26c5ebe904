"""The chunk policy of a run, from its settings."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from memory.sparse_chunks import ChunkSampler, Sampling
from planner.inputs.model import ModelSpec
from planner.units import parse_bytes

if TYPE_CHECKING:
    from trainer.settings.tree import TrainConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkPolicy:
    """How a run trains in chunks. ``chunk_tokens``: most rows of a rank in one chunk. ``keep_rows``: how many rows of
    the last chunks keep their activations, so that these chunks run forward only once. ``sampler``: draws the chunks
    that run backward; None for all. ``offloads``: K/V of earlier chunks and their dK/dV are in the run's tier."""

    chunk_tokens: int
    keep_rows: int = 0
    sampler: ChunkSampler | None = None
    offloads: bool = False

    def describe_gradients(self) -> str:
        """How exact the gradients are, for logs and metrics."""
        return "exact" if self.sampler is None else self.sampler.describe()

    def steady(self) -> ChunkPolicy:
        """The same amount of work without randomness, for measuring time and memory."""
        sampler = None if self.sampler is None else replace(self.sampler, kind=Sampling.EVEN)
        return replace(self, sampler=sampler)


def chunk_policy(config: TrainConfig, spec: ModelSpec) -> ChunkPolicy | None:
    """The policy of a run's (checked) settings; None if it trains on whole microbatches."""
    memory = config.memory
    if memory.chunk_tokens is None:
        return None
    sampler = None
    if memory.sample_fraction is not None:
        sampler = ChunkSampler(
            kind=Sampling(memory.sampling), fraction=memory.sample_fraction, seed=config.run.seed
        )
    element_bytes = 2 if config.run.dtype == "bf16" else 4
    saved_bytes = spec.saved_bytes_per_token(element_bytes)
    if memory.mlp_chunk_tokens:  # only the MLP's input is saved: not the norm's output, gate, up and their product
        saved_bytes -= (spec.hidden_dim + 4 * spec.ffn_dim) * element_bytes
    row_bytes = spec.num_layers * saved_bytes // config.parallel.tensor_parallel
    budget_bytes = parse_bytes(memory.chunk_budget, what="memory.chunk_budget")
    return ChunkPolicy(
        chunk_tokens=memory.chunk_tokens, keep_rows=budget_bytes // row_bytes, sampler=sampler,
        offloads=memory.tier is not None,
    )
