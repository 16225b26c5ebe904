"""Measures this machine with the training code itself, and fits the planner's cost model to the measurements.

Whole microbatches of made-up tokens run through model, engine and network, with all ranks busy as in a real step. For
each attention kind and degree a small set of sequence lengths is measured. So predictions interpolate measured
microbatches instead of adding up parts that were measured separately.
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
"""Increase it with every change of what is measured or how it is fitted; older stored results are then not used."""
_SHORT_S = 0.1
"""A microbatch shorter than this runs twice per sweep."""
_MIN_SWEEPS = 2
_MAX_SWEEPS = 5
_BUDGET_S = 18.0
"""Seconds for all timed sweeps together; at least two sweeps run."""
_EMPTY_STEPS = 5
PEAK_MARGIN = 1.03
"""Factor on predicted peaks. Without it, predictions of ``benchmarks.memory --part predict`` were between 1.9 % below
and 1.2 % above the measured peaks, because resident sets vary; with it they are 0 to 5 % above."""


@dataclass(frozen=True, slots=True)
class MeasuredShape:
    """Groups to measure: ``planner.plan.AttentionGroup`` without ranks and sequences."""

    kind: AttentionKind
    degree: int
    inner_degree: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """The fitted cost model and the samples it was fitted to."""

    cost: CostModel
    operations: tuple[SizeSample, ...]
    groups: tuple[GroupSample, ...]
    relative_errors: tuple[float, ...]


def calibrate(
    runtime: Runtime, shapes: tuple[MeasuredShape, ...], *, max_length: int, machine: str, node_size: int | None = None
) -> Calibration:
    """Measure all ``shapes`` with sequences of up to ``max_length`` tokens and fit the cost model. Collective. Weights
    do not change, but optimizer state is empty afterwards, so call it before training or loading. ``node_size``: number
    of consecutive data ranks on one node (None: all); groups are measured where planners place them, within nodes if
    they fit."""
    operations = measure_operations(runtime, max_length=max_length)
    cases = [
        _Case(shape, lengths, node_size) for shape in shapes for lengths in length_design(max_length, shape.degree)
    ]
    with sharded_step(runtime.model, runtime.sharding, lambda: run_empty_microbatch(runtime)):
        _reset_peak(runtime)
        run_empty_microbatch(runtime)
        empty_bytes = _highest(runtime, runtime.peak.read_bytes())
        # the largest case of each shape, and all cases of single ranks: they are quick and the fit needs small ones too
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
            measured_on=datetime.now(UTC).date().isoformat(),
            torch_version=str(torch.__version__),  # torch's own subclass of str cannot be written as YAML
            num_samples=len(samples), mean_relative_error=statistics.fmean(map(abs, errors)),
            max_relative_error=max(map(abs, errors)),
        ),
        sharding=runtime.sharding,
        num_stages=runtime.mesh.num_stages,
    )
    return Calibration(cost=cost, operations=operations, groups=tuple(samples), relative_errors=errors)


def length_design(max_length: int, degree: int) -> tuple[tuple[int, ...], ...]:
    """Sequence lengths for groups of one shape that tell the costs per token^2, per token, per sequence and per group
    apart.

    The joint fit has fewer unknowns than samples, so its error is meaningful. Most cases run on one rank, because all
    shapes share that work; one of them has as many tokens as a full microbatch, where memory is slower. Groups of fewer
    than four ranks only go up to half of ``max_length``: several short cases show the quadratic part at lower cost than
    one long one. Degrees that are not powers of two, which most are, get just as many cases as they have own prices.
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
    """The lowest line over local tokens that lies on or above all measured peaks (summed over all of them).

    ``peaks``: (local tokens, peak bytes) of microbatches that ran without optimizer state, one of them empty.
    ``state_bytes``: optimizer state, which a real step holds in addition. ``update_bytes``: peak of a step without
    tokens. All results are multiplied by PEAK_MARGIN. ``least_slope``: in chunked training, bytes that each token adds
    from the second chunk on; the larger cases then have more weight.
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
    """One set of sequence lengths for one shape."""

    shape: MeasuredShape
    lengths: tuple[int, ...]
    node_size: int | None

    def work(self, runtime: Runtime, *, keep_busy: bool) -> _Work:
        """What this rank runs of this case."""
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
    """``counts``: this rank is in one of the measured groups, so its time counts."""

    microbatch: RankMicrobatch | None
    counts: bool


def _local_tokens(case: _Case) -> int:
    return -(-sum(case.lengths) // case.shape.degree)


def _peak_bytes(runtime: Runtime, case: _Case) -> int:
    """The highest peak of any rank. It is the first run of a shape, which loads code, so it cannot be timed."""
    _reset_peak(runtime)
    _run_case(runtime, case.work(runtime, keep_busy=False))
    return _highest(runtime, runtime.peak.read_bytes())


def run_probe(runtime: Runtime, shape: MeasuredShape, lengths: tuple[int, ...]) -> tuple[float, int]:
    """Run a microbatch of these lengths (tokens; none: an empty one) in as many groups of this shape as fit side by
    side. Returns seconds and peak bytes, each the maximum over ranks. Collective; call it inside ``sharded_step``."""
    _reset_peak(runtime)
    if lengths:
        seconds = _run_case(runtime, _Case(shape, lengths, None).work(runtime, keep_busy=False))
    else:
        seconds = 0.0
        run_empty_microbatch(runtime)
    return seconds, _highest(runtime, runtime.peak.read_bytes())


def _timed_sweeps(runtime: Runtime, cases: SequenceOf[_Case]) -> list[GroupSample]:
    """A sample of every case: the median of several sweeps over all cases. (The minimum would be faster than real
    steps.) With sweeps, a disturbance of some seconds hits every case once, instead of every run of a single case,
    which would make its shape look expensive and the others cheap."""
    works = [case.work(runtime, keep_busy=True) for case in cases]
    times: list[list[float]] = [[] for _ in cases]
    spent_s = 0.0
    for sweep in range(_MAX_SWEEPS):
        if sweep >= _MIN_SWEEPS and spent_s * (sweep + 1) / sweep > _BUDGET_S:
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
    """Seconds of the slowest rank that counts, from a barrier on; the same value on every rank."""
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
    """Forward and backward of made-up tokens under the run's memory policy. Sampled chunks are always the same ones."""

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
    """As many equal groups as fit side by side, each with its own copy of the sequences. A group that fits into a node
    (``node_size`` consecutive ranks; None: all) stays within one; larger groups start at a node. ``keep_busy``: give
    left-over ranks about as much work. Otherwise, where ranks share cores, idle ranks would leave theirs to the group,
    and shapes with left-over ranks would look cheap."""
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
    """Whole sequences for one rank with as much attention as each of ``degree`` ranks has in a group of ``lengths``,
    and at least as much other work: their number divided by ``degree``, rounded up, each made shorter to compensate."""
    num_own = -(-len(lengths) // degree)
    factor = math.sqrt(len(lengths) / (num_own * degree))
    return tuple(math.ceil(size * factor) for size in lengths[:num_own])


def first_ranks(num_ranks: int, degree: int, node_size: int) -> tuple[int, ...]:
    """First ranks of the groups of this degree that fit side by side."""
    if degree > node_size:
        return tuple(range(0, num_ranks - degree + 1, -(-degree // node_size) * node_size))
    nodes = range(0, num_ranks, node_size)
    return tuple(
        first for node in nodes
        for first in range(node, min(node + node_size, num_ranks) - degree + 1, degree)
    )


def _measure_empty_step(runtime: Runtime) -> tuple[float, int, int]:
    """A step without sequences (gather, reduce, optimizer at learning rate zero): its seconds and peak bytes, and the
    largest optimizer state of any rank."""
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
    """Start a memory measurement. On CPU the C library keeps freed memory, and the resident set would still include
    what the previous case needed, so that memory is released first (glibc; elsewhere measured peaks are too high)."""
    if runtime.mesh.device.type == "cpu":
        give_back_freed_memory()
    runtime.peak.reset()


def _slowest(runtime: Runtime, seconds: float) -> float:
    value = torch.tensor([seconds], dtype=torch.float64)
    return float(comm.all_reduce_max(value, runtime.mesh.control_group))


def _highest(runtime: Runtime, num_bytes: int) -> int:
    return int(_slowest(runtime, float(num_bytes)))
