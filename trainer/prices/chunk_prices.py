"""Measures what chunks cost in this run, for plans that may choose them, by running the runtime's own chunks.

Microbatches of one sequence, on each rank alone and on all ranks together, run whole and in chunks of a few sizes.
Their extra seconds over whole microbatches give the cost of the second forward and the seconds per chunk. Their peaks
over an empty microbatch give the lowest line over chunk tokens that lies on or above all of them. Bytes of K/V and
their gradients follow from the model. Chunks are only measured if they keep fewer bytes than recompute does.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from memory.peak import give_back_freed_memory, map_large_blocks
from parallel.sharding import sharded_step
from planner.cost.chunk_fit import ChunkFit
from planner.cost.fits import ActivationFit
from planner.cost.fitting import non_negative_fit
from planner.cost.limits import PlanLimits
from planner.cost.model import CostModel
from planner.plan import AttentionKind
from trainer.prices.calibration import PEAK_MARGIN, MeasuredShape, run_probe
from trainer.step.chunk_policy import ChunkPolicy
from trainer.step.chunks import layer_row_bytes
from trainer.step.runtime import Runtime, run_empty_microbatch

_PARTS = (2, 8)
"""Into how many chunks the probes are cut."""
_SWEEPS = 2
_MIN_AGAIN = 2 / 7
"""Smallest cost of the second forward, as a share of a microbatch's seconds. Forward takes 2/7 of attention's FLOP and
a third of all others; a fit to a few noisy measurements may give more, but not less."""


@dataclass(frozen=True, slots=True)
class _Probe:
    """One way to run ``num_tokens`` per rank, with its seconds (the median) and peak bytes."""

    shape: MeasuredShape
    chunk_tokens: int
    seconds: float
    peak_bytes: int


def resident_bytes(runtime: Runtime) -> float:
    """Bytes of K/V and dK/dV per local token, over all layers of this rank."""
    num_layers, kv_bytes, dkv_bytes = layer_row_bytes(runtime)
    return num_layers * (kv_bytes + dkv_bytes)


def chunks_may_pay(runtime: Runtime, cost: CostModel, activation: ActivationFit) -> bool:
    """Whether chunks keep fewer bytes per token than recompute, which is faster."""
    return resident_bytes(runtime) < cost.memory.bytes_per_token - activation.recompute_bytes_per_token


def map_chunk_blocks(runtime: Runtime) -> None:
    """Prepare a run whose plans may choose chunks, so that the resident set shows what a chunk needs (see
    ``map_large_blocks``): a heap that keeps an earlier whole microbatch's memory would exceed every prediction."""
    if runtime.mesh.device.type == "cpu":
        map_large_blocks(fine=True)
        give_back_freed_memory()


def measure_chunks(runtime: Runtime, cost: CostModel, limits: PlanLimits, *, num_tokens: int) -> ChunkFit:
    """Prices of chunks, from sequences of ``num_tokens`` per rank, which must also fit as a whole. Collective; weights
    and gradients do not change."""
    map_chunk_blocks(runtime)
    with sharded_step(runtime.model, runtime.sharding, lambda: run_empty_microbatch(runtime)):
        local = MeasuredShape(AttentionKind.LOCAL, 1)
        empty_bytes = _probe(runtime, local, 0, 0).peak_bytes
        probes = [
            _probe(runtime, shape, num_tokens, size)
            for shape in (local, *_shared_shapes(runtime, cost, limits))
            for size in (0, *dict.fromkeys(max(1, num_tokens // part) for part in _PARTS))
        ]
    runtime.optimizer.zero_grad()
    again, s_per_chunk = _fit_seconds(probes, cost, num_tokens)
    fixed_bytes, bytes_per_token, shared_bytes = _fit_bytes(
        [probe for probe in probes if probe.chunk_tokens], cost.memory.bytes_per_token / PEAK_MARGIN,
        empty_bytes + resident_bytes(runtime) * num_tokens,
    )
    return ChunkFit(
        resident_bytes_per_token=PEAK_MARGIN * resident_bytes(runtime),
        num_kv_heads=max(1, runtime.model.spec.num_kv_heads // runtime.mesh.tensor_size),
        fixed_bytes=int(PEAK_MARGIN * fixed_bytes), bytes_per_token=PEAK_MARGIN * bytes_per_token,
        shared_bytes_per_token=PEAK_MARGIN * shared_bytes, again_attention=again, again_linear=again,
        s_per_chunk=s_per_chunk,
    )


def _shared_shapes(runtime: Runtime, cost: CostModel, limits: PlanLimits) -> tuple[MeasuredShape, ...]:
    """All ranks in one group, if possible of a kind that sends queries, because these need more memory."""
    degree = runtime.mesh.data_size
    kinds = sorted(
        (kind for kind in limits.kinds if degree > 1 and degree in cost.degrees(kind)),
        key=lambda kind: kind is AttentionKind.ULYSSES,
    )
    return tuple(MeasuredShape(kind, degree, cost.time_fit(kind, degree).inner_degree) for kind in kinds[:1])


def _probe(runtime: Runtime, shape: MeasuredShape, num_tokens: int, chunk_tokens: int) -> _Probe:
    """Run one probe. ``chunk_tokens`` 0: as a whole."""
    if chunk_tokens:
        runtime = dataclasses.replace(runtime, chunking=ChunkPolicy(chunk_tokens=chunk_tokens))
    lengths = (num_tokens * shape.degree,) if num_tokens else ()
    runs = [run_probe(runtime, shape, lengths) for _ in range(1 + _SWEEPS if num_tokens else 1)]
    later = runs[1:] or runs  # the first run allocates buffers
    return _Probe(
        shape, chunk_tokens, statistics.median(seconds for seconds, _ in later), max(peak for _, peak in runs)
    )


def _fit_seconds(probes: SequenceOf[_Probe], cost: CostModel, num_tokens: int) -> tuple[float, float]:
    """Cost of the second forward as a share of a microbatch's own seconds, and seconds per chunk."""
    whole_s = {probe.shape: probe.seconds for probe in probes if not probe.chunk_tokens}
    rows, extra_s = [], []
    for probe in probes:
        if not probe.chunk_tokens:
            continue
        total = num_tokens * probe.shape.degree
        fit = cost.time_fit(probe.shape.kind, probe.shape.degree)
        work_s = fit.marginal_s(num_tokens=total, num_tokens2=total * total, num_sequences=0)
        rows.append([work_s, num_tokens / probe.chunk_tokens + 1])
        extra_s.append(max(0.0, probe.seconds - whole_s[probe.shape] - _MIN_AGAIN * work_s))
    again, s_per_chunk = non_negative_fit(rows, extra_s, scales=[row[0] or 1.0 for row in rows])
    return _MIN_AGAIN + again, s_per_chunk


def _fit_bytes(
    probes: SequenceOf[_Probe], least_slope: float, resident: float
) -> tuple[float, float, float]:
    """Bytes of the chunk being computed: fixed, per own token, and per token of the whole group. The first two are the
    lowest line on or above all single-rank peaks that is at least as steep as for whole microbatches; the third is what
    groups need in addition."""
    alone = [(probe.chunk_tokens, probe.peak_bytes - resident) for probe in probes if probe.shape.degree == 1]
    slopes = [
        (high - low) / (size - fewer)
        for place, (size, high) in enumerate(alone) for fewer, low in alone[place + 1 :] if size != fewer
    ]
    slope = max(least_slope, *slopes) if slopes else least_slope
    fixed = max(0.0, max(peak - slope * size for size, peak in alone))
    shared = [
        (probe.peak_bytes - resident - fixed - slope * probe.chunk_tokens) / (probe.chunk_tokens * probe.shape.degree)
        for probe in probes if probe.shape.degree > 1
    ]
    return fixed, slope, max([0.0, *shared])
