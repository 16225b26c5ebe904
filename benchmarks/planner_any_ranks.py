"""How often ``adaptive`` and Megatron's own scheduler fail to plan random batches at any number of ranks.

A batch is feasible by construction: lengths are log-uniform from 1 token up to what all ranks can hold together, less
two tokens a rank for uneven splits. Megatron's ``BalancedCPScheduler`` forms groups of powers of two and of all ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from benchmarks.peers.planners import PeerFailureError, megatron_core_rounds
from planner.cost.data_sheet import derive_cost
from planner.cost.limits import PlanLimits
from planner.errors import InfeasibleError, SpecError
from planner.inputs.files import load_cluster, load_model
from planner.plan import AttentionKind
from planner.pricing.problem import StepProblem
from planner.step_planner import plan_step

NUM_RANKS = (6, 12, 24, 100)
BATCH_SEQUENCES = 32
COLUMNS = ("ranks", "batches", "longest allowed", "adaptive fails", "megatron-core fails", "as")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """Failures at one number of ranks. ``peer_failures``: number of failures by exception name."""

    num_ranks: int
    num_batches: int
    max_tokens: int
    our_failures: int
    peer_failures: Counter[str]

    @property
    def row(self) -> str:
        kinds = ", ".join(f"{name} {count}" for name, count in sorted(self.peer_failures.items())) or "-"
        cells = (
            self.num_ranks, self.num_batches, f"{self.max_tokens / 1000:,.0f}K", self.our_failures,
            self.peer_failures.total(), kinds,
        )
        return "| " + " | ".join(map(str, cells)) + " |"


def tally(num_ranks: int, num_batches: int, *, seed: int) -> Tally:
    """Plan random batches on ``num_ranks`` devices of the ``h100-1024`` cluster with ``llama-3-8b``."""
    cluster, model = load_cluster("h100-1024"), load_model("llama-3-8b")
    cost = derive_cost(cluster, model, num_ranks=num_ranks)
    limits = PlanLimits(
        device_budget_bytes=cluster.device.memory_bytes - cluster.device.reserved_bytes,
        max_ulysses_degree=model.num_query_heads, kinds=(AttentionKind.ULYSSES, AttentionKind.RING),
        devices_per_node=cluster.devices_per_node,
    )
    rank_tokens = cost.max_local_tokens(limits.device_budget_bytes)
    max_tokens = (rank_tokens - 2) * num_ranks
    our_failures, peer_failures = 0, Counter[str]()
    for number, lengths in enumerate(random_batches(num_batches, max_tokens, seed=seed)):
        try:
            plan_step(
                StepProblem(lengths=lengths, num_ranks=num_ranks, cost=cost, limits=limits),
                step=number,
                strategy="adaptive",
            )
        except (SpecError, InfeasibleError):
            our_failures += 1
        try:
            megatron_core_rounds(lengths, num_ranks, max_rank_tokens=rank_tokens)
        except PeerFailureError as error:
            peer_failures[str(error).partition(":")[0]] += 1
    return Tally(
        num_ranks=num_ranks, num_batches=num_batches, max_tokens=max_tokens, our_failures=our_failures,
        peer_failures=peer_failures,
    )


def random_batches(num_batches: int, max_tokens: int, *, seed: int) -> Iterator[list[int]]:
    """Batches of ``BATCH_SEQUENCES`` lengths, log-uniform from 1 to ``max_tokens``."""
    rng = np.random.Generator(np.random.Philox(seed))
    for _ in range(num_batches):
        drawn = np.exp(rng.uniform(0.0, np.log(max_tokens), BATCH_SEQUENCES))
        yield np.clip(drawn, 1, max_tokens).astype(int).tolist()
