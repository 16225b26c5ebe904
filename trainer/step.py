"""One training step, executed exactly as planned. The function to read first is ``train_step``."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch

from memory.peak import PeakMemory
from parallel import comm
from parallel.engine import AttentionEngine, MicrobatchAttention
from parallel.mesh import RankMesh
from parallel.program import RankMicrobatch, RankProgram
from parallel.sharding import gathered_step
from parallel.timing import StepClock
from planner.errors import NumericError
from planner.measured import RankStep
from planner.plan import Span
from trainer.batch import TokenRows, token_rows
from trainer.optimizer import ShardedAdamW
from trainer.spans import NUM_TIMES, pack_times, unpack_times
from trainer.transformer import Decoder

ReadSpans = Callable[[tuple[Span, ...]], TokenRows]


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """What a step works with; made once in ``trainer.build``."""

    mesh: RankMesh
    model: Decoder
    engine: AttentionEngine
    optimizer: ShardedAdamW
    clock: StepClock
    peak: PeakMemory
    compute_dtype: torch.dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutcome:
    """What a step did, the same on every rank. ``loss``: mean over all tokens of the step (nats).

    By data rank (tensor rank 0): ``busy_s``, seconds in microbatches without waiting for peers; ``span_s``, the same
    with the waiting; ``gather_s`` and ``reduce_s``, before and after them, waiting for slower ranks included;
    ``peak_bytes``. ``measured_s``: wall time seen by this rank; ``update_s``: what of it came after the reduction.
    ``ranks``: every microbatch of every rank, where it was asked for; else empty.
    """

    loss: float
    grad_norm: float
    measured_s: float
    busy_s: tuple[float, ...]
    span_s: tuple[float, ...]
    gather_s: tuple[float, ...]
    reduce_s: tuple[float, ...]
    peak_bytes: tuple[int, ...]
    update_s: float
    ranks: tuple[RankStep, ...]
    stop_requested: bool


def train_step(
    runtime: Runtime, program: RankProgram, read_spans: ReadSpans, *, num_tokens: int, lr: float, stop: bool = False,
    places: SequenceOf[tuple[int, int]] = (),
) -> StepOutcome:
    """Run this rank's program, sum the gradients, update. Collective.

    ``num_tokens``: labelled tokens of the whole step, all ranks: the one divisor of the loss, so gradients do not
    depend on how the step was planned. ``stop``: this rank wants to end after the step. ``places``: the plan's
    ``microbatch_places`` where every rank's microbatch times are wanted, the same on all ranks. Raises NumericError on
    all ranks, before the update, when loss or gradient norm is not finite.
    """
    start_s = time.perf_counter()
    runtime.peak.reset()
    # 1. forward and backward of this rank's microbatches, gradients summed once at the end
    loss_sum, times = accumulate_gradients(runtime, program, read_spans, num_tokens=num_tokens)
    # 2. one small sum tells every rank the loss, the gradient norm, who waited and who wants to stop
    shared = _share(runtime, loss_sum, runtime.optimizer.squared_norm(), stop, times, places)
    loss, grad_norm = shared.loss_sum / num_tokens, math.sqrt(shared.squared_norm)
    if not math.isfinite(loss) or not math.isfinite(grad_norm):
        raise NumericError(f"step {program.step}: loss {loss}, gradient norm {grad_norm}: stopped before the update")
    # 3. clip and update
    runtime.optimizer.step(lr=lr, grad_norm=grad_norm)
    runtime.optimizer.zero_grad()
    measured_s = time.perf_counter() - start_s
    return StepOutcome(
        loss=loss, grad_norm=grad_norm, measured_s=measured_s, busy_s=shared.busy_s, span_s=shared.span_s,
        gather_s=shared.gather_s, reduce_s=shared.reduce_s, peak_bytes=shared.peak_bytes,
        update_s=max(0.0, measured_s - times.gather_s - times.finish_s - times.reduce_s), ranks=shared.ranks,
        stop_requested=shared.stop,
    )


def accumulate_gradients(
    runtime: Runtime, program: RankProgram, read_spans: ReadSpans, *, num_tokens: int
) -> tuple[float, RankStep]:
    """Gradients of (sum of token losses / num_tokens) over all ranks, in every parameter's ``.grad``.

    Returns this rank's sum of token losses and where its time went.
    """
    device, clock = runtime.mesh.device, runtime.clock
    clock.restart()
    losses = torch.zeros((), dtype=torch.float64, device=device)

    def run(rows: TokenRows, attention: MicrobatchAttention) -> None:
        loss = runtime.model(rows.tokens_T, rows.positions_T, rows.labels_T, attention)
        losses.add_(loss.detach())
        clock.turn()
        (loss / num_tokens).backward()

    def run_empty_microbatch() -> None:
        run(token_rows([], [], device), MicrobatchAttention(()))

    with gathered_step(runtime.model, run_empty_microbatch):
        clock.gathered()
        for microbatch in program.microbatches:
            clock.begin(microbatch.index)
            run(read_spans(microbatch.spans), bind_attention(runtime, microbatch))
            clock.end()
    clock.reduced()
    loss_sum = losses.item()  # on CUDA the device has now passed every stamp of the clock
    return loss_sum, clock.read()


def bind_attention(runtime: Runtime, microbatch: RankMicrobatch) -> MicrobatchAttention:
    """The microbatch's attention with this tensor rank's heads."""
    spec, size = runtime.model.spec, runtime.mesh.tensor_size
    return runtime.engine.bind(
        microbatch,
        num_query_heads=spec.num_query_heads // size,
        num_kv_heads=spec.num_kv_heads // size,
        head_dim=spec.head_dim,
    )


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
    ranks: tuple[RankStep, ...]


def _share(
    runtime: Runtime, loss_sum: float, squared_norm: torch.Tensor, stop: bool, times: RankStep,
    places: SequenceOf[tuple[int, int]],
) -> _Shared:
    mesh = runtime.mesh
    totals = torch.zeros(3, dtype=torch.float64)
    by_rank = torch.zeros(5, mesh.data_size, dtype=torch.float64)
    spans = torch.zeros(len(places), NUM_TIMES, dtype=torch.float64)
    totals[1] = squared_norm
    totals[2] = float(stop)
    if mesh.tensor_rank == 0:  # tensor ranks hold the same loss and run the same microbatches
        totals[0] = loss_sum
        by_rank[:, mesh.data_rank] = torch.tensor(
            [times.finish_s - times.wait_s, times.finish_s, times.gather_s, times.reduce_s, runtime.peak.read_bytes()],
            dtype=torch.float64,
        )
        spans = pack_times(times.microbatches, places, mesh.data_rank)
    parts = (totals, by_rank.flatten(), spans.flatten())
    summed = comm.all_reduce_sum(torch.cat(parts), mesh.control_group).split([part.numel() for part in parts])
    (loss, norm, stops), table = summed[0].tolist(), summed[1].view_as(by_rank).tolist()
    busy_s, span_s, gather_s, reduce_s, peak_bytes = map(tuple, table)
    return _Shared(
        loss_sum=loss, squared_norm=norm, stop=stops > 0, busy_s=busy_s, span_s=span_s, gather_s=gather_s,
        reduce_s=reduce_s, peak_bytes=tuple(int(value) for value in peak_bytes),
        ranks=unpack_times(summed[2].view_as(spans), places, gather_s, reduce_s) if places else (),
    )
