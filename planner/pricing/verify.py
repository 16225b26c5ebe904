"""Check that a plan is legal before it is executed. Every number in it is recomputed.

In a legal plan each sequence runs exactly once, on ranks that exist, in groups that the runtime and the cost model
know, under allowed memory policies, within the device and host budgets, at the price that the plan states. Such a plan
cannot deadlock: microbatches, and the groups of each, stand in one global order that every rank follows, so any two
ranks come to their common work in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf

from planner.cost.limits import PlanLimits
from planner.cost.model import CostModel
from planner.errors import PlanError
from planner.plan import (
    PLAN_SCHEMA,
    AttentionGroup,
    AttentionKind,
    MemoryAction,
    MemoryPolicy,
    Microbatch,
    Sharding,
    SolveStatus,
    StepPlan,
)
from planner.pricing.lockstep import lockstep_rounds
from planner.pricing.microbatch import MicrobatchPrice, price_microbatch
from planner.pricing.problem import StepProblem
from planner.pricing.simulate import Simulation, run_schedule
from planner.schedules.layout import head_degree, local_token_counts
from planner.units import format_bytes

RELATIVE_TOLERANCE = 1e-9


def verify_plan(plan: StepPlan, problem: StepProblem) -> None:
    """Check that ``plan`` is a legal answer to the problem.

    Raises PlanError that names the first illegal field, sequence, rank, group or microbatch.
    """
    lengths, num_ranks, cost, limits = problem.lengths, problem.num_ranks, problem.cost, problem.limits
    _verify_head(plan, num_ranks, cost)
    _verify_sequences(plan, lengths)
    for index, microbatch in enumerate(plan.microbatches):
        _verify_microbatch(microbatch, f"microbatch {index}", len(lengths), num_ranks, cost, limits)
    _verify_coverage(plan)
    _verify_rounds(plan, lengths, cost, limits)
    _verify_prices(plan, lengths, cost, limits)


def _verify_head(plan: StepPlan, num_ranks: int, cost: CostModel) -> None:
    if plan.schema != PLAN_SCHEMA:
        raise PlanError(f"plan has schema {plan.schema}, this version reads {PLAN_SCHEMA}")
    if plan.step < 0:
        raise PlanError(f"plan is for step {plan.step}; steps count from 0")
    if plan.num_ranks != num_ranks:
        raise PlanError(f"plan is for {plan.num_ranks} data ranks, there are {num_ranks}")
    if plan.sharding is not cost.sharding:
        raise PlanError(f"plan has sharding {plan.sharding}, the cost model prices {cost.sharding}")
    if plan.num_stages != cost.num_stages:
        raise PlanError(f"plan is for {plan.num_stages} pipeline stages, the cost model prices {cost.num_stages}")
    if not isinstance(plan.solver.status, SolveStatus):
        raise PlanError(f"plan has unknown solver status {plan.solver.status!r}")


def _verify_sequences(plan: StepPlan, lengths: SequenceOf[int]) -> None:
    if len(plan.sequences) != len(lengths):
        raise PlanError(f"plan lists {len(plan.sequences)} sequences, the step has {len(lengths)}")
    for place, (sequence, num_tokens) in enumerate(zip(plan.sequences, lengths, strict=True)):
        if sequence.index != place:
            raise PlanError(f"plan lists sequence {sequence.index} in the place of sequence {place}")
        if sequence.num_tokens != num_tokens:
            raise PlanError(f"sequence {place}: plan says {sequence.num_tokens} tokens, the step has {num_tokens}")
        if num_tokens < 1:
            raise PlanError(f"sequence {place} has {num_tokens} tokens; at least 1 is needed")


def _verify_microbatch(
    microbatch: Microbatch, place: str, num_sequences: int, num_ranks: int, cost: CostModel, limits: PlanLimits
) -> None:
    if not microbatch.ranks or not microbatch.groups:
        raise PlanError(f"{place} has no {'groups' if microbatch.ranks else 'ranks'}")
    _verify_ranks(microbatch.ranks, place, num_ranks)
    working: set[int] = set()
    for index, group in enumerate(microbatch.groups):
        group_place = f"{place}, group {index}"
        _verify_group(group, group_place, num_sequences, num_ranks, cost, limits)
        for rank in group.ranks:
            if rank not in microbatch.ranks:
                raise PlanError(f"{group_place}: rank {rank} is not a rank of the microbatch")
        working.update(group.ranks)
    for rank in microbatch.ranks:
        if rank not in working:
            raise PlanError(f"{place}: rank {rank} is in none of its groups")
    _verify_policy(microbatch.memory, place, cost, limits)
    if microbatch.memory.chunk_tokens:
        _verify_chunks(microbatch, place, cost, limits)
    _verify_moves(microbatch, place, cost)


def _verify_moves(microbatch: Microbatch, place: str, cost: CostModel) -> None:
    """Check the moves, except that a source holds the tokens it moves: ``_verify_prices`` checks that."""
    moves = microbatch.moves
    if moves and cost.remap is None:
        raise PlanError(f"{place}: the cost model does not price moving tokens for the token-wise layers")
    sources, destinations = {source for source, _, _ in moves}, {destination for _, destination, _ in moves}
    for rank in (*sources, *destinations):
        if rank not in microbatch.ranks:
            raise PlanError(f"{place}: a move names rank {rank}, which is not a rank of the microbatch")
    for rank in sources & destinations:
        raise PlanError(f"{place}: rank {rank} both sends and receives tokens for the token-wise layers")
    if len({(source, destination) for source, destination, _ in moves}) < len(moves):
        raise PlanError(f"{place}: two moves between the same ranks")
    for source, destination, num_tokens in moves:
        if num_tokens < 1:
            raise PlanError(f"{place}: move {source} -> {destination} of {num_tokens} tokens; at least 1 is needed")


def _verify_moved_tokens(plan: StepPlan, index: int, lengths: SequenceOf[int]) -> None:
    """Check that no source moves more tokens than it holds in its groups."""
    microbatch = plan.microbatches[index]
    leaving: dict[int, int] = {}
    for source, _, num_tokens in microbatch.moves:
        leaving[source] = leaving.get(source, 0) + num_tokens
    for rank, num_tokens in leaving.items():
        held = sum(
            local_token_counts(
                group.kind, group.degree, [lengths[sequence] for sequence in group.sequences], group.inner_degree
            )[group.ranks.index(rank)]
            for group in microbatch.groups if rank in group.ranks
        )
        if num_tokens > held:
            raise PlanError(f"microbatch {index}: rank {rank} moves {num_tokens} tokens, it holds {held}")


def _verify_policy(memory: MemoryPolicy, place: str, cost: CostModel, limits: PlanLimits) -> None:
    fractions = {
        MemoryAction.KEEP: memory.keep_fraction, MemoryAction.SWAP: memory.swap_fraction,
        MemoryAction.RECOMPUTE: memory.recompute_fraction,
    }
    for action, fraction in fractions.items():
        if not 0 <= fraction <= 1:  # refuses NaN as well
            raise PlanError(f"{place}: {action}_fraction must be in 0 .. 1, got {fraction}")
        if fraction > 0:
            _verify_allowed(action, memory, place, limits)
    if not math.isclose(sum(fractions.values()), 1.0, rel_tol=RELATIVE_TOLERANCE):
        raise PlanError(f"{place}: the memory fractions must add up to 1, got {memory}")
    if memory.keep_fraction < 1 and cost.activation is None:
        raise PlanError(f"{place}: the cost model prices neither swapping nor recomputing activations, got {memory}")


def _verify_allowed(action: MemoryAction, memory: MemoryPolicy, place: str, limits: PlanLimits) -> None:
    if not limits.allows(action):
        allowed = ", ".join(dict.fromkeys((MemoryAction.KEEP, *limits.policies)))
        raise PlanError(f"{place}: memory policy {action} is not allowed here (allowed: {allowed}), got {memory}")


def _verify_chunks(microbatch: Microbatch, place: str, cost: CostModel, limits: PlanLimits) -> None:
    memory = microbatch.memory
    if memory.chunk_tokens < 0:
        raise PlanError(f"{place}: chunk_tokens must be 0 (whole) or more, got {memory.chunk_tokens}")
    _verify_allowed(MemoryAction.CHUNK, memory, place, limits)
    if memory.keep_fraction < 1:
        raise PlanError(f"{place}: chunks together with swapped or recomputed activations cannot be run, got {memory}")
    if cost.chunks is None:
        raise PlanError(f"{place}: the cost model does not price chunks of {memory.chunk_tokens} tokens")
    if len(microbatch.groups) > 1 or microbatch.groups[0].ranks != microbatch.ranks or microbatch.moves:
        what = "moved tokens" if microbatch.moves else f"{len(microbatch.groups)} groups"
        raise PlanError(f"{place}: chunks are priced for one group on all of a microbatch's ranks, not with {what}")


def _verify_rounds(plan: StepPlan, lengths: SequenceOf[int], cost: CostModel, limits: PlanLimits) -> None:
    """Check the lockstep rounds in which a microbatch runs in chunks. Such a round runs group by group: none of its
    microbatches may swap or recompute, and one that does not run in chunks is a single chunk, for which queries
    move."""
    if plan.sharding is not Sharding.ZERO3 or not any(each.memory.chunk_tokens for each in plan.microbatches):
        return
    for members in lockstep_rounds(each.ranks for each in plan.microbatches):
        chunked = [index for index in members if plan.microbatches[index].memory.chunk_tokens]
        for index in members if chunked else ():
            microbatch = plan.microbatches[index]
            if microbatch.memory.keep_fraction < 1:
                raise PlanError(
                    f"microbatch {index} swaps or recomputes beside microbatch {chunked[0]}, which runs in chunks, in "
                    "one round of zero3: that cannot be run"
                )
            if index not in chunked:
                _verify_one_chunk(microbatch, f"microbatch {index}", lengths, cost, limits)


def _verify_one_chunk(
    microbatch: Microbatch, place: str, lengths: SequenceOf[int], cost: CostModel, limits: PlanLimits
) -> None:
    assert cost.chunks is not None  # checked above for the microbatch that runs in chunks
    for group in microbatch.groups:
        sizes = [lengths[sequence] for sequence in group.sequences]
        tokens = max(local_token_counts(group.kind, group.degree, sizes, group.inner_degree))
        needed = cost.device_bytes(tokens) + int(cost.chunks.shared_bytes(group.kind, group.degree, tokens))
        if needed > limits.device_budget_bytes:
            raise PlanError(
                f"{place}: its {group.kind} {group.degree} is one chunk in a round of zero3 with others in chunks and "
                f"needs {format_bytes(needed)}, over the budget of {format_bytes(limits.device_budget_bytes)}"
            )


def _verify_group(
    group: AttentionGroup, place: str, num_sequences: int, num_ranks: int, cost: CostModel, limits: PlanLimits
) -> None:
    if not group.ranks or not group.sequences:
        raise PlanError(f"{place} has no {'sequences' if group.ranks else 'ranks'}")
    _verify_ranks(group.ranks, place, num_ranks)
    for sequence in group.sequences:
        if not 0 <= sequence < num_sequences:
            raise PlanError(f"{place}: sequence {sequence} does not exist, the step has {num_sequences}")
    try:
        ulysses_degree = head_degree(group.kind, group.degree, group.inner_degree)
    except PlanError as error:
        raise PlanError(f"{place}: {error}") from None
    if (group.kind is AttentionKind.LOCAL) != (group.degree == 1):
        raise PlanError(f"{place}: attention {group.kind} on {group.degree} ranks; local means exactly 1 rank")
    if group.kind is not AttentionKind.LOCAL and group.kind not in limits.kinds:
        raise PlanError(f"{place}: attention {group.kind} is not allowed here (allowed: {', '.join(limits.kinds)})")
    if ulysses_degree > limits.max_ulysses_degree:
        raise PlanError(f"{place}: ulysses degree {ulysses_degree} is above the limit {limits.max_ulysses_degree}")
    try:
        inner_degree = cost.time_fit(group.kind, group.degree).inner_degree
    except PlanError as error:
        raise PlanError(f"{place}: {error}") from None
    if group.inner_degree != inner_degree:
        raise PlanError(
            f"{place}: {group.kind} {group.degree} has inner_degree {group.inner_degree}, the cost model prices "
            f"{inner_degree}"
        )


def _verify_ranks(ranks: tuple[int, ...], place: str, num_ranks: int) -> None:
    for rank in ranks:
        if not 0 <= rank < num_ranks:
            raise PlanError(f"{place}: rank {rank} does not exist, there are {num_ranks}")
    if len(set(ranks)) != len(ranks):
        twice = next(rank for rank in ranks if ranks.count(rank) > 1)
        raise PlanError(f"{place}: rank {twice} is listed twice")


def _verify_coverage(plan: StepPlan) -> None:
    """Check that every sequence is in exactly one group of the step."""
    seen: dict[int, int] = {}
    for index, microbatch in enumerate(plan.microbatches):
        for group in microbatch.groups:
            for sequence in group.sequences:
                if sequence in seen:
                    where = f"microbatches {seen[sequence]} and {index}" if seen[sequence] != index else (
                        f"microbatch {index} twice"
                    )
                    raise PlanError(f"sequence {sequence} is in {where}")
                seen[sequence] = index
    for sequence in range(len(plan.sequences)):
        if sequence not in seen:
            raise PlanError(f"sequence {sequence} is in no microbatch")


def _verify_prices(plan: StepPlan, lengths: SequenceOf[int], cost: CostModel, limits: PlanLimits) -> None:
    if plan.cost_digest != cost.digest:
        raise PlanError(f"plan was priced with cost model {plan.cost_digest[:12]}, this is {cost.digest[:12]}")
    prices = []
    for index, microbatch in enumerate(plan.microbatches):
        _verify_moved_tokens(plan, index, lengths)
        price = price_microbatch(microbatch, lengths, cost)
        _verify_memory(price, f"microbatch {index}", cost, limits)
        _same_bytes(microbatch.peak_bytes, price.peak_bytes(cost), f"microbatch {index}")
        _same_seconds(microbatch.predicted_s, price.seconds, f"microbatch {index}: predicted_s")
        prices.append(price)
    simulation = run_schedule(prices, num_ranks=plan.num_ranks, cost=cost)
    _same_bytes(plan.peak_bytes, simulation.peak_bytes, "plan")
    _verify_in_flight(simulation, cost, limits)
    _same_seconds(plan.predicted_s, simulation.step_s, "plan: predicted_s")
    solver = plan.solver
    _same_seconds(solver.objective_s, simulation.step_s, "solver: objective_s")
    for name, seconds in (("bound_s", solver.bound_s), ("wall_s", solver.wall_s)):
        if not math.isfinite(seconds) or seconds < 0:
            raise PlanError(f"solver: {name} is {seconds}; a finite number of seconds is needed")
    if solver.objective_s < solver.bound_s * (1 - RELATIVE_TOLERANCE):
        raise PlanError(f"solver: objective_s {solver.objective_s} is below the proven bound_s {solver.bound_s}")


def _verify_in_flight(simulation: Simulation, cost: CostModel, limits: PlanLimits) -> None:
    """Check that the microbatches which a pipeline's first stage holds at the same time fit together."""
    if simulation.peak_bytes > limits.device_budget_bytes:
        rank = simulation.rank_peak_bytes.index(simulation.peak_bytes)
        raise PlanError(
            f"rank {rank}: its microbatches in flight over {cost.num_stages} pipeline stages need "
            f"{format_bytes(simulation.peak_bytes)}, over the budget of {format_bytes(limits.device_budget_bytes)}"
        )
    swapped_bytes = max(simulation.rank_host_bytes)
    if swapped_bytes > limits.host_budget_bytes:
        rank = simulation.rank_host_bytes.index(swapped_bytes)
        raise PlanError(
            f"rank {rank}: its microbatches in flight over {cost.num_stages} pipeline stages swap "
            f"{format_bytes(swapped_bytes)} to its host, over the budget of {format_bytes(limits.host_budget_bytes)}"
        )


def _verify_memory(price: MicrobatchPrice, place: str, cost: CostModel, limits: PlanLimits) -> None:
    fullest = max(price.rank_tokens)
    within_device = price.device_bytes(fullest, cost) <= limits.device_budget_bytes
    if within_device and cost.host_bytes(fullest, price.memory) <= limits.host_budget_bytes:
        return
    for rank, num_tokens in zip(price.ranks, price.rank_tokens, strict=True):
        needed = price.device_bytes(num_tokens, cost)
        if needed > limits.device_budget_bytes:
            raise PlanError(
                f"{place}: rank {rank} holds {num_tokens} tokens and needs {format_bytes(needed)}, over the budget of "
                f"{format_bytes(limits.device_budget_bytes)}"
            )
        swapped = cost.host_bytes(num_tokens, price.memory)
        if swapped > limits.host_budget_bytes:
            raise PlanError(
                f"{place}: rank {rank} swaps {format_bytes(swapped)} to its host, over the budget of "
                f"{format_bytes(limits.host_budget_bytes)}"
            )


def _same_bytes(declared: int, actual: int, place: str) -> None:
    if declared != actual:
        raise PlanError(f"{place}: peak_bytes is stated as {declared}, the plan needs {actual}")


def _same_seconds(declared: float, actual: float, place: str) -> None:
    if not math.isclose(declared, actual, rel_tol=RELATIVE_TOLERANCE):  # also refuses NaN and infinity
        raise PlanError(f"{place} is stated as {declared}, the cost model says {actual}")
