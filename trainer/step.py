"""One training step, executed exactly as planned. The function to read first is ``train_step``."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch

from memory.activations import ActivationMemory
from memory.peak import PeakMemory
from memory.policy import ActivationPolicy
from memory.token_swap import MicrobatchMemory
from parallel import comm
from parallel.engine import AttentionEngine, MicrobatchAttention
from parallel.mesh import RankMesh
from parallel.program import RankAction, RankMicrobatch, RankProgram, compile_rank_program
from parallel.sharding import sharded_step
from parallel.stages import StageLink
from parallel.timing import StepClock
from planner.errors import NumericError, PlanError
from planner.measured import RankStep
from planner.plan import Sharding, Span, StepPlan
from trainer.batch import TokenRows, token_rows
from trainer.chunked_orders import StagedChunks, run_lockstep
from trainer.chunked_step import ChunkPolicy, chunking_of, run_chunked
from trainer.optimizer import ShardedAdamW
from trainer.spans import NUM_TIMES, pack_times, unpack_times
from trainer.static_plan import begin_microbatch, microbatch_kind
from trainer.transformer import Decoder

ReadSpans = Callable[[tuple[Span, ...]], TokenRows]


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """What a step works with; made once in ``trainer.build``. ``chunking``: None for whole microbatches."""

    mesh: RankMesh
    model: Decoder
    engine: AttentionEngine
    link: StageLink | None
    optimizer: ShardedAdamW
    clock: StepClock
    peak: PeakMemory
    memory: ActivationMemory
    compute_dtype: torch.dtype
    sharding: Sharding
    chunking: ChunkPolicy | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutcome:
    """What a step did, the same on every rank. ``loss``: mean over all tokens of the step (nats).

    By data rank (tensor rank 0): ``busy_s``, seconds in microbatches without waiting for peers; ``span_s``, the same
    with the waiting; ``gather_s`` and ``reduce_s``, before and after them, waiting for slower ranks included;
    ``peak_bytes`` and ``tier_peak_bytes``. With pipeline stages: the stage with the most, ``busy_s`` their mean.
    ``measured_s``: wall time seen by this rank; ``update_s``: what of it came after the reduction. ``ranks``: every
    microbatch of every rank, where it was asked for; else empty.
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
    runtime.memory.restart_peak()
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
        tier_peak_bytes=shared.tier_peak_bytes,
        update_s=max(0.0, measured_s - times.gather_s - times.finish_s - times.reduce_s), ranks=shared.ranks,
        stop_requested=shared.stop,
    )


def compile_stage_program(runtime: Runtime, plan: StepPlan) -> RankProgram:
    """What this rank runs of the plan."""
    mesh = runtime.mesh
    return compile_rank_program(plan, mesh.data_rank, stage=mesh.stage, num_stages=mesh.num_stages)


def accumulate_gradients(
    runtime: Runtime, program: RankProgram, read_spans: ReadSpans, *, num_tokens: int
) -> tuple[float, RankStep]:
    """Gradients of (sum of token losses / num_tokens) over all ranks, in every parameter's ``.grad``.

    Returns this rank's sum of token losses and where its time went.
    """
    clock = runtime.clock
    clock.restart()
    runner = StageRunner(runtime, program, read_spans, num_tokens)
    with sharded_step(runtime.model, runtime.sharding, lambda: run_empty_microbatch(runtime)):
        clock.gathered()
        if runtime.memory.recorder is not None:
            runtime.memory.recorder.restart(runtime.mesh.device, clock.zero)
        for action in program.actions:
            if runner.in_lockstep(action):
                if not action.backward:
                    runner.lockstep(action)
            elif action.place is None:
                if not action.backward:
                    run_empty_microbatch(runtime)
            elif action.backward:
                runner.backward(action.place)
            else:
                runner.forward(action.place)
        if runtime.link is not None:
            runtime.link.drain()
    clock.reduced()
    loss_sum = runner.loss_sum.item()  # on CUDA the device has now passed every stamp of the clock
    return loss_sum, clock.read()


def run_empty_microbatch(runtime: Runtime) -> None:
    """Forward and backward of zero tokens through this rank's stage."""
    run_alone(runtime, token_rows([], [], runtime.mesh.device), MicrobatchAttention(()))


def run_alone(runtime: Runtime, rows: TokenRows, attention: MicrobatchAttention) -> None:
    """Forward and backward of this rank's stage, cut off from its neighbours: later stages start from zeros."""
    hidden_TD = None
    if not runtime.model.stage.is_first:
        shape = (len(rows.tokens_T), runtime.model.spec.hidden_dim)
        hidden_TD = torch.zeros(shape, device=runtime.mesh.device, dtype=runtime.compute_dtype, requires_grad=True)
    memory = bind_memory(runtime, runtime.memory.policy, len(rows.tokens_T))
    runtime.model(rows.tokens_T, rows.positions_T, rows.labels_T, attention, hidden_TD, memory).sum().backward()


class StageRunner:
    """Forwards and backwards of one stage; what a forward leaves waits here for its backward."""

    def __init__(self, runtime: Runtime, program: RankProgram, read_spans: ReadSpans, num_tokens: int) -> None:
        self._runtime = runtime
        self._program = program
        self._read_spans = read_spans
        self._num_tokens = num_tokens
        self._in_flight: dict[int, tuple[torch.Tensor | None, torch.Tensor]] = {}  # stage's input, output by place
        self._in_chunks: dict[int, StagedChunks] = {}
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=runtime.mesh.device)

    def forward(self, place: int) -> None:
        runtime, microbatch = self._runtime, self._program.microbatches[place]
        runtime.clock.begin(microbatch.index)
        self._begin_plan(place, microbatch)
        if chunking_of(runtime, microbatch) is not None:
            self._forward_in_chunks(place, microbatch)
            runtime.clock.turn()
            return
        rows, link, hidden_TD = self._read_spans(microbatch.spans), runtime.link, None
        if link is not None and not link.is_first:
            hidden_TD = link.receive_hidden(microbatch.index, self._shape(microbatch))
            self._let_go_of_gradients(place, link)
        attention = bind_attention(runtime, microbatch)
        memory = bind_memory(runtime, memory_policy(runtime, microbatch), microbatch.num_rows)
        output = runtime.model(rows.tokens_T, rows.positions_T, rows.labels_T, attention, hidden_TD, memory)
        if link is not None and not link.is_last:
            link.send_hidden(microbatch.index, output)
        else:
            self.loss_sum.add_(output.detach())
        self._in_flight[place] = hidden_TD, output
        runtime.clock.turn()

    def backward(self, place: int) -> None:
        link, microbatch = self._runtime.link, self._program.microbatches[place]
        self._runtime.clock.resume(microbatch.index)
        if chunking_of(self._runtime, microbatch) is not None:
            if place in self._in_chunks:
                self.loss_sum.add_(self._in_chunks.pop(place).backward())
            self._end_plan()
            self._runtime.clock.end()
            return
        hidden_TD, output = self._in_flight.pop(place)
        if link is not None and not link.is_last:
            output.backward(link.receive_gradient(microbatch.index, self._shape(microbatch)))
        else:
            (output / self._num_tokens).backward()
        if link is not None and hidden_TD is not None:
            assert hidden_TD.grad is not None
            link.send_gradient(microbatch.index, hidden_TD.grad)
        del hidden_TD, output
        if self._runtime.memory.recorder is not None:
            self._runtime.memory.recorder.end()
        self._end_plan()
        self._runtime.clock.end()

    def in_lockstep(self, action: RankAction) -> bool:
        """Whether the action's round runs group by group in step with all ranks (see ``trainer.chunked_orders``)."""
        runtime = self._runtime
        return runtime.sharding is Sharding.ZERO3 and (runtime.chunking is not None or action.in_chunks)

    def lockstep(self, action: RankAction) -> None:
        """Forward and backward of the round, with this rank's microbatch or with none."""
        runtime, program = self._runtime, self._program
        microbatch = None if action.place is None else program.microbatches[action.place]
        if microbatch is not None:
            runtime.clock.begin(microbatch.index)
        self.loss_sum.add_(run_lockstep(
            runtime, microbatch, action.slots, self._read_spans, step=program.step, num_tokens=self._num_tokens,
            run_empty=lambda: run_empty_microbatch(runtime),
        ))
        if microbatch is not None:
            runtime.clock.turn()
            runtime.clock.resume(microbatch.index)
            runtime.clock.end()

    def _forward_in_chunks(self, place: int, microbatch: RankMicrobatch) -> None:
        """Without pipeline stages both passes at once, for the backward comes next anyway."""
        runtime, step, num_tokens = self._runtime, self._program.step, self._num_tokens
        if runtime.link is None:
            self.loss_sum.add_(run_chunked(runtime, microbatch, self._read_spans, step=step, num_tokens=num_tokens))
            return
        chunks = StagedChunks(
            runtime, microbatch, self._read_spans, step=step, num_tokens=num_tokens, link=runtime.link
        )
        chunks.forward()
        self._in_chunks[place] = chunks
        if not runtime.link.is_first:
            self._let_go_of_gradients(place, runtime.link)

    def _let_go_of_gradients(self, place: int, link: StageLink) -> None:
        """The stage before is past every backward that its limit of forwards in flight made it run first."""
        settled = place - (link.num_stages - (link.stage - 1))
        if settled >= 0:
            link.gradient_has_arrived(self._program.microbatches[settled].index)

    def _begin_plan(self, place: int, microbatch: RankMicrobatch) -> None:
        runtime, arena = self._runtime, self._runtime.memory.arena
        if arena is not None:  # without pipeline stages a microbatch's backward follows its forward
            kind = microbatch_kind(
                microbatch, memory_policy(runtime, microbatch), is_first=place == 0,
                loss_chunk_tokens=runtime.model.loss_chunk_tokens, is_whole=chunking_of(runtime, microbatch) is None,
                mlp_chunk_tokens=runtime.model.mlp_chunk_tokens,
            )
            begin_microbatch(arena, kind, microbatch.num_rows, runtime.mesh.device)

    def _end_plan(self) -> None:
        if self._runtime.memory.arena is not None:
            self._runtime.memory.arena.end()

    def _shape(self, microbatch: RankMicrobatch) -> tuple[int, int]:
        return microbatch.num_rows, self._runtime.model.spec.hidden_dim


def bind_attention(runtime: Runtime, microbatch: RankMicrobatch) -> MicrobatchAttention:
    """The microbatch's attention with this tensor rank's heads."""
    spec, size = runtime.model.spec, runtime.mesh.tensor_size
    return runtime.engine.bind(
        microbatch,
        num_query_heads=spec.num_query_heads // size,
        num_kv_heads=spec.num_kv_heads // size,
        head_dim=spec.head_dim,
        regather=memory_policy(runtime, microbatch).recomputes,
    )


def memory_policy(runtime: Runtime, microbatch: RankMicrobatch) -> ActivationPolicy:
    """The plan's policy for this microbatch, or the run's where the plan just keeps."""
    planned = microbatch.memory
    if planned.is_keep:
        return runtime.memory.policy
    return ActivationPolicy(
        swap_fraction=planned.swap_fraction, keep_fraction=planned.keep_fraction,
        swap_pair=planned.swap_fraction > 0, pair_fraction=planned.swap_fraction,
        row_multiple=runtime.memory.policy.row_multiple, kept_layers=runtime.memory.kept_layers,
    )


def bind_memory(runtime: Runtime, policy: ActivationPolicy, num_rows: int) -> MicrobatchMemory:
    """What becomes of the activations of one microbatch of ``num_rows`` local rows. Raises PlanError where the policy
    swaps and the run has no tier."""
    if policy.swaps and runtime.memory.tier is None:
        raise PlanError("the plan swaps activations, but the run has no tier to swap to")
    stage = runtime.model.stage
    return MicrobatchMemory(
        policy, runtime.memory.tier, num_layers=len(runtime.model.layers), num_rows=num_rows, keeps_last=stage.is_last,
        timeline=runtime.memory.recorder,
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
