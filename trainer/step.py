"""One training step, executed exactly as planned. The function to read first is ``train_step``."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from memory.peak import PeakMemory
from parallel import comm
from parallel.engine import AttentionEngine, MicrobatchAttention
from parallel.mesh import RankMesh
from parallel.program import RankMicrobatch, RankProgram
from parallel.sharding import gathered_step
from parallel.timing import WaitClock
from planner.errors import NumericError
from planner.plan import Span
from trainer.batch import TokenRows, token_rows
from trainer.optimizer import ShardedAdamW
from trainer.transformer import Decoder

ReadSpans = Callable[[tuple[Span, ...]], TokenRows]


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """What a step works with; made once in ``trainer.build``."""

    mesh: RankMesh
    model: Decoder
    engine: AttentionEngine
    optimizer: ShardedAdamW
    wait_clock: WaitClock
    peak: PeakMemory
    compute_dtype: torch.dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutcome:
    """What a step did, the same on every rank. ``loss``: mean over all tokens of the step (nats).

    By data rank (tensor rank 0): ``busy_s``, seconds in microbatches without waiting for peers; ``span_s``, the same
    with the waiting; ``peak_bytes``. ``measured_s``: wall time seen by this rank.
    """

    loss: float
    grad_norm: float
    measured_s: float
    busy_s: tuple[float, ...]
    span_s: tuple[float, ...]
    peak_bytes: tuple[int, ...]
    stop_requested: bool


def train_step(
    runtime: Runtime, program: RankProgram, read_spans: ReadSpans, *, num_tokens: int, lr: float, stop: bool = False
) -> StepOutcome:
    """Run this rank's program, sum the gradients, update. Collective.

    ``num_tokens``: labelled tokens of the whole step, all ranks: the one divisor of the loss, so gradients do not
    depend on how the step was planned. ``stop``: this rank wants to end after the step. Raises NumericError on all
    ranks, before the update, when loss or gradient norm is not finite.
    """
    start_s = time.perf_counter()
    runtime.peak.reset()
    runtime.wait_clock.restart()
    # 1. forward and backward of this rank's microbatches, gradients summed once at the end
    loss_sum, span_s = accumulate_gradients(runtime, program, read_spans, num_tokens=num_tokens)
    # 2. one small sum tells every rank the loss, the gradient norm, who waited and who wants to stop
    shared = _share(runtime, loss_sum, runtime.optimizer.squared_norm(), stop, span_s)
    loss, grad_norm = shared.loss_sum / num_tokens, math.sqrt(shared.squared_norm)
    if not math.isfinite(loss) or not math.isfinite(grad_norm):
        raise NumericError(f"step {program.step}: loss {loss}, gradient norm {grad_norm}: stopped before the update")
    # 3. clip and update
    runtime.optimizer.step(lr=lr, grad_norm=grad_norm)
    runtime.optimizer.zero_grad()
    return StepOutcome(
        loss=loss, grad_norm=grad_norm, measured_s=time.perf_counter() - start_s, busy_s=shared.busy_s,
        span_s=shared.span_s, peak_bytes=shared.peak_bytes, stop_requested=shared.stop,
    )


def accumulate_gradients(
    runtime: Runtime, program: RankProgram, read_spans: ReadSpans, *, num_tokens: int
) -> tuple[float, float]:
    """Gradients of (sum of token losses / num_tokens) over all ranks, in every parameter's ``.grad``.

    Returns this rank's sum of token losses and the seconds from its first microbatch to the end of its last.
    """
    device = runtime.mesh.device
    losses = torch.zeros((), dtype=torch.float64, device=device)

    def run(rows: TokenRows, attention: MicrobatchAttention) -> None:
        loss = runtime.model(rows.tokens_T, rows.positions_T, rows.labels_T, attention)
        losses.add_(loss.detach())
        (loss / num_tokens).backward()

    def run_empty_microbatch() -> None:
        run(token_rows([], [], device), MicrobatchAttention(()))

    with gathered_step(runtime.model, run_empty_microbatch):
        start_s = time.perf_counter()
        for microbatch in program.microbatches:
            run(read_spans(microbatch.spans), bind_attention(runtime, microbatch))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        span_s = time.perf_counter() - start_s
    return losses.item(), span_s


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
    peak_bytes: tuple[int, ...]


def _share(runtime: Runtime, loss_sum: float, squared_norm: torch.Tensor, stop: bool, span_s: float) -> _Shared:
    mesh = runtime.mesh
    size = mesh.data_size
    totals = torch.zeros(3, dtype=torch.float64)
    by_rank = torch.zeros(3, size, dtype=torch.float64)
    totals[1] = squared_norm
    totals[2] = float(stop)
    if mesh.tensor_rank == 0:  # tensor ranks hold the same loss and run the same microbatches
        totals[0] = loss_sum
        waited_s = runtime.wait_clock.waited_s
        by_rank[:, mesh.data_rank] = torch.tensor(
            [span_s - waited_s, span_s, runtime.peak.read_bytes()], dtype=torch.float64
        )
    stats = comm.all_reduce_sum(torch.cat((totals, by_rank.flatten())), mesh.control_group)
    (loss, norm, stops), (busy, span, peak) = stats[:3].tolist(), stats[3:].view(3, size).tolist()
    return _Shared(
        loss_sum=loss, squared_norm=norm, stop=stops > 0, busy_s=tuple(busy), span_s=tuple(span),
        peak_bytes=tuple(int(value) for value in peak),
    )
