"""Plans for tests of the runtime: made by hand, priced and verified like any other before they are run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from planner.cost.fits import MemoryFit, Provenance, RemapFit, TimeFit
from planner.cost.limits import PlanLimits
from planner.cost.model import CostModel
from planner.plan import AttentionGroup, AttentionKind, SolveStatus, StepPlan
from planner.pricing.assemble import GroupChoice, assemble_plan
from planner.pricing.problem import StepProblem
from planner.pricing.verify import verify_plan
from planner.schedules.exchange import GroupLimits, schedule_of

MOST_HEADS = 64
KINDS = tuple(kind for kind in AttentionKind if kind is not AttentionKind.LOCAL)


def step_problem(lengths: Sequence[int], num_ranks: int, cost: CostModel, limits: PlanLimits) -> StepProblem:
    """``StepProblem``, short enough to be written inside a call."""
    return StepProblem(lengths=tuple(lengths), num_ranks=num_ranks, cost=cost, limits=limits)


def cost_model(
    num_ranks: int, kinds: Sequence[AttentionKind] = KINDS, *, node_size: int | None = None, with_remap: bool = False
) -> CostModel:
    """Made up: short sequences are cheapest alone, long ones are cheapest shared, by all kinds alike; one byte a
    token. Inner degrees as in nodes of ``node_size`` (None: all of a group in one), with enough heads. ``with_remap``:
    tokens move for the token-wise layers at next to no cost."""
    times = [TimeFit(kind=AttentionKind.LOCAL, degree=1, s_per_token2=1e-6, s_per_token=1e-5, s_per_sequence=0.0,
                     fixed_s=1e-4)]
    for kind in kinds:
        times += [
            TimeFit(kind=kind, degree=d, s_per_token2=1e-6 / d, s_per_token=1.3e-5 / d, s_per_sequence=0.0,
                    fixed_s=2e-4 * d, inner_degree=inner_degree(kind, d, node_size))
            for d in range(2, num_ranks + 1)
        ]
    remap = RemapFit(
        linear_s_per_token=1e-5, intra_s_per_token=1e-8, inter_s_per_token=1e-7, fixed_s=1e-7,
        node_size=node_size or num_ranks,
    )
    return CostModel(
        times=tuple(times), memory=MemoryFit(fixed_bytes=0, bytes_per_token=1), step_fixed_s=1e-4, peak_flop_per_s=1e9,
        provenance=Provenance(source="test", cluster="test", model="test"), remap=remap if with_remap else None,
    )


def inner_degree(kind: AttentionKind, degree: int, node_size: int | None = None) -> int:
    """What a planner would choose, with enough heads."""
    limits = GroupLimits(num_heads=MOST_HEADS, node_size=degree if node_size is None else node_size)
    return schedule_of(kind).inner_degree(degree, limits) or 1


def verified_plan(
    microbatches: Sequence[Sequence[AttentionGroup]], lengths: Sequence[int], num_ranks: int
) -> StepPlan:
    """The plan that runs these microbatches (lists of groups) in this order. Raises PlanError if it is illegal."""
    groups = {(group.kind, group.degree): group.inner_degree for part in microbatches for group in part}
    kinds = (*KINDS, *(kind for kind, degree in groups if degree > 1 and kind not in KINDS))
    cost = cost_model(num_ranks, kinds)
    cost = replace(
        cost,
        times=tuple(
            replace(fit, inner_degree=groups.get((fit.kind, fit.degree), fit.inner_degree)) for fit in cost.times
        ),
    )
    limits = PlanLimits(device_budget_bytes=2**40, max_ulysses_degree=MOST_HEADS, kinds=kinds)
    plan = assemble_plan(
        step=0, strategy="test", num_ranks=num_ranks, lengths=lengths,
        groups=[tuple(GroupChoice(g.kind, g.ranks, g.sequences) for g in groups) for groups in microbatches],
        cost=cost, status=SolveStatus.STATIC, bound_s=0.0, wall_s=0.0,
    )
    verify_plan(plan, step_problem(lengths, num_ranks, cost, limits))
    return plan
