"""Build a priced StepPlan from a strategy's groups. Every strategy ends here, so all plans are priced alike."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from planner.cost.model import KEEP, CostModel
from planner.errors import PlanError
from planner.plan import (
    AttentionGroup,
    AttentionKind,
    MemoryPolicy,
    Microbatch,
    Sequence,
    SolveReport,
    SolveStatus,
    StepPlan,
)
from planner.pricing.microbatch import MicrobatchPrice, lone_group_s, price_groups
from planner.pricing.pipeline_order import StageWork
from planner.pricing.problem import StepProblem
from planner.pricing.simulate import run_schedule
from planner.pricing.timeline import play
from planner.schedules.remap import Move


@dataclass(frozen=True, slots=True)
class GroupChoice:
    """A group: ranks that share the attention of these sequences (indices into the step). ``memory`` is the
    microbatch's policy, so all of its groups have the same."""

    kind: AttentionKind
    ranks: tuple[int, ...]
    sequences: tuple[int, ...]
    memory: MemoryPolicy = KEEP


MicrobatchChoice = GroupChoice | tuple[GroupChoice, ...]  # a microbatch: one group, or several


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A strategy's answer. ``groups``: the microbatches in global order. ``bound_s``: proven lower bound of the
    makespan in seconds, ``step_fixed_s`` left out. ``moves``: of each microbatch (see ``Microbatch``), or empty where
    none has any."""

    groups: tuple[MicrobatchChoice, ...]
    status: SolveStatus
    bound_s: float
    note: str
    moves: tuple[tuple[Move, ...], ...] = ()


def assemble_plan(
    *,
    step: int,
    strategy: str,
    num_ranks: int,
    lengths: SequenceOf[int],
    groups: Iterable[MicrobatchChoice],
    cost: CostModel,
    status: SolveStatus,
    bound_s: float,
    wall_s: float,
    note: str = "",
    cost_digest: str | None = None,
    moves: SequenceOf[tuple[Move, ...]] = (),
) -> StepPlan:
    """Build and price a plan with one microbatch per entry of ``groups``, in this order, which becomes the plan's
    global order. The groups of one entry may share ranks; they too run in their order.

    ``lengths[i]``: tokens of sequence i. ``bound_s``: proven lower bound of the whole step, with ``step_fixed_s`` (0
    where none is known); where it exceeds the simulated step by no more than rounding, it is lowered to that.
    ``cost_digest``: the cost model's, where the caller has it already. ``moves``: of each entry, or empty. Raises
    PlanError where the cost model cannot price a group or its moves.
    """
    choices = list(groups)
    moved = list(moves) or [()] * len(choices)
    attention = [attention_groups(choice, cost) for choice in choices]
    prices = [
        _price(choice, groups, lengths, cost, part)
        for choice, groups, part in zip(choices, attention, moved, strict=True)
    ]
    simulation = run_schedule(prices, num_ranks=num_ranks, cost=cost)
    microbatches = tuple(
        Microbatch(
            ranks=price.ranks, groups=groups, memory=price.memory, predicted_s=price.seconds,
            peak_bytes=price.peak_bytes(cost), moves=part,
        )
        for groups, price, part in zip(attention, prices, moved, strict=True)
    )
    report = SolveReport(
        status=status,
        objective_s=simulation.step_s,
        bound_s=_rounded_bound(bound_s, simulation.step_s),
        wall_s=wall_s,
        note=note,
    )
    return StepPlan(
        step=step,
        strategy=strategy,
        num_ranks=num_ranks,
        sequences=tuple(Sequence(index, size) for index, size in enumerate(lengths)),
        microbatches=microbatches,
        sharding=cost.sharding,
        predicted_s=simulation.step_s,
        peak_bytes=simulation.peak_bytes,
        cost_digest=cost.digest if cost_digest is None else cost_digest,
        solver=report,
        num_stages=cost.num_stages,
    )


def price_choice(
    choice: MicrobatchChoice, lengths: SequenceOf[int], cost: CostModel, moves: SequenceOf[Move] = ()
) -> MicrobatchPrice:
    """The price of a microbatch. Raises PlanError where the cost model cannot price it, or where its groups differ in
    their memory policy."""
    return _price(choice, attention_groups(choice, cost), lengths, cost, moves)


def _price(
    choice: MicrobatchChoice, attention: tuple[AttentionGroup, ...], lengths: SequenceOf[int], cost: CostModel,
    moves: SequenceOf[Move],
) -> MicrobatchPrice:
    if isinstance(choice, GroupChoice):
        return price_groups(attention[0].ranks, attention, lengths, cost, choice.memory, moves)
    policies = {group.memory for group in choice}
    if len(policies) != 1:
        raise PlanError(f"one microbatch, one memory policy: got {len(policies)} for its {len(choice)} groups")
    return price_groups(_ranks(attention), attention, lengths, cost, policies.pop(), moves)


def makespan_s(
    groups: Iterable[MicrobatchChoice], problem: StepProblem, moves: SequenceOf[tuple[Move, ...]] = ()
) -> float:
    """Seconds until the last rank ends, ``step_fixed_s`` left out, exactly as ``planner.pricing.simulate`` has it.
    ``moves``: of each microbatch, or nothing at all."""
    lengths, num_ranks, cost = problem.lengths, problem.num_ranks, problem.cost
    choices = list(groups)
    moved = list(moves) or [()] * len(choices)
    if cost.num_stages > 1:
        prices = [price_choice(choice, lengths, cost, part) for choice, part in zip(choices, moved, strict=True)]
        return run_schedule(prices, num_ranks=num_ranks, cost=cost).step_s - cost.step_fixed_s
    work = [_work(choice, lengths, cost, part) for choice, part in zip(choices, moved, strict=True)]
    last_s = max((each.stop_s for each in play(work, sharding=cost.sharding, num_stages=1)), default=0.0)
    return last_s + cost.step_fixed_s - cost.step_fixed_s  # round as a whole step does, so that equal plans tie


def _work(
    choice: MicrobatchChoice, lengths: SequenceOf[int], cost: CostModel, moves: tuple[Move, ...]
) -> StageWork:
    """Ranks and seconds of a microbatch. Memory, which ``price_choice`` counts as well, is left out where the seconds
    do not depend on it."""
    if isinstance(choice, GroupChoice) and choice.memory.is_keep and not moves:
        sizes = [lengths[index] for index in choice.sequences]
        return StageWork(ranks=choice.ranks, seconds=lone_group_s(choice.kind, len(choice.ranks), sizes, cost))
    price = price_choice(choice, lengths, cost, moves)
    return StageWork(ranks=price.ranks, seconds=price.seconds)


def attention_groups(choice: MicrobatchChoice, cost: CostModel) -> tuple[AttentionGroup, ...]:
    """The groups of one microbatch, with the inner degrees of the cost model. Raises PlanError where it does not price
    a group."""
    choices = (choice,) if isinstance(choice, GroupChoice) else choice
    return tuple(
        AttentionGroup(
            kind=group.kind, ranks=tuple(group.ranks), sequences=tuple(group.sequences),
            inner_degree=cost.time_fit(group.kind, len(group.ranks)).inner_degree,
        )
        for group in choices
    )


def _ranks(groups: tuple[AttentionGroup, ...]) -> tuple[int, ...]:
    """The ranks of one microbatch: in the group's order where there is one group, else ascending."""
    if len(groups) == 1:
        return groups[0].ranks
    return tuple(sorted({rank for group in groups for rank in group.ranks}))


def _rounded_bound(bound_s: float, step_s: float) -> float:
    """Lower the bound to the step's seconds where it exceeds them by no more than float rounding. A larger excess is a
    wrong bound: it stays, and ``verify_plan`` rejects it."""
    return step_s if step_s < bound_s <= step_s * (1 + 1e-9) else bound_s
