"""A cost model with round numbers, and random steps for it."""

from __future__ import annotations

import random
from dataclasses import replace

from planner.cost.chunk_fit import ChunkFit
from planner.cost.fits import ActivationFit, MemoryFit, Provenance, TimeFit
from planner.cost.limits import PlanLimits
from planner.cost.model import CostModel
from planner.plan import AttentionKind, MemoryAction

LOCAL, ULYSSES, RING = AttentionKind.LOCAL, AttentionKind.ULYSSES, AttentionKind.RING


def make_cost(
    num_ranks: int, *, kinds: tuple[AttentionKind, ...] = (ULYSSES,), fixed_s: float = 2e-3, step_fixed_s: float = 0.02
) -> CostModel:
    """Prices of local and of every degree of ``kinds`` up to ``num_ranks``. Ranks share work evenly, and groups of more
    than one rank cost more per token. Memory: 100 MB and 20 kB per token."""
    shapes = [(LOCAL, 1)] + [(kind, degree) for kind in kinds for degree in range(2, num_ranks + 1)]
    times = tuple(
        TimeFit(
            kind=kind, degree=degree, s_per_token2=4e-8 / degree,
            s_per_token=1e-4 / degree + (0.0 if degree == 1 else 8e-6 + (2e-6 if kind is RING else 0.0)),
            s_per_sequence=2e-4, fixed_s=fixed_s * (1 + 0.1 * (degree - 1)),
        )
        for kind, degree in shapes
    )
    return CostModel(
        times=times, memory=MemoryFit(fixed_bytes=10**8, bytes_per_token=20_000.0), step_fixed_s=step_fixed_s,
        peak_flop_per_s=1e12, provenance=Provenance(source="derived", cluster="test", model="test"),
    )


def make_limits(
    *, rank_tokens: int = 4096, kinds: tuple[AttentionKind, ...] = (ULYSSES,), max_ulysses_degree: int = 64,
    max_nodes: int = 200, relative_gap: float = 0.02, time_limit_s: float = 60.0,
) -> PlanLimits:
    """Limits under which a rank of ``make_cost`` holds exactly ``rank_tokens`` tokens."""
    return PlanLimits(
        device_budget_bytes=10**8 + 20_000 * rank_tokens, max_ulysses_degree=max_ulysses_degree, kinds=kinds,
        max_nodes=max_nodes, relative_gap=relative_gap, time_limit_s=time_limit_s,
    )


def with_activation(cost: CostModel) -> CostModel:
    """``make_cost`` where swapping a token frees 18 of its 20 kB, and recomputing it frees 14 kB and takes a fifth of
    its linear time. The copy hides for 0.3 of a sequence of 1000 tokens and for 0.8 of one of 7000."""
    return replace(cost, activation=ActivationFit(
        swap_bytes_per_token=18_000.0, recompute_bytes_per_token=14_000.0, recompute_s_per_token=2e-5,
        copy_bytes_per_s=1.35e8, hidden_share=2 / 7,
    ))


def with_chunks(cost: CostModel, *, s_per_chunk: float = 1e-3, num_kv_heads: int = 2) -> CostModel:
    """``make_cost`` with chunks: 3 of a token's 20 kB are K/V and their gradients; a token of a chunk takes 21 kB."""
    return replace(cost, chunks=ChunkFit(
        resident_bytes_per_token=3000.0, num_kv_heads=num_kv_heads, fixed_bytes=0, bytes_per_token=21_000.0,
        shared_bytes_per_token=500.0, again_attention=2 / 7, again_linear=1 / 3, s_per_chunk=s_per_chunk,
    ))


def with_policies(limits: PlanLimits, *policies: MemoryAction, host_tokens: int = 10**6) -> PlanLimits:
    """These limits with policies allowed, and host memory for ``host_tokens`` swapped tokens of
    ``with_activation``."""
    return replace(limits, policies=policies or tuple(MemoryAction), host_budget_bytes=18_000 * host_tokens)


def skewed_lengths(seed: int, num_sequences: int, longest: int) -> list[int]:
    """Log-normal lengths like those of documents: median 330 tokens, with a long tail that is cut off at
    ``longest``."""
    draw = random.Random(seed)
    return [min(int(draw.lognormvariate(5.8, 1.2)) + 1, longest) for _ in range(num_sequences)]
