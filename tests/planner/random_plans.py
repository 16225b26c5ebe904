"""Random legal plans, with everything that verifying them needs. Pure functions of a ``random.Random``."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from planner.cost.fits import MemoryFit, Provenance, TimeFit
from planner.cost.limits import PlanLimits
from planner.cost.model import CostModel
from planner.plan import AttentionGroup, AttentionKind, Microbatch, SolveStatus, StepPlan
from planner.pricing.assemble import GroupChoice, assemble_plan
from planner.pricing.microbatch import price_microbatch
from planner.pricing.simulate import simulate, step_lengths
from planner.schedules.exchange import GroupLimits, schedule_of
from planner.schedules.layout import local_token_counts

KINDS = tuple(kind for kind in AttentionKind if kind is not AttentionKind.LOCAL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A plan, and the step, ranks, cost model and limits for which it is legal. The budget is exactly the plan's
    peak."""

    plan: StepPlan
    lengths: tuple[int, ...]
    num_ranks: int
    cost: CostModel
    limits: PlanLimits


def toy_cost(rng: random.Random, num_ranks: int) -> CostModel:
    """Different positive coefficients for every kind and degree up to ``num_ranks``."""
    shapes = [(AttentionKind.LOCAL, 1)]
    shapes += [(kind, d) for kind in (AttentionKind.ULYSSES, AttentionKind.RING) for d in range(2, num_ranks + 1)]
    times = [
        TimeFit(
            kind=kind, degree=degree, s_per_token2=rng.uniform(1e-9, 2e-9) / degree,
            s_per_token=rng.uniform(1e-6, 2e-6) / degree, s_per_sequence=rng.uniform(1e-6, 2e-6),
            fixed_s=rng.uniform(1e-3, 2e-3),
        )
        for kind, degree in shapes
    ]
    rest = random.Random(num_ranks)  # kinds added later have their own generator, so that earlier draws stay the same
    for kind in KINDS[2:]:
        for degree in range(2, num_ranks + 1):
            inner_degree = schedule_of(kind).inner_degree(degree, GroupLimits(num_heads=num_ranks, node_size=3)) or 1
            times.append(
                TimeFit(
                    kind=kind, degree=degree, s_per_token2=rest.uniform(1e-9, 2e-9) / degree,
                    s_per_token=rest.uniform(1e-6, 2e-6) / degree, s_per_sequence=rest.uniform(1e-6, 2e-6),
                    fixed_s=rest.uniform(1e-3, 2e-3), inner_degree=inner_degree,
                )
            )
    return CostModel(
        times=tuple(times), memory=MemoryFit(fixed_bytes=10**9, bytes_per_token=rng.uniform(1e5, 2e5)),
        step_fixed_s=0.05, peak_flop_per_s=1e12, provenance=Provenance(source="derived", cluster="toy", model="toy"),
    )


def random_choice(rng: random.Random, num_ranks: int, sequences: tuple[int, ...]) -> GroupChoice:
    degree = rng.choice((1, 1, 2, 3, rng.randint(1, num_ranks)))
    degree = min(degree, num_ranks)
    kind = AttentionKind.LOCAL if degree == 1 else rng.choice(KINDS)
    return GroupChoice(kind, tuple(rng.sample(range(num_ranks), degree)), sequences)


def random_case(rng: random.Random, lengths: tuple[int, ...] | None = None) -> Case:
    """A legal plan of random groups. Some microbatches have several groups, which may share ranks."""
    num_ranks = rng.randint(2, 9)
    if lengths is None:
        lengths = tuple(int(rng.paretovariate(0.8) * 30) % 20_000 + 1 for _ in range(rng.randint(3, 30)))
    cost = toy_cost(rng, num_ranks)
    order = rng.sample(range(len(lengths)), len(lengths))
    choices = []
    while order:
        size = rng.randint(1, 5)
        choices.append(random_choice(rng, num_ranks, tuple(order[:size])))
        order = order[size:]
    plan = assemble_plan(
        step=rng.randint(0, 99), strategy="random", num_ranks=num_ranks, lengths=lengths, groups=choices, cost=cost,
        status=SolveStatus.GREEDY, bound_s=0.0, wall_s=0.01,
    )
    if rng.random() < 0.5:
        plan = reprice(replace(plan, microbatches=merged(rng, plan.microbatches)), cost)
    limits = PlanLimits(
        device_budget_bytes=plan.peak_bytes, max_ulysses_degree=num_ranks, kinds=KINDS
    )
    return Case(plan=plan, lengths=lengths, num_ranks=num_ranks, cost=cost, limits=limits)


def merged(rng: random.Random, microbatches: tuple[Microbatch, ...]) -> tuple[Microbatch, ...]:
    """Neighbouring microbatches merged into one over the union of their ranks, as Zeppelin's are."""
    rest, found = list(microbatches), []
    while rest:
        size = rng.randint(1, 3)
        part, rest = rest[:size], rest[size:]
        groups: tuple[AttentionGroup, ...] = tuple(group for microbatch in part for group in microbatch.groups)
        ranks = tuple(sorted({rank for group in groups for rank in group.ranks}))
        found.append(Microbatch(ranks=ranks, groups=groups, predicted_s=0.0, peak_bytes=0))
    return tuple(found)


def with_moves(rng: random.Random, case: Case) -> Case:
    """The case with random legal moves in its microbatches; a rank may give all its tokens away. ``case.cost`` must
    price moves."""
    microbatches = []
    for microbatch in case.plan.microbatches:
        held = dict.fromkeys(microbatch.ranks, 0)
        for group in microbatch.groups:
            sizes = [case.lengths[index] for index in group.sequences]
            counts = local_token_counts(group.kind, group.degree, sizes, group.inner_degree)
            for rank, count in zip(group.ranks, counts, strict=True):
                held[rank] += count
        order = rng.sample(microbatch.ranks, len(microbatch.ranks))
        cut = rng.randint(0, len(order))
        moves = []
        for source in order[:cut]:
            for destination in rng.sample(order[cut:], min(len(order) - cut, 2)):
                tokens = rng.choice((0, held[source], rng.randint(0, held[source])))
                held[source] -= tokens
                if tokens:
                    moves.append((source, destination, tokens))
        rng.shuffle(moves)
        microbatches.append(replace(microbatch, moves=tuple(moves)))
    return replace(case, plan=reprice(replace(case.plan, microbatches=tuple(microbatches)), case.cost))


def reprice(plan: StepPlan, cost: CostModel) -> StepPlan:
    """The plan with all its stated prices recomputed."""
    lengths = step_lengths(plan)
    microbatches = []
    for microbatch in plan.microbatches:
        price = price_microbatch(microbatch, lengths, cost)
        microbatches.append(replace(microbatch, predicted_s=price.seconds, peak_bytes=price.peak_bytes(cost)))
    plan = replace(plan, microbatches=tuple(microbatches))
    simulation = simulate(plan, cost)
    return replace(
        plan, predicted_s=simulation.step_s, peak_bytes=simulation.peak_bytes,
        solver=replace(plan.solver, objective_s=simulation.step_s),
    )
