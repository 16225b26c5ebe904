"""The step as a value: who works with whom, on what, in which order. Frozen, hashable, made of tuples and numbers.

Ranks in a plan are *data ranks*: coordinates on the data axis, 0 .. num_ranks - 1. With tensor parallelism each of
them stands for a whole tensor-parallel group; ``parallel.mesh`` turns them into global ranks.
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
    """How the ranks of one group share the attention of the group's sequences: the names that plans and flags know.
    What a kind does is written in ``planner/schedules/kinds/<name>.py``, all of it."""

    LOCAL = "local"
    ULYSSES = "ulysses"
    RING = "ring"
    USP = "usp"
    DOUBLE_RING = "double_ring"
    GROUP_CAST = "group_cast"
    ALL_GATHER = "all_gather"
    ROUTED_RING = "routed_ring"


class Sharding(StrEnum):
    """When parameters are gathered. ``gather_once``: once a step, ranks may run unequal numbers of microbatches.
    ``zero3``: layer by layer in every microbatch, so all ranks run them in lockstep (``planner.pricing.lockstep``).
    """

    GATHER_ONCE = "gather_once"
    ZERO3 = "zero3"


class SolveStatus(StrEnum):
    """How the plan was found. Only OPTIMAL is a proof (to within the gap asked for); LATE: the planner was not done in
    time and the step took the greedy plan."""

    OPTIMAL = "optimal"
    FEASIBLE = "feasible"
    LIMIT = "limit"
    GREEDY = "greedy"
    STATIC = "static"
    LATE = "late"


@dataclass(frozen=True, slots=True, order=True)
class Sequence:
    """One document (or piece of one) of this step. ``index`` is its place in the step's batch."""

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

    ``inner_degree``: for kinds of two levels, how many consecutive members form an inner group (usp: they trade heads;
    double_ring: they form a ring; routed_ring: they are of one node). It divides the degree; 1 for all other kinds.
    """

    kind: AttentionKind
    ranks: tuple[int, ...]
    sequences: tuple[int, ...]
    inner_degree: int = field(default=1, metadata=LATER)

    @property
    def degree(self) -> int:
        return len(self.ranks)


class MemoryAction(StrEnum):
    """What can happen to the saved activations of a token between its forward and its backward. ``chunk``: there are
    none, its microbatch runs chunk by chunk."""

    KEEP = "keep"
    SWAP = "swap"
    RECOMPUTE = "recompute"
    CHUNK = "chunk"


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPolicy:
    """What happens to the saved activations of a microbatch: fractions of its tokens, summing to 1. ``chunk_tokens``:
    above 0, its groups run chunk by chunk, with at most so many tokens of a rank in one; 0: whole.

    Which fractions may be above 0 is the limits' choice (``PlanLimits.policies``).
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

    ``moves``: (source rank, destination rank, tokens) from where attention leaves tokens to where everything else runs
    on them (see ``planner.schedules.linear_layout``); none where that is the same."""

    ranks: tuple[int, ...]
    groups: tuple[AttentionGroup, ...]
    memory: MemoryPolicy = MemoryPolicy()
    predicted_s: float
    peak_bytes: int
    moves: tuple[tuple[int, int, int], ...] = field(default=(), metadata=LATER)


@dataclass(frozen=True, slots=True, kw_only=True)
class SolveReport:
    """How good the plan is, truthfully.

    ``objective_s``: this plan's step time under its cost model. ``bound_s``: a proven lower bound for the strategy's
    own search space (0 where none is known). ``wall_s`` is the only field that is not a function of the inputs; the
    digest leaves it out.
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
    """Everything the runtime needs to run one step. Any two ranks meet their common microbatches in this order.

    ``num_stages``: with more than 1, every rank is a pipeline of so many stages (``planner.pricing.pipeline_order``),
    and seconds and bytes of microbatches are those of one stage."""

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
    """sha256 of the canonical JSON without the solver's wall time: equal digests mean the same step is executed."""
    timeless = replace(plan, solver=replace(plan.solver, wall_s=0.0))
    return digest_of(timeless)


def digest_of(value: Any) -> str:
    """sha256 (hex) of the canonical JSON of a dataclass or plain value."""
    text = json.dumps(to_plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def plan_to_json(plan: StepPlan) -> str:
    """Canonical JSON, one line: what is broadcast and what ``plans.jsonl`` holds."""
    return json.dumps(to_plain(plan), sort_keys=True, separators=(",", ":"), allow_nan=False)


def plan_from_json(text: str) -> StepPlan:
    """Inverse of ``plan_to_json``. Raises PlanError on anything that is not a plan of this schema."""
    try:
        data = json.loads(text)
        if not isinstance(data, dict) or data.get("schema") != PLAN_SCHEMA:
            raise PlanError(f"not a plan of schema {PLAN_SCHEMA}: {text[:80]!r}")
        return from_plain(StepPlan, data, where="plan")
    except (json.JSONDecodeError, SpecError) as error:
        raise PlanError(f"unreadable plan: {error}") from None
