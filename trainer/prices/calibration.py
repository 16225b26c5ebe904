"""Measure this machine with the very code that trains on it, and fit the cost model the planner uses.

Whole microbatches of made-up tokens run through model, engine and links, every rank at work at once as in a real
step, over a small design of length sets for each attention kind and degree. What the planner predicts is then what
was measured, interpolated, instead of a sum of parts measured apart.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import numpy as np
import torch

from memory.peak import give_back_freed_memory
from parallel import comm
from parallel.program import RankMicrobatch, compile_rank_program
from parallel.sharding import sharded_step
from planner.cost.fits import MemoryFit, Provenance
from planner.cost.fitting import GroupSample, SizeSample, best_rate, fit_group_times
from planner.cost.model import CostModel
from planner.plan import (
    AttentionGroup,
    AttentionKind,
    Microbatch,
    Sequence,
    Sharding,
    SolveReport,
    SolveStatus,
    Span,
    StepPlan,
)
from trainer.data.batch import TokenRows, token_rows
from trainer.prices.machine_samples import measure_operations
from trainer.step.chunk_orders import run_chunked_alone
from trainer.step.chunks import resident_bytes_per_token
from trainer.step.one_step import train_step
from trainer.step.runtime import ReadSpans, Runtime, bind_attention, run_alone, run_empty_microbatch

CALIBRATION_VERSION = 9
"""Goes up with every change of what is measured or how it is fitted: older stored results are then measured again."""
_SHORT_S = 0.1
"""A microbatch shorter than this runs twice in each sweep."""
_LEAST_SWEEPS = 2
_MOST_SWEEPS = 5
_BUDGET_S = 18.0
"""For all timed sweeps together; at least two are made."""
_EMPTY_STEPS = 5
PEAK_MARGIN = 1.03
"""On predicted peaks. Without one, ``benchmarks.memory --part predict`` came out 1.9 % below to 1.2 % above what was
measured (a resident set is never the same twice): with it predictions lie within 0 to 5 % above."""


@dataclass(frozen=True, slots=True)
class MeasuredShape:
    """Groups to measure: ``planner.plan.AttentionGroup`` without ranks and sequences."""

    kind: AttentionKind
    degree: int
    inner_degree: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """The fitted model and what it was fitted from."""

    cost: CostModel
    operations: tuple[SizeSample, ...]
    groups: tuple[GroupSample, ...]
    relative_errors: tuple[float, ...]


def calibrate(
    runtime: Runtime, shapes: tuple[MeasuredShape, ...], *, max_length: int, machine: str, node_size: int | None = None
) -> Calibration:
    """Measure every one of ``shapes`` and fit. Collective; weights are unchanged afterwards, and optimizer
    state is empty: call it before training or loading. Sequences go up to ``max_length``. ``node_size``: consecutive
    data ranks that share a node (None: all); groups are measured where planners put them, within nodes if they fit."""
    operations = measure_operations(runtime, max_length=max_length)
    cases = [
        _Case(shape, lengths, node_size) for shape in shapes for lengths in length_design(max_length, shape.degree)
    ]
    with sharded_step(runtime.model, runtime.sharding, lambda: run_empty_microbatch(runtime)):
        _reset_peak(runtime)
        run_empty_microbatch(runtime)
        empty_bytes = _highest(runtime, runtime.peak.read_bytes())
        # of each shape the largest set; of groups of one, which are quick, all: the line needs small ones too
        largest = {shape: max((case for case in cases if case.shape == shape), key=_local_tokens) for shape in shapes}
        probes = [case for case in cases if case.shape.degree == 1 or case is largest[case.shape]]
        memory = [(_local_tokens(case), _peak_bytes(runtime, case)) for case in probes]
        samples = _timed_sweeps(runtime, cases)
    runtime.optimizer.zero_grad()
    step_fixed_s, update_bytes, state_bytes = _measure_empty_step(runtime)
    fits, errors = fit_group_times(samples)
    inner_degrees = {(shape.kind, shape.degree): shape.inner_degree for shape in shapes}
    times = tuple(replace(fit, inner_degree=inner_degrees[fit.kind, fit.degree]) for fit in fits)
    cost = CostModel(
        times=times,
        memory=fit_memory(
            [(0, empty_bytes), *memory], state_bytes=state_bytes, update_bytes=update_bytes,
            least_slope=resident_bytes_per_token(runtime),
        ),
        step_fixed_s=step_fixed_s,
        peak_flop_per_s=best_rate(operations, "linear"),
        provenance=Provenance(
            source="measured", cluster=machine, model=runtime.model.spec.name,
            measured_on=datetime.now(UTC).date().isoformat(), torch_version=torch.__version__,
            num_samples=len(samples), mean_relative_error=statistics.fmean(map(abs, errors)),
            max_relative_error=max(map(abs, errors)),
        ),
        sharding=runtime.sharding,
        num_stages=runtime.mesh.num_stages,
    )
    return Calibration(cost=cost, operations=operations, groups=tuple(samples), relative_errors=errors)


def length_design(max_length: int, degree: int) -> tuple[tuple[int, ...], ...]:
    """Length sets of one group that tell s^2, s, count and fixed cost apart.

    The joint fit has fewer unknowns than samples, so that its error says something. Most is measured on one rank, whose
    work all shapes share: also as many tokens at once as a full microbatch has, where memory is slower than it is for
    few. Groups of less than four stop at half of ``max_length``: short looks at the quadratic part cost less than one
    long one. Degrees that are no power of two have just as many sets as prices of their own: most degrees are such.
    """
    small, middle = max(max_length // 32, 16), max(max_length // 8, 32)
    long = max_length if degree >= 4 else max(max_length // 2, 64)
    designs = [(small,) * degree, (long,), (max(small // 4, 8),) * (12 * degree)]
    if degree == 1:
        designs += [(small,) * 16, (middle,)]
    elif degree.bit_count() == 1:
        designs.append((small,) * (6 * degree))
    return tuple(dict.fromkeys(designs))


def fit_memory(
    peaks: SequenceOf[tuple[int, int]], *, state_bytes: int, update_bytes: int, least_slope: float = 0.0
) -> MemoryFit:
    """Peak bytes as a line over local tokens that no measured peak lies above, as low as it can be over all of them.

    ``peaks``: (local tokens, peak bytes) of microbatches that ran without optimizer state, one of them empty;
    ``state_bytes`` lies beside them in a real step. ``update_bytes``: peak of a step without tokens. A little is added
    to all of it: the resident set of a process is never the same twice. ``least_slope``: of chunked
    training, what a token adds once there is more than one chunk; the line then follows the larger sets.
    """
    slopes = [least_slope]
    for place, (tokens, peak) in enumerate(peaks):
        slopes += [(peak - other) / (tokens - fewer) for fewer, other in peaks[:place] if tokens != fewer]
    lines = [(max(peak - slope * tokens for tokens, peak in peaks), slope) for slope in slopes if slope >= least_slope]
    weights = [tokens if least_slope else 1 for tokens, _ in peaks]

    def height(line: tuple[float, float]) -> float:
        return sum(weight * (line[0] + line[1] * tokens) for weight, (tokens, _) in zip(weights, peaks, strict=True))

    base, slope = min(lines, key=lambda line: (height(line), line[1]))
    return MemoryFit(
        fixed_bytes=int(PEAK_MARGIN * (base + state_bytes)), bytes_per_token=max(1.0, PEAK_MARGIN * slope),
        update_bytes=int(PEAK_MARGIN * update_bytes),
    )


@dataclass(frozen=True, slots=True)
class _Case:
    """One length set of one shape."""

    shape: MeasuredShape
    lengths: tuple[int, ...]
    node_size: int | None

    def work(self, runtime: Runtime, *, keep_busy: bool) -> _Work:
        """What this rank does of it."""
        plan = design_plan(
            runtime.mesh.data_size, self.shape, self.lengths, runtime.sharding, node_size=self.node_size,
            keep_busy=keep_busy,
        )
        (microbatch,) = compile_rank_program(plan, runtime.mesh.data_rank).microbatches or (None,)
        counts = any(
            runtime.mesh.data_rank in group.ranks and (group.kind, group.degree) == (self.shape.kind, self.shape.degree)
            for each in plan.microbatches for group in each.groups
        )
        return _Work(microbatch, counts)


@dataclass(frozen=True, slots=True)
class _Work:
    """``counts``: this rank is in one of the groups that are measured."""

    microbatch: RankMicrobatch | None
    counts: bool


def _local_tokens(case: _Case) -> int:
    return -(-sum(case.lengths) // case.shape.degree)


def _peak_bytes(runtime: Runtime, case: _Case) -> int:
    """The highest peak of any rank. A shape's first run: it loads code and makes buffers, so its time says nothing."""
    _reset_peak(runtime)
    _run_case(runtime, case.work(runtime, keep_busy=False))
    return _highest(runtime, runtime.peak.read_bytes())


def run_probe(runtime: Runtime, shape: MeasuredShape, lengths: tuple[int, ...]) -> tuple[float, int]:
    """Seconds and peak bytes, each the most of any rank, of a microbatch of these lengths (tokens; none: an empty one)
    in as many groups of this shape as there is room for. Collective; belongs inside ``sharded_step``."""
    _reset_peak(runtime)
    if lengths:
        seconds = _run_case(runtime, _Case(shape, lengths, None).work(runtime, keep_busy=False))
    else:
        seconds = 0.0
        run_empty_microbatch(runtime)
    return seconds, _highest(runtime, runtime.peak.read_bytes())


def _timed_sweeps(runtime: Runtime, cases: SequenceOf[_Case]) -> list[GroupSample]:
    """A sample of every case, from several sweeps over all of them: its median run. (The quickest would be what a step
    never takes.) What another process does to the machine for some seconds then hits each case once, and not one of
    them every time, which would make its shape look dear and the others cheap."""
    works = [case.work(runtime, keep_busy=True) for case in cases]
    times: list[list[float]] = [[] for _ in cases]
    spent_s = 0.0
    for sweep in range(_MOST_SWEEPS):
        if sweep >= _LEAST_SWEEPS and spent_s * (sweep + 1) / sweep > _BUDGET_S:
            break
        for work, found in zip(works, times, strict=True):
            seconds = _run_case(runtime, work)
            spent_s += seconds
            found.append(seconds)
            if seconds < _SHORT_S:
                found.append(_run_case(runtime, work))
                spent_s += found[-1]
    return [
        GroupSample(
            kind=case.shape.kind, degree=case.shape.degree, lengths=case.lengths, seconds=statistics.median(found)
        )
        for case, found in zip(cases, times, strict=True)
    ]


def _run_case(runtime: Runtime, work: _Work) -> float:
    """Seconds of the slowest rank that counts, from a barrier on; the same on every rank."""
    comm.barrier(runtime.mesh.control_group)
    start_s = time.perf_counter()
    if work.microbatch is None and runtime.chunking is None:
        run_empty_microbatch(runtime)  # zero3 needs every rank
    else:
        _run_microbatch(runtime, work.microbatch)
    if runtime.mesh.device.type == "cuda":
        torch.cuda.synchronize(runtime.mesh.device)
    return _slowest(runtime, time.perf_counter() - start_s if work.counts else 0.0)


def _run_microbatch(runtime: Runtime, microbatch: RankMicrobatch | None) -> None:
    """Forward and backward of made-up tokens under the run's memory policy. Of sampled chunks always the same ones."""

    def read(spans: tuple[Span, ...]) -> TokenRows:
        ids = [np.full(span.num_tokens + 1, span.start_token % 7) for span in spans]
        return token_rows(ids, spans, runtime.mesh.device)

    if runtime.chunking is not None:
        steady = dataclasses.replace(runtime, chunking=runtime.chunking.steady())
        run_chunked_alone(steady, microbatch, read, lambda: run_empty_microbatch(runtime))
    elif microbatch is not None:
        run_alone(runtime, read(microbatch.spans), bind_attention(runtime, microbatch))


def design_plan(
    num_ranks: int, shape: MeasuredShape, lengths: tuple[int, ...], sharding: Sharding = Sharding.GATHER_ONCE, *,
    node_size: int | None = None, keep_busy: bool = False,
) -> StepPlan:
    """As many equal groups side by side as fit, each with its own copy of the sequences. A group that fits within a
    node (``node_size`` consecutive ranks; None: all) lies within one, others begin with a node. ``keep_busy``: the
    left-over ranks have about as much work of their own. Where ranks share cores, idle ones would lend theirs to the
    group, and shapes that leave ranks over would look cheap."""
    groups = []
    sequences: list[Sequence] = []
    for first in first_ranks(num_ranks, shape.degree, num_ranks if node_size is None else min(node_size, num_ranks)):
        numbers = tuple(range(len(sequences), len(sequences) + len(lengths)))
        sequences += [Sequence(number, size) for number, size in zip(numbers, lengths, strict=True)]
        ranks = tuple(range(first, first + shape.degree))
        groups.append(
            AttentionGroup(kind=shape.kind, ranks=ranks, sequences=numbers, inner_degree=shape.inner_degree)
        )
    taken = {rank for group in groups for rank in group.ranks}
    for rank in sorted(set(range(num_ranks)) - taken) if keep_busy else ():
        first, sizes = len(sequences), rank_share(lengths, shape.degree)
        sequences += [Sequence(first + place, size) for place, size in enumerate(sizes)]
        numbers = tuple(range(first, len(sequences)))
        groups.append(AttentionGroup(kind=AttentionKind.LOCAL, ranks=(rank,), sequences=numbers))
    report = SolveReport(status=SolveStatus.STATIC, objective_s=0.0, bound_s=0.0)
    microbatches = tuple(
        Microbatch(ranks=group.ranks, groups=(group,), predicted_s=0.0, peak_bytes=0) for group in groups
    )
    return StepPlan(
        step=0, strategy="calibrate", num_ranks=num_ranks, sequences=tuple(sequences), microbatches=microbatches,
        sharding=sharding, predicted_s=0.0, peak_bytes=0, cost_digest="", solver=report,
    )


def rank_share(lengths: tuple[int, ...], degree: int) -> tuple[int, ...]:
    """Whole sequences for one rank with as much attention as each of ``degree`` ranks has of these, or a little more
    work: as many of them over ``degree``, rounded up, and shorter where that is more than its part."""
    num_own = -(-len(lengths) // degree)
    factor = math.sqrt(len(lengths) / (num_own * degree))
    return tuple(math.ceil(size * factor) for size in lengths[:num_own])


def first_ranks(num_ranks: int, degree: int, node_size: int) -> tuple[int, ...]:
    """Where groups of this degree begin that lie side by side."""
    if degree > node_size:
        return tuple(range(0, num_ranks - degree + 1, -(-degree // node_size) * node_size))
    nodes = range(0, num_ranks, node_size)
    return tuple(
        first for node in nodes
        for first in range(node, min(node + node_size, num_ranks) - degree + 1, degree)
    )


def _measure_empty_step(runtime: Runtime) -> tuple[float, int, int]:
    """Seconds and peak bytes of a step without sequences (gather, reduce, optimizer at learning rate zero), and the
    optimizer state of the rank that has most."""
    design = design_plan(runtime.mesh.data_size, MeasuredShape(AttentionKind.LOCAL, 1), (), runtime.sharding)
    program = compile_rank_program(design, 0)
    times = []
    peak_bytes = 0
    _reset_peak(runtime)
    for repeat in range(_EMPTY_STEPS + 1):
        comm.barrier(runtime.mesh.control_group)
        outcome = train_step(runtime, program, _no_rows(runtime), num_tokens=1, lr=0.0)
        if repeat:
            times.append(_slowest(runtime, outcome.measured_s))
        peak_bytes = max(peak_bytes, *outcome.peak_bytes)
    state_bytes = _highest(runtime, runtime.optimizer.state_bytes)
    runtime.optimizer.forget_state()
    return statistics.median(times), peak_bytes, state_bytes


def _no_rows(runtime: Runtime) -> ReadSpans:
    return lambda spans: token_rows([], [], runtime.mesh.device)


def _reset_peak(runtime: Runtime) -> None:
    """Start a measurement of memory. On CPU the C library keeps freed memory for later: the resident set would still
    show what the set before needed, so it is given back first (glibc; elsewhere peaks err on the high side)."""
    if runtime.mesh.device.type == "cpu":
        give_back_freed_memory()
    runtime.peak.reset()


def _slowest(runtime: Runtime, seconds: float) -> float:
    value = torch.tensor([seconds], dtype=torch.float64)
    return float(comm.all_reduce_max(value, runtime.mesh.control_group))


def _highest(runtime: Runtime, num_bytes: int) -> int:
    return int(_slowest(runtime, float(num_bytes)))
