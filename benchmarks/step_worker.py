"""One rank of the step benchmark: calibrate, plan all batches, then run every batch with every strategy in turn."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.lengths import skewed_batches
from benchmarks.peers.step import GRADIENT_TOLERANCE, PeerStep, PeerSystem, check_gradients, make_peers, padded_reader
from benchmarks.step_results import (
    BATCH_BEST,
    RING_ALL,
    MeasuredPeerStep,
    MeasuredStep,
    PeerCheck,
    StepRun,
    StepSettings,
    loss_spread,
    static_name,
)
from launch import environment
from parallel import comm
from parallel.agree import agree_on_plan
from parallel.program import RankProgram
from planner.codec import from_plain, to_plain
from planner.cost.limits import PlanLimits
from planner.cost.model import CostModel
from planner.errors import EXIT_BAD_CONFIG, InfeasibleError, LonghaulError, NumericError
from planner.inputs.files import load_model
from planner.plan import AttentionKind, Span, StepPlan, digest_of
from planner.pricing.problem import StepProblem
from planner.pricing.verify import verify_plan
from planner.step_planner import plan_step
from planner.strategies.static import possible_degrees
from trainer.build import build_runtime
from trainer.data.batch import TokenRows, token_rows
from trainer.prices.cost_source import obtain_cost
from trainer.prices.plan_inputs import plan_limits
from trainer.rank_env import RankEnv
from trainer.settings.tree import DataConfig, PlanConfig, RunConfig, TrainConfig
from trainer.step.one_step import compile_stage_program, train_step
from trainer.step.runtime import ReadSpans, Runtime
from trainer.step.shared import StepOutcome

_LOSS_TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True, slots=True)
class _Progress:
    """Prints rank 0's progress with the seconds since the start, to stderr (in a box: the rank's log)."""

    is_on: bool
    start_s: float = dataclasses.field(default_factory=time.perf_counter)

    def __call__(self, text: str) -> None:
        if self.is_on:
            print(f"[{time.perf_counter() - self.start_s:4.0f} s] {text}", file=sys.stderr, flush=True)


def measure_rank(settings: StepSettings, rank: int, folder: Path) -> None:
    """Run the benchmark as ``rank``; rank 0 writes ``folder/result.json``, a StepRun. Collective.

    Raises the planner's SpecError or InfeasibleError on all ranks, and NumericError where strategies differ in the loss
    of a batch.
    """
    config = TrainConfig(
        run=RunConfig(dir=str(folder), seed=settings.seed, world_size=settings.num_ranks, device="cpu"),
        data=DataConfig(max_length=settings.max_length),
        plan=PlanConfig(attention=settings.attention),  # type: ignore[arg-type]
    )
    env = RankEnv(
        rank=rank, world_size=settings.num_ranks, local_rank=rank % settings.ranks_per_node,
        local_world_size=settings.ranks_per_node,
    )
    runtime = build_runtime(config, env, load_model(settings.model), init_method=f"file://{folder / 'store'}")
    try:
        run = _measure(settings, config, runtime, folder)
        if rank == 0:
            (folder / "result.json").write_text(json.dumps(to_plain(run)), encoding="utf-8")
    finally:
        comm.shutdown()


def _measure(settings: StepSettings, config: TrainConfig, runtime: Runtime, folder: Path) -> StepRun:
    limits = plan_limits(  # the device budget is set below, from the cost model
        config, runtime.model.spec, device_budget_bytes=0, devices_per_node=settings.ranks_per_node
    )
    say = _Progress(is_on=runtime.mesh.rank == 0)
    cost, how = obtain_cost(config, runtime, limits, folder)  # the folder is empty, so it is measured now
    say(how)
    limits = dataclasses.replace(limits, device_budget_bytes=cost.device_bytes(settings.capacity_tokens))
    batches = skewed_batches(
        num_batches=settings.num_batches, tokens_per_batch=settings.tokens_per_batch,
        max_length=settings.max_length, seed=settings.seed,
    )
    plans, misfits = _plan_all(settings, runtime, cost, limits, batches)
    peers, peer_misfits = make_peers(settings.peers, runtime, batches, capacity_tokens=settings.capacity_tokens)
    say(f"planned {settings.num_batches} batches: {', '.join(plans)}")
    checks = _check_peers(settings, runtime, peers, plans[settings.strategies[0]][0], batches[0])
    load_before = os.getloadavg()[0]
    steps, peer_steps = _run_all(settings, runtime, plans, peers, batches, say)
    run = StepRun(
        settings=settings, batches=batches, budget_bytes=limits.device_budget_bytes, cost_origin=cost.provenance,
        steps=steps, misfits=misfits, num_threads=torch.get_num_threads(), load_before=load_before,
        load_after=os.getloadavg()[0], peer_steps=peer_steps, peer_checks=checks, peer_misfits=peer_misfits,
    )
    spread = loss_spread(run)
    if not spread <= _LOSS_TOLERANCE:
        raise NumericError(f"strategies differ by {spread:.1e} in the loss of one batch: they did not do the same work")
    return run


def _check_peers(
    settings: StepSettings, runtime: Runtime, peers: tuple[PeerSystem, ...], plan: StepPlan, lengths: tuple[int, ...]
) -> tuple[PeerCheck, ...]:
    """Compare peers with Longhaul's ``plan`` of the first batch. Raises NumericError where a peer's gradients differ
    that are meant to be right."""
    documents = _documents(settings, lengths, 0, runtime)
    checks = check_gradients(
        peers, runtime, compile_stage_program(runtime, plan), _reader(documents, runtime),
        padded_reader(documents, runtime.mesh.device),
    )
    for check in checks:
        if check.gradients_meant_right and not check.gradient_error <= GRADIENT_TOLERANCE:
            raise NumericError(f"{check.name}: gradients differ from Longhaul's by {check.gradient_error:.1e}")
    return checks


def _plan_all(
    settings: StepSettings, runtime: Runtime, cost: CostModel, limits: PlanLimits, batches: tuple[tuple[int, ...], ...]
) -> tuple[dict[str, tuple[StepPlan, ...]], tuple[tuple[str, int], ...]]:
    """The plans, by batch, of every strategy that fits all batches; and for each of the others, the number of batches
    that do not fit."""
    problem = StepProblem(lengths=batches[0], num_ranks=settings.num_ranks, cost=cost, limits=limits)
    # As for the peers, only degrees that leave no rank over.
    degrees = [degree for degree in possible_degrees(problem) if settings.num_ranks % degree == 0]
    choices: dict[str, tuple[str, int | None, PlanLimits]] = {}
    choices |= {name: (name, None, limits) for name in settings.strategies}
    choices[BATCH_BEST] = ("static", None, limits)
    for degree in degrees:
        if settings.attention == "auto" and degree in cost.degrees(AttentionKind.ULYSSES):
            ulysses = dataclasses.replace(limits, kinds=(AttentionKind.ULYSSES,))
            choices[f"static ulysses {degree}"] = ("static", degree, ulysses)
        else:
            choices[static_name(degree)] = ("static", degree, limits)
    if AttentionKind.RING in limits.kinds and settings.num_ranks in cost.degrees(AttentionKind.RING):
        rings = dataclasses.replace(limits, kinds=(AttentionKind.RING,))
        choices[RING_ALL] = ("static", settings.num_ranks, rings)
        if settings.num_ranks not in cost.degrees(AttentionKind.ULYSSES):
            choices.pop(static_name(settings.num_ranks), None)  # the same layout under another name
    plans, misfits = {}, []
    for name, (strategy, degree, allowed) in choices.items():
        found: list[StepPlan] = []
        for number, lengths in enumerate(batches):
            try:
                found.append(_plan(runtime, cost, allowed, lengths, number, strategy, degree))
            except InfeasibleError:
                if degree is None:  # not even all degrees together can hold the batch, so nothing can be compared
                    raise
        if len(found) == len(batches):
            plans[name] = tuple(found)
        else:
            misfits.append((name, len(batches) - len(found)))
    return plans, tuple(misfits)


def _plan(
    runtime: Runtime, cost: CostModel, limits: PlanLimits, lengths: tuple[int, ...], step: int, strategy: str,
    degree: int | None,
) -> StepPlan:
    """Rank 0 plans and all ranks agree on the plan, as in training."""
    mesh = runtime.mesh
    plan: StepPlan | InfeasibleError | None = None
    if mesh.rank == 0:
        try:
            plan = plan_step(
                StepProblem(lengths=lengths, num_ranks=mesh.data_size, cost=cost, limits=limits),
                step=step,
                strategy=strategy,
                degree=degree,
            )
        except InfeasibleError as error:
            plan = error
    return agree_on_plan(
        plan,
        source=0,
        group=mesh.control_group,
        verify=lambda received: verify_plan(
            received, StepProblem(lengths=lengths, num_ranks=mesh.data_size, cost=cost, limits=limits)
        ),
    )


def _run_all(
    settings: StepSettings, runtime: Runtime, plans: dict[str, tuple[StepPlan, ...]], peers: tuple[PeerSystem, ...],
    batches: tuple[tuple[int, ...], ...], say: _Progress,
) -> tuple[tuple[MeasuredStep, ...], tuple[MeasuredPeerStep, ...]]:
    by_name = {system.name: system for system in peers}
    names = [*plans, *by_name]
    documents = [_documents(settings, lengths, number, runtime) for number, lengths in enumerate(batches)]

    def measure(name: str, number: int) -> MeasuredStep | MeasuredPeerStep:
        if name in by_name:
            read = padded_reader(documents[number], runtime.mesh.device)
            return _measure_peer(name, number, by_name[name].steps[number], read)
        return _measure_plan(name, number, plans[name][number], runtime, _reader(documents[number], runtime))

    for name in names:
        measure(name, 0)  # warm-up
    found = []
    for number in range(len(batches)):
        found += [measure(name, number) for name in turn_order(names, number)]
        say(f"batch {number + 1} of {len(batches)} done")
    return (
        tuple(step for step in found if isinstance(step, MeasuredStep)),
        tuple(step for step in found if isinstance(step, MeasuredPeerStep)),
    )


def turn_order(names: list[str], number: int) -> list[str]:
    """The order of ``names`` in batch ``number``. It rotates from batch to batch and every second one is reversed,
    because a step is quicker after one of the same shape (its memory is already allocated)."""
    first = number % len(names)
    turned = names[first:] + names[:first]
    return turned[::-1] if number % 2 else turned


def _measure_plan(name: str, number: int, plan: StepPlan, runtime: Runtime, read: ReadSpans) -> MeasuredStep:
    outcome, measured_s = _run(runtime, compile_stage_program(runtime, plan), read, plan.num_tokens)
    return MeasuredStep(
        batch=number, strategy=name, num_tokens=plan.num_tokens, predicted_s=plan.predicted_s, measured_s=measured_s,
        plan_s=plan.solver.wall_s, gap=plan.solver.gap, status=plan.solver.status.value,
        winner=plan.solver.note.partition(" ")[0], work=digest_of(plan.microbatches), loss=outcome.loss,
    )


def _measure_peer(name: str, number: int, step: PeerStep, read: ReadSpans) -> MeasuredPeerStep:
    plan = step.plan
    outcome, measured_s = _run(step.runtime, step.program, read, plan.num_tokens)
    return MeasuredPeerStep(
        batch=number, peer=name, num_tokens=plan.num_tokens, num_padding_tokens=plan.num_padding_tokens,
        num_microbatches=plan.num_microbatches, pack_s=step.pack_s, measured_s=measured_s, loss=outcome.loss,
    )


def _run(runtime: Runtime, program: RankProgram, read: ReadSpans, num_tokens: int) -> tuple[StepOutcome, float]:
    """Run a step. Returns its outcome and the seconds of the slowest rank."""
    comm.barrier(runtime.mesh.control_group)
    outcome = train_step(runtime, program, read, num_tokens=num_tokens, lr=0.0)
    slowest = comm.all_reduce_max(torch.tensor([outcome.measured_s], dtype=torch.float64), runtime.mesh.control_group)
    return outcome, float(slowest)


def _documents(
    settings: StepSettings, lengths: tuple[int, ...], number: int, runtime: Runtime
) -> list[npt.NDArray[np.int64]]:
    """Random documents of one token more than their length (the last label). Every rank draws the same ones."""
    rng = np.random.default_rng((settings.seed, number))
    return [rng.integers(0, runtime.model.spec.vocab_size, size=length + 1) for length in lengths]


def _reader(documents: list[npt.NDArray[np.int64]], runtime: Runtime) -> ReadSpans:
    def read(spans: tuple[Span, ...]) -> TokenRows:
        ids = [documents[span.sequence][span.start_token : span.stop_token + 1] for span in spans]
        return token_rows(ids, spans, runtime.mesh.device)

    return read


def main() -> int:
    """Run one rank in a box: ``python -m benchmarks.step_worker SETTINGS.json FOLDER``, with its rank in RANK."""
    settings = from_plain(StepSettings, json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), where="settings")
    env = environment.detect()
    if env is None:
        print("benchmarks.step_worker: error: RANK is not set; benchmarks.step --box starts this", file=sys.stderr)
        return EXIT_BAD_CONFIG
    try:
        measure_rank(settings, env.rank, Path(sys.argv[2]))
    except LonghaulError as error:
        print(f"benchmarks.step: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
