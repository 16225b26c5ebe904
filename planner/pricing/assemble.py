"""From a strategy's choice of groups to a priced StepPlan. Every strategy ends here, so all plans are priced alike."""

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
    """Sequences (indices into the step) whose attention these ranks share. ``memory``: of the microbatch, so the same
    in all of its groups."""

    kind: AttentionKind
    ranks: tuple[int, ...]
    sequences: tuple[int, ...]
    memory: MemoryPolicy = KEEP


MicrobatchChoice = GroupChoice | tuple[GroupChoice, ...]  # one group alone, or several that run as one microbatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A strategy's answer: microbatches in global order. ``bound_s`` (seconds) leaves ``step_fixed_s`` out. ``moves``:
    of each microbatch (see ``Microbatch``); empty where none has any."""

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
    """One microbatch per entry of ``groups``, in the given order, which becomes the plan's global order. The groups of
    an entry that holds several may share ranks; they run in their order too.

    ``lengths[i]``: tokens of sequence i. ``bound_s``: proven lower bound of the whole step, ``step_fixed_s`` included
    (0 where none is known); where rounding puts it above the simulated step, it is lowered to it. ``cost_digest``
    saves hashing the cost model again where the caller holds its digest. ``moves``: of each entry, or nothing at all.
    Raises PlanError where the cost model cannot price a group or moves.
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
    """What the microbatch costs. Raises PlanError where the cost model cannot price it, or its groups do not agree on
    the memory policy."""
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
    """When the last rank ends, ``step_fixed_s`` not included, as ``planner.pricing.simulate`` plays it. ``moves``: of
    each microbatch, or nothing at all."""
    lengths, num_ranks, cost = problem.lengths, problem.num_ranks, problem.cost
    choices = list(groups)
    moved = list(moves) or [()] * len(choices)
    if cost.num_stages > 1:
        prices = [price_choice(choice, lengths, cost, part) for choice, part in zip(choices, moved, strict=True)]
        return run_schedule(prices, num_ranks=num_ranks, cost=cost).step_s - cost.step_fixed_s
    work = [_work(choice, lengths, cost, part) for choice, part in zip(choices, moved, strict=True)]
    last_s = max((each.stop_s for each in play(work, sharding=cost.sharding, num_stages=1)), default=0.0)
    return last_s + cost.step_fixed_s - cost.step_fixed_s  # rounded as a whole step is, so that equal plans tie


def _work(
    choice: MicrobatchChoice, lengths: SequenceOf[int], cost: CostModel, moves: tuple[Move, ...]
) -> StageWork:
    """Ranks and seconds of a microbatch, without the memory that ``price_choice`` counts where seconds do not need
    it."""
    if isinstance(choice, GroupChoice) and choice.memory.is_keep and not moves:
        sizes = [lengths[index] for index in choice.sequences]
        return StageWork(ranks=choice.ranks, seconds=lone_group_s(choice.kind, len(choice.ranks), sizes, cost))
    price = price_choice(choice, lengths, cost, moves)
    return StageWork(ranks=price.ranks, seconds=price.seconds)


def attention_groups(choice: MicrobatchChoice, cost: CostModel) -> tuple[AttentionGroup, ...]:
    """The groups of one microbatch, with the inner degree that the cost model prices. Raises PlanError where it prices
    no such group."""
    choices = (choice,) if isinstance(choice, GroupChoice) else choice
    return tuple(
        AttentionGroup(
            kind=group.kind, ranks=tuple(group.ranks), sequences=tuple(group.sequences),
            inner_degree=cost.time_fit(group.kind, len(group.ranks)).inner_degree,
        )
        for group in choices
    )


def _ranks(groups: tuple[AttentionGroup, ...]) -> tuple[int, ...]:
    """The ranks of one microbatch: in group order where it has one group, else ascending."""
    if len(groups) == 1:
        return groups[0].ranks
    return tuple(sorted({rank for group in groups for rank in group.ranks}))


def _rounded_bound(bound_s: float, step_s: float) -> float:
    """A bound above the objective by no more than float rounding is the objective; a larger excess stays and is
    rejected by ``verify_plan``: it would be a wrong bound."""
    return step_s if step_s < bound_s <= step_s * (1 + 1e-9) else bound_s
