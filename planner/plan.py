"""The step as a value: which ranks work together, on what, and in which order. Frozen, hashable, tuples and numbers.

Ranks in a plan are *data ranks*: coordinates on the data axis, 0 .. num_ranks - 1. With tensor parallelism each data
rank stands for a whole tensor-parallel group; ``parallel.mesh`` turns data ranks into global ranks.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from planner.codec import LATER, from_plain, to_plain
from planner.errors import PlanError, SpecError

PLAN_SCHEMA = 1


class AttentionKind(StrEnum):
    """How the ranks of a group share the attention of its sequences. Plans and flags use these names. All code of a
    kind is in ``planner/schedules/kinds/<name>.py``."""

    LOCAL = "local"
    ULYSSES = "ulysses"
    RING = "ring"
    USP = "usp"
    DOUBLE_RING = "double_ring"
    GROUP_CAST = "group_cast"
    ALL_GATHER = "all_gather"
    ROUTED_RING = "routed_ring"


class Sharding(StrEnum):
    """When parameters are gathered. ``gather_once``: once per step, and ranks may run different numbers of
    microbatches. ``zero3``: layer by layer in every microbatch, so all ranks run microbatches in lockstep
    (``planner.pricing.lockstep``)."""

    GATHER_ONCE = "gather_once"
    ZERO3 = "zero3"


class SolveStatus(StrEnum):
    """How the plan was found. OPTIMAL: within the requested gap of the bound, so of every plan that the bound covers
    (docs/plan.md). LATE: the planner did not finish in time, and the step used the greedy plan."""

    OPTIMAL = "optimal"
    FEASIBLE = "feasible"
    LIMIT = "limit"
    GREEDY = "greedy"
    STATIC = "static"
    LATE = "late"


@dataclass(frozen=True, slots=True, order=True)
class Sequence:
    """One document (or piece of one) of this step. ``index``: its position in the step's batch."""

    index: int
    num_tokens: int


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """Tokens ``start_token <= t < stop_token`` of sequence ``sequence``."""

    sequence: int
    start_token: int
    stop_token: int

    @property
    def num_tokens(self) -> int:
        return self.stop_token - self.start_token


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionGroup:
    """Ranks that share the attention of these sequences. ``ranks`` in group order; ``sequences`` in packing order.

    ``inner_degree``: for kinds with two levels, how many consecutive members form an inner group (usp: they exchange
    heads; double_ring: they form a ring; routed_ring: they are on one node). It divides the degree; 1 for other kinds.
    """

    kind: AttentionKind
    ranks: tuple[int, ...]
    sequences: tuple[int, ...]
    inner_degree: int = field(default=1, metadata=LATER)

    @property
    def degree(self) -> int:
        return len(self.ranks)


class MemoryAction(StrEnum):
    """What can happen to a token's saved activations between forward and backward. ``chunk``: nothing is saved, because
    the microbatch runs chunk by chunk."""

    KEEP = "keep"
    SWAP = "swap"
    RECOMPUTE = "recompute"
    CHUNK = "chunk"


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPolicy:
    """What happens to the saved activations of a microbatch: fractions of its tokens, which sum to 1. ``chunk_tokens``:
    if above 0, its groups run chunk by chunk, with at most so many tokens per rank in a chunk; 0: whole.

    ``PlanLimits.policies`` decides which fractions may be above 0.
    """

    keep_fraction: float = 1.0
    swap_fraction: float = 0.0
    recompute_fraction: float = 0.0
    chunk_tokens: int = field(default=0, metadata=LATER)

    @property
    def is_keep(self) -> bool:
        return self.swap_fraction == 0 and self.recompute_fraction == 0 and self.chunk_tokens == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Microbatch:
    """The ranks that run one forward and backward together. Every rank of ``ranks`` is in at least one group.

    ``moves``: (source rank, destination rank, tokens) from the layout of attention to the layout of everything else
    (see ``planner.schedules.linear_layout``); empty if these are the same."""

    ranks: tuple[int, ...]
    groups: tuple[AttentionGroup, ...]
    memory: MemoryPolicy = MemoryPolicy()
    predicted_s: float
    peak_bytes: int
    moves: tuple[tuple[int, int, int], ...] = field(default=(), metadata=LATER)


@dataclass(frozen=True, slots=True, kw_only=True)
class SolveReport:
    """How the plan was found and how good it is.

    ``objective_s``: this plan's step time under its cost model. ``bound_s``: a proven lower bound for all plans in the
    strategy's search space (0 if none is known). ``wall_s``: the solver's seconds, the only field that does not follow
    from the inputs; the digest leaves it out.
    """

    status: SolveStatus
    objective_s: float
    bound_s: float
    wall_s: float = 0.0
    note: str = ""

    @property
    def gap(self) -> float:
        """(objective - bound) / objective, 0 .. 1; 1 where no bound is known."""
        if self.objective_s <= 0:
            return 0.0
        return max(0.0, (self.objective_s - self.bound_s) / self.objective_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """Everything the runtime needs to run one step. Any two ranks run their common microbatches in this order.

    ``num_stages``: if above 1, every rank is a pipeline of this many stages (``planner.pricing.pipeline_order``), and
    seconds and bytes of microbatches are those of one stage."""

    step: int
    strategy: str
    num_ranks: int
    sequences: tuple[Sequence, ...]
    microbatches: tuple[Microbatch, ...]
    sharding: Sharding = Sharding.GATHER_ONCE
    predicted_s: float
    peak_bytes: int
    cost_digest: str
    solver: SolveReport
    schema: int = PLAN_SCHEMA
    num_stages: int = field(default=1, metadata=LATER)

    @property
    def num_tokens(self) -> int:
        return sum(sequence.num_tokens for sequence in self.sequences)


def plan_digest(plan: StepPlan) -> str:
    """sha256 of the canonical JSON without the solver's wall time. Equal digests mean that the same step is
    executed."""
    timeless = replace(plan, solver=replace(plan.solver, wall_s=0.0))
    return digest_of(timeless)


def digest_of(value: Any) -> str:
    """sha256 (hex) of the canonical JSON of a dataclass or plain value."""
    text = json.dumps(to_plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def plan_to_json(plan: StepPlan) -> str:
    """Canonical JSON in one line: it is broadcast, and stored in ``plans.jsonl``."""
    return json.dumps(to_plain(plan), sort_keys=True, separators=(",", ":"), allow_nan=False)


def plan_from_json(text: str) -> StepPlan:
    """Inverse of ``plan_to_json``. Raises PlanError for anything that is not a plan of this schema."""
    try:
        data = json.loads(text)
        if not isinstance(data, dict) or data.get("schema") != PLAN_SCHEMA:
            raise PlanError(f"not a plan of schema {PLAN_SCHEMA}: {text[:80]!r}")
        return from_plain(StepPlan, data, where="plan")
    except (json.JSONDecodeError, SpecError) as error:
        raise PlanError(f"unreadable plan: {error}") from None
