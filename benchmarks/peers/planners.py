"""Published planners on our steps, priced by our cost model, to compare ``adaptive`` with.

Each peer's answer is a list of *rounds*, in each of which every rank runs its groups. Where the peer's runtime makes
all ranks wait after a round, so does its price here: it is the sum over rounds of the slowest rank's time. The groups
become a StepPlan through ``assemble_plan``, as for all strategies, and are verified. Without zero3 the plan's own time
is never longer than that price. Under zero3 all ranks gather every layer together, so a peer with several microbatches
in a round also waits inside the round, as every plan does; its price is then the plan's own time where that is longer.

- ``flexsp-published``: FlexSP with its barriers, powers of two, five values of M, 16 buckets and its program; the M
  with the smallest sum of makespans wins. It has neither our strategy's list schedule nor its cap on a program's size.
  It differs from the release in these ways. HiGHS replaces SCIP. The time limit is for the whole step on one core; the
  release gives each program 10 s and solves them in parallel. Programs start from our packing of the round (the
  release starts from homogeneous groups), are skipped where that packing is proven within 0.1 % of the optimum, and
  have cuts that keep all optimal solutions. M goes on where the release gives up. Degree 1 is allowed, as in the paper,
  and so are rings, where they are cheaper (with Ulysses alone most of our steps on 1,024 ranks have a sequence that
  fits no group; on 64 ranks it changes little). The clock stops it, so its plans depend on the machine and its load.
- ``megatron-core``: its own ``BalancedCPScheduler``, called as installed. As in its runtime there is one forward and
  backward for each sequence, ring attention, and a barrier after each round. It counts a rank's tokens as length /
  ranks, so it is given a capacity of one token less than memory holds: a zigzag split may be uneven by a token.
- ``karmarkar-karp``: verl's balancing at the best fixed degree: sequences of work 24576 * s + s^2 are divided among the
  blocks of ranks, then each block's among its microbatches. It is written from a description; verl is not installed.
  In the peer's favour there is no barrier but zero3's own, each block has as few microbatches as its token capacity
  allows (verl gives all blocks the most that any needs) and runs the longest first, and the best degree is chosen for
  each step.
- ``static``: our baseline of that name, the best single degree.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from benchmarks.peers.karmarkar_karp import karmarkar_karp
from planner.cost.model import CostModel
from planner.errors import LonghaulError
from planner.plan import AttentionKind, SolveStatus, StepPlan
from planner.pricing.assemble import GroupChoice, assemble_plan, makespan_s
from planner.pricing.problem import StepProblem
from planner.pricing.verify import verify_plan
from planner.step_planner import plan_step
from planner.strategies.flexsp.strategy import flexsp_schedule
from planner.strategies.search.shapes import GroupShape, PriceTable, allowed_shapes, price_table, require_fits

Round = Sequence[GroupChoice]
ALL_NODES = 10**7  # never reached: the clock stops the published program
ALL_VARIABLES = 10**9
SMALL_GAP = 1e-3  # the release has 0; a packing or program this close to its bound is not improved further
VERL_LINEAR_TOKENS = 24576  # work of a sequence: this times s, plus s^2


class PeerFailureError(LonghaulError):
    """The peer has no plan for this step, for the given reason."""


@dataclass(frozen=True, slots=True)
class Step:
    """The step to plan, the same for every planner."""

    number: int
    problem: StepProblem


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerPlan:
    """A peer's answer. ``step_s``: predicted seconds under the peer's own barriers. ``plan``: its groups as a verified
    plan, which has no barriers."""

    plan: StepPlan
    step_s: float


def flexsp_published(step: Step, *, solver_s: float) -> PeerPlan:
    """FlexSP as published. ``solver_s``: wall-clock limit of the whole search. Raises PeerFailureError where nothing
    could be packed in that time."""
    started_s = time.perf_counter()
    table = price_table(step.problem.lengths, allowed_shapes(step.problem))
    require_fits(table, step.problem)
    result = flexsp_schedule(
        table, num_ranks=step.problem.num_ranks, max_local_tokens=_rank_tokens(step),
        limits=replace(step.problem.limits, max_nodes=ALL_NODES, relative_gap=SMALL_GAP), incumbent_s=float("inf"),
        deadline_s=started_s + solver_s, barriers=True, max_variables=ALL_VARIABLES,
    )
    if result is None:
        raise PeerFailureError("no number of rounds could be packed in time")
    stops = list(accumulate(result.round_sizes))
    groups = result.schedule.groups
    rounds = [groups[stop - size : stop] for size, stop in zip(result.round_sizes, stops, strict=True)]
    return priced_rounds(step, "flexsp-published", rounds, time.perf_counter() - started_s)


def megatron_core(step: Step) -> PeerPlan:
    """Megatron-core's own scheduler. Raises PeerFailureError where it raises an exception."""
    started_s = time.perf_counter()
    rounds = []
    for assigned in megatron_core_rounds(
        step.problem.lengths, step.problem.num_ranks, max_rank_tokens=_rank_tokens(step) - 1
    ):
        ranks_of: dict[int, list[int]] = {}
        for rank, sequences in enumerate(assigned):
            for sequence in sequences:
                ranks_of.setdefault(sequence, []).append(rank)
        rounds.append([
            GroupChoice(AttentionKind.RING if len(ranks) > 1 else AttentionKind.LOCAL, tuple(ranks), (sequence,))
            for sequence, ranks in ranks_of.items()
        ])
    return priced_rounds(step, "megatron-core", rounds, time.perf_counter() - started_s)


def megatron_core_rounds(lengths: Sequence[int], num_ranks: int, *, max_rank_tokens: int) -> list[list[list[int]]]:
    """``BalancedCPScheduler``'s own answer: for each round and rank the sequences, in the order they run.

    Raises PeerFailureError with the exception's name where the scheduler raises one.
    """
    from megatron.core.pipeline_parallel.hybrid_cp_schedule import BalancedCPScheduler  # imports torch: only here

    scheduler = BalancedCPScheduler(max_rank_tokens, _Group(num_ranks))
    try:
        _, rounds = scheduler.get_groups_and_subsamples(list(enumerate(lengths)), None)
    except (AssertionError, IndexError, KeyError, TypeError, ValueError) as error:
        raise PeerFailureError(f"{type(error).__name__}: {error}") from error
    return [[list(sequences) for sequences in assigned] for assigned in rounds]


@dataclass(frozen=True, slots=True)
class _Group:
    """The part of a process group that the scheduler uses."""

    num_ranks: int

    def size(self) -> int:
        return self.num_ranks


def karmarkar_karp_plan(step: Step) -> PeerPlan:
    """verl's balancing at the best degree. Raises PeerFailureError where no single degree fits every sequence."""
    started_s = time.perf_counter()
    shapes = allowed_shapes(step.problem)
    table = price_table(step.problem.lengths, shapes)
    works = [VERL_LINEAR_TOKENS * size + size * size for size in step.problem.lengths]
    blocks_of: dict[int, list[list[int]]] = {}
    best: tuple[float, list[GroupChoice]] | None = None
    for column, shape in enumerate(shapes):
        if step.problem.num_ranks % shape.degree or not table.fits[:, column].all():
            continue
        if shape.degree not in blocks_of:
            blocks_of[shape.degree] = karmarkar_karp(works, step.problem.num_ranks // shape.degree)
        batches = [_capped_batches(table, column, works, rows) for rows in blocks_of[shape.degree]]
        groups = _block_groups(shape, [
            sorted(block, key=lambda rows: -_seconds(table, column, rows)) for block in batches
        ])
        step_s = makespan_s(groups, step.problem)
        if best is None or step_s < best[0]:
            best = step_s, groups
    if best is None:
        raise PeerFailureError("no single degree fits every sequence")
    return priced_rounds(step, "karmarkar-karp", [best[1]], time.perf_counter() - started_s)


def _capped_batches(table: PriceTable, column: int, works: Sequence[int], rows: list[int]) -> list[list[int]]:
    """A block's sequences, partitioned into the smallest number of microbatches that all fit in memory."""
    loads, capacity = table.load_tokens[:, column], int(table.capacity_tokens[column])
    num_batches = max(1, -(-int(loads[rows].sum()) // capacity)) if rows else 0
    while num_batches:
        parts = karmarkar_karp([works[row] for row in rows], num_batches)
        batches = [[rows[place] for place in part] for part in parts if part]
        if all(int(loads[batch].sum()) <= capacity for batch in batches):
            return batches
        num_batches += 1
    return []


def _seconds(table: PriceTable, column: int, rows: list[int]) -> float:
    return float(table.marginal_s[rows, column].sum() + table.fixed_s[column])


def _block_groups(shape: GroupShape, batches: list[list[list[int]]]) -> list[GroupChoice]:
    return [
        GroupChoice(shape.kind, tuple(range(block * shape.degree, (block + 1) * shape.degree)), tuple(rows))
        for block, batch in enumerate(batches)
        for rows in batch
    ]


def static(step: Step) -> PeerPlan:
    """Our best single degree. Raises what ``plan_step`` raises."""
    plan = plan_step(step.problem, step=step.number, strategy="static")
    return PeerPlan(plan=plan, step_s=plan.predicted_s)


def priced_rounds(step: Step, name: str, rounds: Sequence[Round], wall_s: float) -> PeerPlan:
    """Assemble and verify a plan, and price it with a barrier after each round. The price is never below the plan's own
    time, which under zero3 has a barrier after every microbatch. ``wall_s``: the planning time."""
    plan = assemble_plan(
        step=step.number, strategy=name, num_ranks=step.problem.num_ranks, lengths=step.problem.lengths,
        groups=[group for groups in rounds for group in groups], cost=step.problem.cost, status=SolveStatus.FEASIBLE,
        bound_s=0.0, wall_s=wall_s, note=f"{name}, {len(rounds)} rounds",
    )
    verify_plan(plan, step.problem)
    step_s = max(plan.predicted_s, barrier_step_s(plan, [len(groups) for groups in rounds], step.problem.cost))
    return PeerPlan(plan=plan, step_s=step_s)


def barrier_step_s(plan: StepPlan, round_sizes: Sequence[int], cost: CostModel) -> float:
    """Seconds of the plan where all ranks wait after each round: the sum over rounds of the slowest rank's time, plus
    ``step_fixed_s``. ``round_sizes``: microbatches of each round, in the plan's order."""
    step_s, first = cost.step_fixed_s, 0
    for size in round_sizes:
        finish_s = [0.0] * plan.num_ranks
        for microbatch in plan.microbatches[first : first + size]:
            stop_s = max(finish_s[rank] for rank in microbatch.ranks) + microbatch.predicted_s
            for rank in microbatch.ranks:
                finish_s[rank] = stop_s
        step_s += max(finish_s)
        first += size
    if first != len(plan.microbatches):
        raise ValueError(f"rounds of {first} microbatches in a plan of {len(plan.microbatches)}")
    return step_s


def _rank_tokens(step: Step) -> int:
    return step.problem.cost.max_local_tokens(step.problem.limits.device_budget_bytes)


def peers(*, solver_s: float) -> dict[str, Callable[[Step], PeerPlan]]:
    """Every peer by name. ``solver_s``: the published FlexSP's time limit for a step."""
    return {
        "flexsp-published": lambda step: flexsp_published(step, solver_s=solver_s),
        "karmarkar-karp": karmarkar_karp_plan,
        "megatron-core": megatron_core,
        "static": static,
    }
