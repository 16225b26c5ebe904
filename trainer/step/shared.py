"""One sum over all ranks at the end of a step: losses, times, peaks, and whether a rank wants to stop."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch

from parallel import comm
from planner.measured.step_times import RankStep
from trainer.step.runtime import (
    Runtime,
)
from trainer.step.spans import NUM_TIMES, pack_times, unpack_times


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutcome:
    """The result of a step, the same on every rank. ``loss``: mean over all tokens of the step (nats).

    By data rank (tensor rank 0): ``busy_s``, seconds in microbatches without waiting for peers; ``span_s``, with that
    waiting; ``gather_s`` and ``reduce_s``, the seconds before and after them, including waiting for slower ranks;
    ``peak_bytes`` and ``tier_peak_bytes``. With pipeline stages these are maxima over stages, and ``busy_s`` is their
    mean. ``measured_s``: wall time on this rank; ``update_s``: the part of it after the reduction. ``ranks``: times of
    every microbatch on every rank, if they were requested; else empty.
    """

    loss: float
    grad_norm: float
    measured_s: float
    busy_s: tuple[float, ...]
    span_s: tuple[float, ...]
    gather_s: tuple[float, ...]
    reduce_s: tuple[float, ...]
    peak_bytes: tuple[int, ...]
    tier_peak_bytes: tuple[int, ...]
    update_s: float
    ranks: tuple[RankStep, ...]
    stop_requested: bool


@dataclass(frozen=True, slots=True)
class _Shared:
    loss_sum: float
    squared_norm: float
    stop: bool
    busy_s: tuple[float, ...]
    span_s: tuple[float, ...]
    gather_s: tuple[float, ...]
    reduce_s: tuple[float, ...]
    peak_bytes: tuple[int, ...]
    tier_peak_bytes: tuple[int, ...]
    ranks: tuple[RankStep, ...]


def _share(
    runtime: Runtime, loss_sum: float, squared_norm: torch.Tensor, stop: bool, times: RankStep,
    places: SequenceOf[tuple[int, int]],
) -> _Shared:
    mesh = runtime.mesh
    totals = torch.zeros(3, dtype=torch.float64)
    by_rank = torch.zeros(6, mesh.num_stages, mesh.data_size, dtype=torch.float64)
    spans = torch.zeros(len(places), NUM_TIMES, dtype=torch.float64)
    totals[1] = squared_norm
    totals[2] = float(stop)
    if mesh.tensor_rank == 0:  # tensor ranks hold the same loss and run the same microbatches
        totals[0] = loss_sum
        by_rank[:, mesh.stage, mesh.data_rank] = torch.tensor(
            [
                times.finish_s - times.wait_s, times.finish_s, times.gather_s, times.reduce_s,
                runtime.peak.read_bytes(), runtime.memory.peak_tier_bytes,
            ],
            dtype=torch.float64,
        )
        spans = pack_times(times.microbatches, places, mesh.data_rank)
    parts = (totals, by_rank.flatten(), spans.flatten())
    summed = comm.all_reduce_sum(torch.cat(parts), mesh.control_group).split([part.numel() for part in parts])
    (loss, norm, stops), table = summed[0].tolist(), summed[1].view_as(by_rank)
    span_s, gather_s, reduce_s, *peaks = (tuple(row.tolist()) for row in table[1:].amax(1))
    peak_bytes, tier_peak_bytes = (tuple(int(value) for value in row) for row in peaks)
    return _Shared(
        loss_sum=loss, squared_norm=norm, stop=stops > 0, busy_s=tuple(table[0].mean(0).tolist()), span_s=span_s,
        gather_s=gather_s, reduce_s=reduce_s, peak_bytes=peak_bytes, tier_peak_bytes=tier_peak_bytes,
        ranks=unpack_times(summed[2].view_as(spans), places, gather_s, reduce_s) if places else (),
    )
