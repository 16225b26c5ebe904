"""The planning problem of one step as one value: lengths, ranks, cost model and limits."""

from __future__ import annotations

from dataclasses import dataclass, replace

from planner.cost.limits import PlanLimits
from planner.cost.model import CostModel
from planner.errors import SpecError
from planner.plan import MemoryAction


@dataclass(frozen=True, slots=True, kw_only=True)
class StepProblem:
    """What every strategy is given.

    ``lengths[i]``: tokens of sequence i of the step. ``num_ranks``: data ranks. Raises SpecError where there is no
    rank, no sequence, or a sequence without tokens.
    """

    lengths: tuple[int, ...]
    num_ranks: int
    cost: CostModel
    limits: PlanLimits

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", tuple(self.lengths))  # callers may hand over a list
        if self.num_ranks < 1:
            raise SpecError(f"a plan needs at least 1 rank, got {self.num_ranks}")
        if not self.lengths:
            raise SpecError("a step needs at least one sequence, got none")
        for index, num_tokens in enumerate(self.lengths):
            if num_tokens < 1:
                raise SpecError(f"sequence {index} has {num_tokens} tokens; every sequence needs at least 1")

    @property
    def node_size(self) -> int:
        """Data ranks of a full node, at most ``num_ranks``."""
        return self.limits.node_size(self.num_ranks)

    @property
    def max_rank_tokens(self) -> int:
        """The most tokens of a microbatch that one rank can hold when all activations are kept."""
        return self.cost.max_local_tokens(self.limits.device_budget_bytes)

    @property
    def keeps_all(self) -> bool:
        """Whether every plan keeps all activations, because nothing else is allowed or nothing else is priced."""
        return set(self.limits.policies) <= {MemoryAction.KEEP} or not self.cost.prices_policies

    def keeping_all(self) -> StepProblem:
        """The same problem where all activations have to be kept."""
        return replace(self, limits=replace(self.limits, policies=(MemoryAction.KEEP,)))

    def without_chunks(self) -> StepProblem:
        """The same problem where no microbatch may run in chunks."""
        policies = tuple(action for action in self.limits.policies if action is not MemoryAction.CHUNK)
        return replace(self, limits=replace(self.limits, policies=policies))

    def is_proven(self, makespan_s: float, bound_s: float) -> bool:
        """Whether a plan is within the limits' relative gap of its proven lower bound. Both arguments (seconds) leave
        ``step_fixed_s`` out; the gap is a share of the whole step."""
        return makespan_s - bound_s <= self.limits.relative_gap * (makespan_s + self.cost.step_fixed_s)
