"""From a strategy's choice of groups to a priced StepPlan. Every strategy ends here, so all plans are priced alike."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from planner.cost import CostModel
from planner.plan import AttentionGroup, AttentionKind, Microbatch, Sequence, SolveReport, SolveStatus, StepPlan
from planner.simulate import price_groups, run_schedule


@dataclass(frozen=True, slots=True)
class GroupChoice:
    """Sequences (indices into the step) that these ranks run together as one microbatch."""

    kind: AttentionKind
    ranks: tuple[int, ...]
    sequences: tuple[int, ...]


def assemble_plan(
    *,
    step: int,
    strategy: str,
    num_ranks: int,
    lengths: SequenceOf[int],
    groups: Iterable[GroupChoice],
    cost: CostModel,
    status: SolveStatus,
    bound_s: float,
    wall_s: float,
    note: str = "",
    cost_digest: str | None = None,
) -> StepPlan:
    """One microbatch per group, in the given order, which becomes the plan's global order.

    ``lengths[i]``: tokens of sequence i. ``bound_s``: proven lower bound of the whole step, ``step_fixed_s`` included
    (0 where none is known); where rounding puts it above the simulated step, it is lowered to it. ``cost_digest``
    saves hashing the cost model again where the caller holds its digest. Raises PlanError where the cost model cannot
    price a group.
    """
    attention = [
        AttentionGroup(kind=choice.kind, ranks=tuple(choice.ranks), sequences=tuple(choice.sequences))
        for choice in groups
    ]
    prices = [price_groups(group.ranks, (group,), lengths, cost) for group in attention]
    simulation = run_schedule(prices, num_ranks=num_ranks, cost=cost)
    microbatches = tuple(
        Microbatch(
            ranks=group.ranks, groups=(group,), predicted_s=price.seconds, peak_bytes=price.peak_bytes(cost)
        )
        for group, price in zip(attention, prices, strict=True)
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
    )


def _rounded_bound(bound_s: float, step_s: float) -> float:
    """A bound above the objective by no more than float rounding is the objective; a larger excess stays and is
    rejected by ``verify_plan``: it would be a wrong bound."""
    return step_s if step_s < bound_s <= step_s * (1 + 1e-9) else bound_s
