"""One ByteScale step, priced: the static grid, and our plans of its hybrid data parallelism, from traced constants.

A microbatch of T tokens on a ring of n ranks takes, forward plus backward, on each of its ranks

    linear * T / n + max(attention * sum(s_i^2) / 2n, hop * (n - 1) * T / n)

seconds: projections and MLP; causal attention, or the n - 1 transfers of a rank's keys and values where they take
longer. The planner's cost model has no such maximum and does not need it: a ring that memory forms holds one sequence
longer than (n - 1) full ranks, and there attention always takes longer. Packs of the grid are priced as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from itertools import cycle

import numpy as np

from planner.cost.fits import MemoryFit, Provenance, TimeFit
from planner.cost.limits import PlanLimits
from planner.cost.model import CostModel
from planner.inputs.length_generators import length_table
from planner.plan import AttentionKind, Sharding, StepPlan
from planner.pricing.pipeline_order import StageWork
from planner.pricing.problem import StepProblem
from planner.pricing.timeline import play
from planner.pricing.verify import verify_plan
from planner.reproduce.bytescale_stages import pp_balance
from planner.reproduce.flexsp import pack_best_fit
from planner.step_planner import plan_step


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Figure 18: what all constants come from."""

    ring_attention_ms: float
    ring_attention_ranks: int
    attention_ms: float
    attention_ranks: int
    attention_tokens: int
    num_layers: int
    backward_over_forward: float
    linear_s: float
    step_fixed_s: float
    active_params_b: float
    tensor: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """``num_ranks``: ranks that sequences are shared over, each of tensor x stages devices."""

    num_ranks: int
    tensor: int
    stages: int
    active_params_b: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """Seconds of one model, both passes, all layers, on one rank whose stages work one after the other.

    ``linear_s_per_token``: of the rank's tokens. ``attention_s_per_pair``: of its pairs of a query and a key.
    ``hop_s_per_token``: of its tokens, for each transfer of their keys and values to the next rank.
    """

    linear_s_per_token: float
    attention_s_per_pair: float
    hop_s_per_token: float
    step_fixed_s: float
    backward_over_forward: float

    def microbatch_s(self, lengths: Iterable[int], num_ranks: int) -> float:
        """Sequences of these lengths (tokens) over this many ranks."""
        sizes = tuple(lengths)
        tokens = sum(sizes) / num_ranks
        attention_s = self.attention_s_per_pair * sum(size * size for size in sizes) / 2 / num_ranks
        ring_s = self.hop_s_per_token * tokens * (num_ranks - 1)
        return self.linear_s_per_token * tokens + max(attention_s, ring_s)


def prices_of(model: Model, trace: Trace, capacity_tokens: int) -> Prices:
    """The trace's constants, scaled: all shrink with the tensor-parallel ranks, the linear part grows with the
    parameters that a token uses."""
    shards = trace.tensor / model.tensor
    layers = trace.num_layers * (1 + trace.backward_over_forward) * shards / 1e3
    pairs = trace.attention_tokens**2 / 2 / trace.attention_ranks
    return Prices(
        linear_s_per_token=trace.linear_s / capacity_tokens * shards * model.active_params_b / trace.active_params_b,
        attention_s_per_pair=layers * trace.attention_ms / pairs,
        hop_s_per_token=layers * trace.ring_attention_ms / (trace.ring_attention_ranks - 1) / capacity_tokens,
        step_fixed_s=trace.step_fixed_s, backward_over_forward=trace.backward_over_forward,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class BytescaleWorkload:
    """A model at one context, ready to be planned and priced. ``cost`` and ``limits``: its prices for our planner."""

    model: Model
    prices: Prices
    context_tokens: int
    capacity_tokens: int
    cost: CostModel
    limits: PlanLimits

    @property
    def grid_degree(self) -> int:
        """Ranks of the smallest ring that holds a context: the grid's, and the largest of our plans."""
        return -(-self.context_tokens // self.capacity_tokens)


def workload_of(
    name: str, model: Model, trace: Trace, *, context_tokens: int, capacity_tokens: int
) -> BytescaleWorkload:
    prices = prices_of(model, trace, capacity_tokens)
    fits = [
        TimeFit(
            kind=AttentionKind.LOCAL if degree == 1 else AttentionKind.RING, degree=degree,
            s_per_token2=prices.attention_s_per_pair / 2 / degree, s_per_token=prices.linear_s_per_token / degree,
            s_per_sequence=0.0, fixed_s=0.0,
        )
        for degree in range(1, -(-context_tokens // capacity_tokens) + 1)
    ]
    cost = CostModel(
        times=tuple(fits), memory=MemoryFit(fixed_bytes=0, bytes_per_token=1.0), step_fixed_s=prices.step_fixed_s,
        peak_flop_per_s=1.0, provenance=Provenance(source="derived", cluster="bytescale", model=name),
    )
    limits = PlanLimits(
        device_budget_bytes=capacity_tokens, max_ulysses_degree=1, kinds=(AttentionKind.RING,), time_limit_s=math.inf
    )
    return BytescaleWorkload(
        model=model, prices=prices, context_tokens=context_tokens, capacity_tokens=capacity_tokens, cost=cost,
        limits=limits,
    )


def batches_of(lengths: str, context_tokens: int, batch_tokens: int, num_batches: int) -> list[list[int]]:
    """Consecutive batches of exactly ``batch_tokens``. Sequences over the context are cut into pieces of it, the last
    one of a batch where the batch ends.

    One sequence of 2M decides a step, and a batch holds about two, or none. So that a few batches stand for very many,
    their sequences are evenly spaced quantiles of the corpus, in random order: together they hold its exact shares.
    """
    table = length_table(lengths)
    num_sequences = math.ceil(num_batches * batch_tokens / table.mean)
    order = np.random.Generator(np.random.Philox(0)).permutation(num_sequences)
    sizes = cycle(table.quantile((place + 0.5) / num_sequences) for place in order.tolist())
    pieces = (piece for size in sizes for piece in _pieces(size, context_tokens))
    batches = []
    for _ in range(num_batches):
        batch: list[int] = []
        spare = batch_tokens
        while spare:
            batch.append(min(next(pieces), spare))
            spare -= batch[-1]
        batches.append(batch)
    return batches


def _pieces(size: int, context_tokens: int) -> list[int]:
    whole, rest = divmod(size, context_tokens)
    return [context_tokens] * whole + [rest] * (rest > 0)


def static_packs(lengths: SequenceOf[int], context_tokens: int) -> list[list[int]]:
    """As many packs as full ones would take, longest sequences first; what fits into none is cut to fill them."""
    num_packs = -(-sum(lengths) // context_tokens)
    packs = pack_best_fit(list(lengths), context_tokens, context_tokens)
    kept, rest = packs[:num_packs], [size for pack in packs[num_packs:] for size in pack]
    for pack in kept:
        spare = context_tokens - sum(pack)
        while spare and rest:
            piece = min(rest[-1], spare)
            pack.append(piece)
            spare -= piece
            rest[-1] -= piece
            if not rest[-1]:
                rest.pop()
    return kept


def static_step_s(workload: BytescaleWorkload, lengths: SequenceOf[int]) -> float:
    """The grid: the ring that holds one context takes a pack at a time, the others of its size work beside it. Packs
    are dealt out in turn, by where their longest sequence stands in the data; the step waits for the slowest ring."""
    num_rings = workload.model.num_ranks // workload.grid_degree
    places: dict[int, list[int]] = {}
    for place in reversed(range(len(lengths))):
        places.setdefault(lengths[place], []).append(place)
    keyed = [(places[pack[0]].pop(), pack) for pack in static_packs(lengths, workload.context_tokens)]
    seconds = [workload.prices.microbatch_s(pack, workload.grid_degree) for _, pack in sorted(keyed)]
    work = [((place % num_rings,), each_s) for place, each_s in enumerate(seconds)]
    return _makespan_s(workload, work) + workload.prices.step_fixed_s


def naive_plan(workload: BytescaleWorkload, lengths: SequenceOf[int]) -> StepPlan:
    """Algorithm 1: our strategy ``hdp-naive``, verified."""
    return _plan(workload, lengths, "hdp-naive")


def balance_plan(workload: BytescaleWorkload, lengths: SequenceOf[int], naive: StepPlan) -> StepPlan:
    """Algorithm 2, verified: our strategy ``hdp`` (DP-Balance), or PP-Balance of the naive plan's microbatches where
    ranks are pipelines."""
    if workload.model.stages == 1:
        return _plan(workload, lengths, "hdp")
    plan = pp_balance(naive, num_stages=workload.model.stages, cost=workload.cost)
    verify_plan(plan, _problem(workload, lengths))
    return plan


def _plan(workload: BytescaleWorkload, lengths: SequenceOf[int], strategy: str) -> StepPlan:
    return plan_step(_problem(workload, lengths), step=0, strategy=strategy)


def _problem(workload: BytescaleWorkload, lengths: SequenceOf[int]) -> StepProblem:
    return StepProblem(
        lengths=tuple(lengths), num_ranks=workload.model.num_ranks, cost=workload.cost, limits=workload.limits
    )


def busiest_over_idlest(plan: StepPlan) -> float:
    """Most over least seconds of work of a rank."""
    busy_s = np.zeros(plan.num_ranks)
    for microbatch in plan.microbatches:
        busy_s[list(microbatch.ranks)] += microbatch.predicted_s
    return float(busy_s.max() / busy_s.min())


def hdp_step_s(workload: BytescaleWorkload, plan: StepPlan) -> float:
    """The plan's own price; where ranks are pipelines, the time of its microbatches in them."""
    if workload.model.stages == 1:
        return plan.predicted_s
    work = [(microbatch.ranks, microbatch.predicted_s) for microbatch in plan.microbatches]
    return _makespan_s(workload, work) + workload.prices.step_fixed_s


def _makespan_s(workload: BytescaleWorkload, work: Iterable[tuple[tuple[int, ...], float]]) -> float:
    """When the last of these microbatches ends: the ranks of each and its seconds on all stages together."""
    stages = workload.model.stages
    forward_share = 1 / (1 + workload.prices.backward_over_forward)
    staged = [StageWork(ranks=ranks, seconds=each_s / stages, forward_share=forward_share) for ranks, each_s in work]
    return max(each.stop_s for each in play(staged, sharding=Sharding.GATHER_ONCE, num_stages=stages))
