"""One training step, executed exactly as planned. Read ``train_step`` first."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence as SequenceOf

from parallel.program import RankProgram, compile_rank_program
from parallel.sharding import sharded_step
from planner.errors import NumericError
from planner.measured.step_times import RankStep
from planner.plan import StepPlan
from trainer.step.runtime import (
    ReadSpans,
    Runtime,
    run_empty_microbatch,
)
from trainer.step.shared import StepOutcome, _share
from trainer.step.stage_runner import StageRunner


def train_step(
    runtime: Runtime, program: RankProgram, read_spans: ReadSpans, *, num_tokens: int, lr: float, stop: bool = False,
    places: SequenceOf[tuple[int, int]] = (),
) -> StepOutcome:
    """Run this rank's program, sum the gradients, update. Collective.

    ``num_tokens``: labelled tokens of the whole step on all ranks. It is the only divisor of the loss, so gradients do
    not depend on the plan. ``stop``: this rank wants to stop after the step. ``places``: the plan's
    ``microbatch_places`` if the microbatch times of all ranks are wanted; the same on all ranks. Raises NumericError on
    all ranks, before the update, if the loss or the gradient norm is not finite.
    """
    start_s = time.perf_counter()
    runtime.peak.reset()
    runtime.memory.restart_peak()
    # 1. forward and backward of this rank's microbatches, gradients summed once at the end
    loss_sum, times = accumulate_gradients(runtime, program, read_spans, num_tokens=num_tokens)
    # 2. one small sum tells every rank the loss, the gradient norm, the times and whether a rank wants to stop
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
    """What this rank runs in this plan."""
    mesh = runtime.mesh
    return compile_rank_program(plan, mesh.data_rank, stage=mesh.stage, num_stages=mesh.num_stages)


def accumulate_gradients(
    runtime: Runtime, program: RankProgram, read_spans: ReadSpans, *, num_tokens: int
) -> tuple[float, RankStep]:
    """Gradients of (sum of token losses / num_tokens) over all ranks, in every parameter's ``.grad``.

    Returns this rank's sum of token losses and its times.
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


