"""One rank's run, from joining the process group to the last checkpoint. Launchers call ``run_rank``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel import comm
from parallel.agree import agree_on_plan
from parallel.mesh import RankMesh
from planner.codec import from_plain, to_plain
from planner.cost.limits import PlanLimits
from planner.cost.model import CostModel
from planner.errors import EXIT_OK, EXIT_PREEMPTED, InfeasibleError
from planner.measured.copy_times import lanes_to_plain
from planner.measured.drift import DriftWatch, planned_span_s, refit_cost
from planner.measured.step_times import MeasuredStep, measured_to_plain, microbatch_places
from planner.plan import StepPlan, plan_to_json
from planner.pricing.problem import StepProblem
from planner.pricing.verify import verify_plan
from trainer.build import build_runtime
from trainer.checkpoint.manifests import CHECKPOINTS, check_same_run, run_identity
from trainer.checkpoint.tensors import TrainingState, choose_checkpoint, load_tensors, save_checkpoint, weights_digest
from trainer.data.batch import SpanReader
from trainer.data.ledger import LedgerPosition
from trainer.data.training_data import TrainingData, open_training_data
from trainer.model.optimizer import learning_rate
from trainer.plan_feed import PlanFeed, PlanTaken
from trainer.prices.cost_source import make_limits, obtain_cost
from trainer.prices.plan_inputs import require_longest_fits
from trainer.prices.planned_memory import plan_memory, policy_note
from trainer.rank_env import RankEnv
from trainer.record.metrics import (
    LANES,
    METRICS,
    PLANS,
    REFIT,
    SPANS,
    MetricsLog,
    json_line,
    keep_steps_before,
    read_metrics,
)
from trainer.record.progress import Progress
from trainer.record.run_records import read_executed
from trainer.record.step_report import make_report, predicted_host_bytes
from trainer.settings.tree import TrainConfig
from trainer.step.one_step import compile_stage_program, train_step
from trainer.step.runtime import Runtime
from trainer.step.shared import StepOutcome
from trainer.step.spans import gather_lanes, is_recorded, lanes_interval, spans_interval
from trainer.stop_flag import StopFlag


@dataclass(frozen=True, slots=True, kw_only=True)
class _Session:
    """Everything that the training loop needs, made at start-up."""

    config: TrainConfig
    runtime: Runtime
    data: TrainingData
    cost: CostModel
    limits: PlanLimits
    folder: Path
    first_step: int

    @property
    def is_main(self) -> bool:
        return self.runtime.mesh.rank == 0


def run_rank(config: TrainConfig, env: RankEnv, *, cache_root: Path) -> int:
    """Train as rank ``env.rank``. Returns the exit code: 0 done, 75 stopped by a signal after saving. Collective.

    Raises the LonghaulErrors of its parts, on all ranks if the error of one rank concerns all.
    """
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, world_size=env.world_size))
    data = open_training_data(config, cache_root)
    runtime = build_runtime(config, env, data.spec)
    with ExitStack() as closing:
        closing.callback(comm.shutdown)
        closing.callback(runtime.memory.close)
        session, notes = _open_session(config, env, runtime, data, cache_root, closing)
        with StopFlag() as stop, _feed(session) as feed, _display(session, notes) as display:
            return _train(session, stop, feed, display)


def _open_session(
    config: TrainConfig, env: RankEnv, runtime: Runtime, data: TrainingData, cache_root: Path,
    closing: ExitStack,
) -> tuple[_Session, list[str]]:
    limits = make_limits(config, runtime, env.local_world_size)
    cost, source = obtain_cost(config, runtime, limits, cache_root)
    memory, cost, limits = plan_memory(config, runtime, cost, limits, cache_root, env.local_world_size)
    closing.callback(memory.close)
    runtime = dataclasses.replace(runtime, memory=memory)
    longest = require_longest_fits(config, data, runtime.mesh.data_size, cost, limits)
    folder = Path(config.run.dir)
    first_step, resumed = 0, list[str]()
    if config.run.resume:
        first_step, resumed = _resume(runtime, data, folder, run_identity(config, data.spec))
    mesh, spec = runtime.mesh, data.spec
    notes = [
        *data.describe(),
        f"model: {spec.name}, {spec.num_params:,} parameters, {spec.num_layers} layers, {spec.num_query_heads} query "
        f"heads, {spec.num_kv_heads} KV heads",
        f"ranks: {_grid(mesh)} on {mesh.device.type}, {config.run.dtype}, "
        f"attention kernel {runtime.engine.kernel.name}",
        source,
        *([memory.note] if memory.note else []),
        *([policy_note(longest, cost, limits)] if len(limits.policies) > 1 else []),
        *_chunk_notes(runtime),
        *resumed,
    ]
    session = _Session(
        config=config, runtime=runtime, data=data, cost=cost, limits=limits, folder=folder, first_step=first_step
    )
    return session, notes


def _chunk_notes(runtime: Runtime) -> list[str]:
    policy = runtime.chunking
    if policy is None:
        return []
    gradients = policy.describe_gradients()
    lines = [f"chunks: {policy.chunk_tokens:,} tokens per rank; activations of the last {policy.keep_rows:,} are kept"]
    return lines if gradients == "exact" else [*lines, f"NOTE: {gradients}, and so is the loss shown"]


def _grid(mesh: RankMesh) -> str:
    text = f"{mesh.data_size} data x {mesh.tensor_size} tensor"
    if mesh.num_stages > 1:
        text += f" x {mesh.num_stages} pipeline stages"
    if mesh.shape.shard_size < mesh.data_size:
        text += f" ({mesh.data_size // mesh.shape.shard_size} replicas of the weights)"
    return text


def _resume(
    runtime: Runtime, data: TrainingData, folder: Path, identity: dict[str, object]
) -> tuple[int, list[str]]:
    path, manifest, complaints = choose_checkpoint(runtime.mesh, folder / CHECKPOINTS)
    check_same_run(path, manifest["run"], identity)
    load_tensors(runtime, path, manifest)
    data.ledger.restore(from_plain(LedgerPosition, manifest["ledger"], where=str(path)))
    skipped = [f"resume: skipped a checkpoint: {line}" for line in complaints]
    return manifest["next_step"], [*skipped, f"resume: step {manifest['next_step']} from {path}"]


@contextmanager
def _feed(session: _Session) -> Iterator[PlanFeed | None]:
    """The planner's child process, on rank 0 only."""
    if not session.is_main:
        yield None
        return
    plan = session.config.plan
    feed = PlanFeed(
        num_ranks=session.runtime.mesh.data_size, cost=session.cost, limits=session.limits, strategy=plan.strategy,
        degree=plan.degree, ahead=plan.ahead,
    )
    try:
        yield feed
    finally:
        feed.close()


@dataclass(frozen=True, slots=True)
class _Display:
    """What rank 0 prints and writes."""

    session: _Session
    progress: Progress
    metrics: MetricsLog
    drift: DriftWatch

    def step(
        self, plan: StepPlan, outcome: StepOutcome, taken: PlanTaken, lr: float, lanes: list[dict[str, Any]]
    ) -> None:
        """Record one step in the run folder and on the screen. ``lanes``: the result of ``gather_lanes``."""
        session, folder = self.session, self.session.folder
        drift = self.drift.add(predicted_s=planned_span_s(plan), measured_s=max(outcome.span_s))
        report = make_report(
            plan, outcome, lr=lr, spec=session.data.spec, plan_wait_s=taken.wait_s,
            predicted_host_bytes=predicted_host_bytes(plan, session.cost, session.runtime.memory),
            flop_per_s=session.cost.peak_flop_per_s * session.runtime.mesh.world_size,
            drift_ratio=None if drift is None else drift.ratio,
            gradients="exact" if session.runtime.chunking is None else session.runtime.chunking.describe_gradients(),
        )
        self.metrics.append(report)
        with (folder / PLANS).open("a", encoding="utf-8") as file:
            file.write(plan_to_json(plan) + "\n")
        if outcome.ranks:
            measured = MeasuredStep(
                step=plan.step, ranks=outcome.ranks, plan_wait_s=taken.wait_s, update_s=outcome.update_s
            )
            with (folder / SPANS).open("a", encoding="utf-8") as file:
                file.write(json_line(measured_to_plain(measured)))
        if lanes:
            with (folder / LANES).open("a", encoding="utf-8") as file:
                file.write(json_line(lanes_to_plain(plan.step, lanes)))
        self.progress.step(report)
        if drift is not None and self.drift.is_news(drift):
            self.progress.note(f"drift: {drift.sentence()}; see longhaul report {folder}")


@contextmanager
def _display(session: _Session, notes: list[str]) -> Iterator[_Display | None]:
    if not session.is_main:
        yield None
        return
    folder = session.folder
    folder.mkdir(parents=True, exist_ok=True)
    for name in (PLANS, SPANS, LANES):
        keep_steps_before(folder / name, session.first_step)
    progress = Progress(session.config.run.steps, session.first_step)
    for line in notes:
        progress.note(line)
    try:
        with MetricsLog(folder / METRICS, first_step=session.first_step) as metrics:
            yield _Display(session, progress, metrics, DriftWatch(session.config.metrics.drift_factor))
    finally:
        progress.close()


def _train(session: _Session, stop: StopFlag, feed: PlanFeed | None, display: _Display | None) -> int:
    config, runtime = session.config, session.runtime
    num_steps, every = config.run.steps, config.run.checkpoint_every
    spans_every = spans_interval(
        config.metrics.spans_every, num_steps=num_steps, num_ranks=runtime.mesh.data_size
    )
    lanes_every = 0
    if _may_have_lanes(session):
        lanes_every = lanes_interval(
            config.metrics.spans_every, num_steps=num_steps, num_ranks=runtime.mesh.data_size
        )
    saved_step, stopped = session.first_step, False
    for step in range(session.first_step, num_steps):
        sample_ids, lengths = session.data.batch(step)
        taken = _take_plan(session, feed, step, lengths)
        plan = _agree(session, taken, step, lengths)
        program = compile_stage_program(runtime, plan)
        lr = learning_rate(config.optimizer, step=step, num_steps=num_steps)
        reader = SpanReader(session.data, sample_ids, runtime.mesh.device)
        recorded = is_recorded(step, every=spans_every, num_steps=num_steps) and runtime.mesh.num_stages == 1
        places = microbatch_places(plan) if recorded else ()
        records_lanes = recorded and is_recorded(step, every=lanes_every, num_steps=num_steps)
        runtime.memory.record(records_lanes)
        outcome = train_step(
            runtime, program, reader, num_tokens=plan.num_tokens, lr=lr, stop=stop.requested, places=places
        )
        stopped = outcome.stop_requested
        lanes = gather_lanes(runtime.memory, runtime.mesh) if records_lanes else []
        if display is not None and isinstance(taken, PlanTaken):
            display.step(plan, outcome, taken, lr, lanes)
        if stopped or step + 1 == num_steps or (every and (step + 1) % every == 0):
            _save(session, step + 1)
            saved_step = step + 1
        if stopped:
            break
    _finish(session, display, saved_step)
    return EXIT_PREEMPTED if stopped and saved_step < num_steps else EXIT_OK


def _may_have_lanes(session: _Session) -> bool:
    """Whether any activation may be swapped or recomputed; the same on every rank."""
    memory = session.runtime.memory
    return memory.tier is not None or not memory.policy.keeps_all or len(session.limits.policies) > 1


def _take_plan(
    session: _Session, feed: PlanFeed | None, step: int, lengths: tuple[int, ...]
) -> PlanTaken | InfeasibleError | None:
    """On rank 0, this step's plan (or why there is none), after requesting the next ones; None on other ranks."""
    if feed is None:
        return None
    plan = session.config.plan
    for later in range(step, min(step + 1 + plan.ahead, session.config.run.steps)):
        feed.submit(later, session.data.batch(later)[1])
    try:
        return feed.take(step, lengths, plan.wait_budget_s)
    except InfeasibleError as error:
        return error


def _agree(
    session: _Session, taken: PlanTaken | InfeasibleError | None, step: int, lengths: tuple[int, ...]
) -> StepPlan:
    mesh = session.runtime.mesh
    problem = StepProblem(lengths=lengths, num_ranks=mesh.data_size, cost=session.cost, limits=session.limits)

    def verify(plan: StepPlan) -> None:
        verify_plan(plan, problem)

    offered = taken.plan if isinstance(taken, PlanTaken) else taken
    return agree_on_plan(offered, source=0, group=mesh.control_group, verify=verify)


def _save(session: _Session, next_step: int) -> None:
    state = TrainingState(
        next_step=next_step,
        ledger=to_plain(session.data.ledger.position(next_step)),
        run=run_identity(session.config, session.data.spec),
    )
    folder = session.folder / CHECKPOINTS
    save_checkpoint(session.runtime, folder, state, keep=session.config.run.keep_checkpoints)


def _finish(session: _Session, display: _Display | None, next_step: int) -> None:
    """Write ``summary.json`` with the next step and the hash of the weights, and report it. Collective."""
    digest = weights_digest(session.runtime)
    if display is None:
        return
    num_steps, entropy = session.config.run.steps, session.data.store.meta.unigram_entropy_nats
    records = read_metrics(session.folder / METRICS)  # a resumed run may have had no step left to run
    loss = records[-1]["loss"] if records else None
    summary = {"next_step": next_step, "loss": loss, "unigram_entropy_nats": entropy, "weights_sha256": digest}
    (session.folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    refit, path = refit_cost(session.cost, read_executed(session.folder)), session.folder / REFIT
    if refit is not None and path.resolve() != Path(session.config.plan.cost).resolve():  # else resumed plans change
        path.write_text(json.dumps(to_plain(refit.cost), indent=1) + "\n", encoding="utf-8")
    if session.runtime.memory.arena is not None:
        display.progress.note(session.runtime.memory.arena.describe())
    display.progress.note(
        f"{'done' if next_step == num_steps else 'stopped'}: {next_step} of {num_steps} steps, "
        + ("" if loss is None else f"loss {loss:.3f} (unigram entropy {entropy:.3f}), ")
        + f"weights sha256 {digest[:16]}, run folder {session.folder}"
    )
