"""Legal plans pass; a plan changed in any way that matters is refused, and the message names the offender."""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.cost.limits import PlanLimits
from planner.errors import PlanError
from planner.plan import AttentionKind, MemoryPolicy, Microbatch, Sequence, Sharding, SolveStatus
from planner.pricing.assemble import GroupChoice, assemble_plan
from planner.pricing.verify import verify_plan
from tests.planner.random_plans import Case, random_case, reprice, toy_cost
from tests.plans import step_problem
from tests.work import count_calls

LOCAL, ULYSSES, RING = AttentionKind.LOCAL, AttentionKind.ULYSSES, AttentionKind.RING


def check(case: Case) -> None:
    verify_plan(case.plan, step_problem(case.lengths, case.num_ranks, case.cost, case.limits))


@settings(max_examples=150, deadline=None)
@given(lengths=st.lists(st.integers(1, 300_000), min_size=1, max_size=40), seed=st.integers(0, 2**32))
def test_legal_plans_pass(lengths: list[int], seed: int) -> None:
    check(random_case(random.Random(seed), tuple(lengths)))


# --- mutations: each returns a changed case, or None where the plan gives no opportunity; beside it, the refusal ---


def with_microbatch(case: Case, index: int, microbatch: Microbatch) -> Case:
    microbatches = (*case.plan.microbatches[:index], microbatch, *case.plan.microbatches[index + 1 :])
    return replace(case, plan=replace(case.plan, microbatches=microbatches))


def pick(rng: random.Random, case: Case) -> tuple[int, int]:
    index = rng.randrange(len(case.plan.microbatches))
    return index, rng.randrange(len(case.plan.microbatches[index].groups))


def change_group(case: Case, place: tuple[int, int], **changes: object) -> Case:
    """The plan with one group changed; the ranks of its microbatch are again the union of its groups' ranks."""
    index, which = place
    microbatch = case.plan.microbatches[index]
    groups = list(microbatch.groups)
    groups[which] = replace(groups[which], **changes)
    ranks = tuple(dict.fromkeys(rank for group in groups for rank in group.ranks))
    return with_microbatch(case, index, replace(microbatch, ranks=ranks, groups=tuple(groups)))


def repriced(case: Case) -> Case:
    return replace(case, plan=reprice(case.plan, case.cost))


def drop_sequence(rng: random.Random, case: Case) -> Case | None:
    index, which = pick(rng, case)
    sequences = case.plan.microbatches[index].groups[which].sequences
    if len(sequences) == 1:
        return None
    dropped = rng.choice(sequences)
    return repriced(change_group(case, (index, which), sequences=tuple(s for s in sequences if s != dropped)))


def duplicate_sequence(rng: random.Random, case: Case) -> Case:
    place = pick(rng, case)
    sequences = case.plan.microbatches[place[0]].groups[place[1]].sequences
    return repriced(change_group(case, place, sequences=(*sequences, rng.randrange(len(case.lengths)))))


def unknown_sequence(rng: random.Random, case: Case) -> Case:
    index, which = pick(rng, case)
    sequences = list(case.plan.microbatches[index].groups[which].sequences)
    sequences[rng.randrange(len(sequences))] = rng.choice((-1, len(case.lengths), len(case.lengths) + 7))
    return change_group(case, (index, which), sequences=tuple(sequences))


def empty_group(rng: random.Random, case: Case) -> Case:
    return change_group(case, pick(rng, case), sequences=())


def unknown_rank(rng: random.Random, case: Case) -> Case:
    index, which = pick(rng, case)
    ranks = list(case.plan.microbatches[index].groups[which].ranks)
    ranks[rng.randrange(len(ranks))] = rng.choice((-1, case.num_ranks, case.num_ranks + 3))
    return change_group(case, (index, which), ranks=tuple(ranks))


def duplicate_rank(rng: random.Random, case: Case) -> Case | None:
    index, which = pick(rng, case)
    ranks = list(case.plan.microbatches[index].groups[which].ranks)
    if len(ranks) == 1:
        return None
    ranks[0] = ranks[-1]
    return change_group(case, (index, which), ranks=tuple(ranks))


def duplicate_microbatch_rank(rng: random.Random, case: Case) -> Case:
    index, _ = pick(rng, case)
    microbatch = case.plan.microbatches[index]
    return with_microbatch(case, index, replace(microbatch, ranks=(*microbatch.ranks, rng.choice(microbatch.ranks))))


def idle_rank(rng: random.Random, case: Case) -> Case | None:
    index, _ = pick(rng, case)
    microbatch = case.plan.microbatches[index]
    others = [rank for rank in range(case.num_ranks) if rank not in microbatch.ranks]
    if not others:
        return None
    return repriced(with_microbatch(case, index, replace(microbatch, ranks=(*microbatch.ranks, rng.choice(others)))))


def foreign_rank(rng: random.Random, case: Case) -> Case | None:
    """A plan in which a group has a rank that its microbatch has not."""
    index, _ = pick(rng, case)
    microbatch = case.plan.microbatches[index]
    if len(microbatch.ranks) == 1:
        return None
    return with_microbatch(case, index, replace(microbatch, ranks=microbatch.ranks[1:]))


def falsely_priced(case: Case) -> Case | None:
    """The case, or None where its stated prices are still true, because the change is hidden by a slower rank."""
    return None if repriced(case) == case else case


def swap_kind(rng: random.Random, case: Case) -> Case | None:
    index, which = pick(rng, case)
    kind = case.plan.microbatches[index].groups[which].kind
    other = rng.choice([other for other in AttentionKind if other is not kind])
    changed = change_group(case, (index, which), kind=other)
    return changed if LOCAL in (kind, other) else falsely_priced(changed)


def remove_microbatch(rng: random.Random, case: Case) -> Case | None:
    if len(case.plan.microbatches) == 1:
        return None
    index, _ = pick(rng, case)
    rest = case.plan.microbatches[:index] + case.plan.microbatches[index + 1 :]
    return repriced(replace(case, plan=replace(case.plan, microbatches=rest)))


def duplicate_microbatch(rng: random.Random, case: Case) -> Case:
    index, _ = pick(rng, case)
    microbatches = case.plan.microbatches
    return repriced(replace(case, plan=replace(case.plan, microbatches=(*microbatches, microbatches[index]))))


def change_length(rng: random.Random, case: Case) -> Case:
    sequences = list(case.plan.sequences)
    index = rng.randrange(len(sequences))
    sequences[index] = Sequence(index, sequences[index].num_tokens + rng.choice((1, 2, 100)))
    return repriced(replace(case, plan=replace(case.plan, sequences=tuple(sequences))))


def wrong_index(rng: random.Random, case: Case) -> Case:
    sequences = list(case.plan.sequences)
    index = rng.randrange(len(sequences))
    sequences[index] = Sequence(sequences[index].index + rng.choice((-1, 1)), sequences[index].num_tokens)
    return replace(case, plan=replace(case.plan, sequences=tuple(sequences)))


def forget_sequence(rng: random.Random, case: Case) -> Case:
    return replace(case, plan=replace(case.plan, sequences=case.plan.sequences[:-1]))


def step_of_other_lengths(rng: random.Random, case: Case) -> Case:
    lengths = list(case.lengths)
    lengths[rng.randrange(len(lengths))] += 1
    return replace(case, lengths=tuple(lengths))


def oversize_sequence(rng: random.Random, case: Case) -> Case:
    """A case with a longer sequence, in the step as well and priced correctly, so that only the budget is exceeded."""
    index = rng.randrange(len(case.lengths))
    size = case.lengths[index] + 2 * case.num_ranks * (sum(case.lengths) + 1)
    lengths = (*case.lengths[:index], size, *case.lengths[index + 1 :])
    sequences = tuple(Sequence(place, tokens) for place, tokens in enumerate(lengths))
    return repriced(replace(case, lengths=lengths, plan=replace(case.plan, sequences=sequences)))


def smaller_budget(rng: random.Random, case: Case) -> Case:
    budget = case.limits.device_budget_bytes - rng.choice((1, 1000, 10**6))
    return replace(case, limits=replace(case.limits, device_budget_bytes=budget))


def move_sequence(rng: random.Random, case: Case) -> Case | None:
    """A plan with a sequence moved to another group and its prices unchanged."""
    source, target = pick(rng, case), pick(rng, case)
    sequences = case.plan.microbatches[source[0]].groups[source[1]].sequences
    if source == target or len(sequences) == 1:
        return None
    moved = change_group(case, source, sequences=sequences[1:])
    others = moved.plan.microbatches[target[0]].groups[target[1]].sequences
    return falsely_priced(change_group(moved, target, sequences=(*others, sequences[0])))


def move_where_it_does_not_fit(rng: random.Random, case: Case) -> Case | None:
    moved = move_sequence(rng, case)
    if moved is None or repriced(moved).plan.peak_bytes <= case.limits.device_budget_bytes:
        return None
    return repriced(moved)


def change_seconds(rng: random.Random, case: Case) -> Case:
    factor = rng.choice((0.5, 1 + 1e-6, 2.0, math.nan, math.inf))
    plan = case.plan
    where = rng.randrange(3)
    if where == 0:
        index, _ = pick(rng, case)
        microbatch = plan.microbatches[index]
        return with_microbatch(case, index, replace(microbatch, predicted_s=microbatch.predicted_s * factor))
    if where == 1:
        return replace(case, plan=replace(plan, predicted_s=plan.predicted_s * factor))
    return replace(case, plan=replace(plan, solver=replace(plan.solver, objective_s=plan.predicted_s * factor)))


def change_bytes(rng: random.Random, case: Case) -> Case:
    index, _ = pick(rng, case)
    microbatch = case.plan.microbatches[index]
    if rng.random() < 0.5:
        return replace(case, plan=replace(case.plan, peak_bytes=case.plan.peak_bytes + rng.choice((-1, 1))))
    return with_microbatch(case, index, replace(microbatch, peak_bytes=microbatch.peak_bytes + rng.choice((-1, 1))))


def wrong_bound(rng: random.Random, case: Case) -> Case:
    bound = rng.choice((case.plan.predicted_s * 1.01, -1.0, math.nan, math.inf))
    return replace(case, plan=replace(case.plan, solver=replace(case.plan.solver, bound_s=bound)))


def other_num_ranks(rng: random.Random, case: Case) -> Case:
    return replace(case, plan=replace(case.plan, num_ranks=case.num_ranks + rng.choice((-1, 1))))


def other_cost_model(rng: random.Random, case: Case) -> Case:
    return replace(case, plan=replace(case.plan, cost_digest=case.plan.cost_digest[::-1]))


def other_memory_policy(rng: random.Random, case: Case) -> Case:
    index, _ = pick(rng, case)
    policy = rng.choice((
        MemoryPolicy(keep_fraction=0.5, swap_fraction=0.5), MemoryPolicy(keep_fraction=0.9),
        MemoryPolicy(keep_fraction=0.0, recompute_fraction=1.0), MemoryPolicy(keep_fraction=math.nan),
        MemoryPolicy(keep_fraction=1.5, swap_fraction=-0.5),
    ))
    return with_microbatch(case, index, replace(case.plan.microbatches[index], memory=policy))


def other_head(rng: random.Random, case: Case) -> Case:
    change = rng.choice(({"schema": 2}, {"step": -1}, {"sharding": Sharding.ZERO3}, {"sharding": "zero2"}))
    return replace(case, plan=replace(case.plan, **change))


def degree_over_heads(rng: random.Random, case: Case) -> Case | None:
    degrees = [g.degree for m in case.plan.microbatches for g in m.groups if g.kind is ULYSSES]
    if not degrees:
        return None
    return replace(case, limits=replace(case.limits, max_ulysses_degree=max(degrees) - 1))


def forbidden_kind(rng: random.Random, case: Case) -> Case | None:
    used = {group.kind for microbatch in case.plan.microbatches for group in microbatch.groups} - {LOCAL}
    if not used:
        return None
    return replace(case, limits=replace(case.limits, kinds=tuple(set(AttentionKind) - {rng.choice(sorted(used))})))


def wrong_inner_degree(rng: random.Random, case: Case) -> Case:
    index, which = pick(rng, case)
    inner_degree = case.plan.microbatches[index].groups[which].inner_degree
    return change_group(case, (index, which), inner_degree=inner_degree + rng.choice((1, -1, 64)))


def unknown_kind(rng: random.Random, case: Case) -> Case:
    return change_group(case, pick(rng, case), kind=rng.choice(("spiral", "__init__", "ring.local", "")))


def unpriced_degree(rng: random.Random, case: Case) -> Case:
    index, which = pick(rng, case)
    group = case.plan.microbatches[index].groups[which]
    times = tuple(fit for fit in case.cost.times if (fit.kind, fit.degree) != (group.kind, group.degree))
    cost = replace(case.cost, times=times)
    return replace(case, cost=cost, plan=replace(case.plan, cost_digest=cost.digest))


MUTATIONS: dict[Callable[[random.Random, Case], Case | None], str] = {
    drop_sequence: r"sequence \d+ is in no microbatch",
    duplicate_sequence: r"sequence \d+ is in microbatch",
    unknown_sequence: r"microbatch \d+, group \d+: sequence -?\d+ does not exist",
    empty_group: r"microbatch \d+, group \d+ has no sequences",
    unknown_rank: r"microbatch \d+: rank -?\d+ does not exist",
    duplicate_rank: r"microbatch \d+, group \d+: rank \d+ is listed twice",
    duplicate_microbatch_rank: r"microbatch \d+: rank \d+ is listed twice",
    idle_rank: r"microbatch \d+: rank \d+ is in none of its groups",
    foreign_rank: r"microbatch \d+, group \d+: rank \d+ is not a rank of the microbatch",
    swap_kind: r"local means exactly 1 rank|inner_degree|predicted_s is stated as|over the budget|peak_bytes is stated",
    remove_microbatch: r"sequence \d+ is in no microbatch",
    duplicate_microbatch: r"sequence \d+ is in microbatch",
    change_length: r"sequence \d+: plan says \d+ tokens, the step has \d+",
    wrong_index: r"plan lists sequence -?\d+ in the place of sequence \d+",
    forget_sequence: r"plan lists \d+ sequences, the step has \d+",
    step_of_other_lengths: r"sequence \d+: plan says \d+ tokens, the step has \d+",
    oversize_sequence: r"microbatch \d+: rank \d+ holds \d+ tokens and needs .* over the budget",
    smaller_budget: r"microbatch \d+: rank \d+ holds \d+ tokens and needs .* over the budget",
    move_sequence: r"stated as|over the budget",
    move_where_it_does_not_fit: r"microbatch \d+: rank \d+ holds \d+ tokens and needs .* over the budget",
    change_seconds: r"predicted_s is stated as|objective_s is stated as",
    change_bytes: r"peak_bytes is stated as",
    wrong_bound: r"bound_s",
    other_num_ranks: r"plan is for \d+ data ranks, there are \d+",
    other_cost_model: r"plan was priced with cost model",
    other_memory_policy: r"policy \w+ is not allowed here|fractions must add up to 1|_fraction must be in 0 .. 1",
    other_head: r"schema 2|step -1|sharding",
    degree_over_heads: r"microbatch \d+, group \d+: ulysses degree \d+ is above the limit",
    forbidden_kind: r"microbatch \d+, group \d+: attention \w+ is not allowed",
    wrong_inner_degree: r"microbatch \d+, group \d+: .* has inner_degree -?\d+|ulysses degree \d+ is above",
    unknown_kind: r"microbatch \d+, group \d+: unknown attention kind",
    unpriced_degree: r"microbatch \d+, group \d+: cost model has no",
}


def test_all_of_1000_random_mutations_are_rejected() -> None:
    rng = random.Random(2412_01523)
    tried: Counter[str] = Counter()
    while sum(tried.values()) < 1000:
        case = random_case(rng)
        check(case)
        mutate = rng.choice(list(MUTATIONS))
        changed = mutate(rng, case)
        if changed is None:
            continue
        assert changed != case, mutate.__name__
        with pytest.raises(PlanError) as refused:
            check(changed)
        assert re.search(MUTATIONS[mutate], str(refused.value)), (mutate.__name__, str(refused.value))
        assert "\n" not in str(refused.value)
        tried[mutate.__name__] += 1
    assert len(tried) == len(MUTATIONS), set(mutate.__name__ for mutate in MUTATIONS) - set(tried)


def test_a_bound_equal_to_the_objective_passes() -> None:
    case = random_case(random.Random(1))
    solver = replace(case.plan.solver, bound_s=case.plan.predicted_s, status=SolveStatus.OPTIMAL)
    check(replace(case, plan=replace(case.plan, solver=solver)))


@pytest.mark.parametrize("kind", [LOCAL, ULYSSES, RING])
def test_verifying_grows_like_the_plan(kind: AttentionKind) -> None:
    def calls(num_sequences: int) -> int:
        rng = random.Random(3)
        lengths = tuple(rng.randint(1, 20_000) for _ in range(num_sequences))
        if kind is LOCAL:
            groups = [GroupChoice(kind, (index % 64,), (index,)) for index in range(num_sequences)]
        else:
            groups = [GroupChoice(kind, tuple(range(64)), tuple(range(k, num_sequences, 4))) for k in range(4)]
        cost = toy_cost(rng, 64)
        plan = assemble_plan(
            step=0, strategy="static", num_ranks=64, lengths=lengths, groups=groups, cost=cost,
            status=SolveStatus.STATIC, bound_s=0.0, wall_s=0.0,
        )
        limits = PlanLimits(device_budget_bytes=plan.peak_bytes, max_ulysses_degree=64, kinds=(ULYSSES, RING))
        return count_calls(lambda: verify_plan(plan, step_problem(lengths, 64, cost, limits)))

    small = calls(512)
    assert small < 300 * 512
    assert calls(1024) < 2.5 * small
