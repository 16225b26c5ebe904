"""Runs all ranks on this machine through torch's elastic launcher, and prints one clear line if one of them fails."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from launch import environment
from launch.worker import EXIT_FAILURE, EXIT_INTERRUPTED, TRACEBACK_FILE
from planner.errors import (
    EXIT_BAD_CONFIG,
    EXIT_DO_NOT_REQUEUE,
    EXIT_INFEASIBLE,
    EXIT_NO_CHECKPOINT,
    EXIT_NUMERIC,
    EXIT_OK,
    EXIT_PREEMPTED,
    SpecError,
)
from trainer.stop_flag import HandledSignals

if TYPE_CHECKING:
    from torch.distributed.launcher.api import LaunchConfig

    from trainer.settings.tree import TrainConfig

# Codes that a script can act on. The highest wins: "do not requeue" from one rank outweighs "saved" from another.
KNOWN_CODES = frozenset(
    {EXIT_BAD_CONFIG, EXIT_PREEMPTED, EXIT_DO_NOT_REQUEUE, EXIT_INFEASIBLE, EXIT_NUMERIC, EXIT_NO_CHECKPOINT}
)
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)
# torch's agent polls ten times a second and kills ranks that do not stop within 30 s of the first failure. A rank found
# dead earlier than this was not killed by the agent.
_AGENT_KILLS_AFTER_S = 20.0
_OUTSIDE_SIGNALS = (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL)
_SHOW_CURSOR = "\x1b[?25h"


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFailure:
    """How one rank ended. ``exit_code`` is negative for a signal; ``message`` is empty if the rank left none."""

    rank: int
    exit_code: int
    time_s: float
    message: str
    traceback_path: Path | None = None
    log_path: Path | None = None


def launch(config: TrainConfig, *, worker_module: str = "launch.worker") -> int:
    """Start ``config.run.world_size`` ranks, wait for them, and return the command's exit code.

    Ctrl-C, SIGTERM, SIGHUP, SIGQUIT and SIGUSR1 reach the ranks as SIGTERM: they finish the step, save and exit with
    75, and so does this process. A second Ctrl-C stops at once. Rank 0 writes to this terminal; stdout and stderr of
    the others go to ``RUN_DIR/logs``. Raises SpecError if the run folder cannot be written.
    """
    config_path = write_config(config)
    logs_dir = config_path.parent / "logs"
    settings = environment.rank_process_settings(
        local_world_size=config.run.world_size, is_single_node=True, num_cores=environment.num_cores()
    )
    environment.apply(settings)
    # Imported here because torch reads environment variables at import.
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    _silence_agent()
    run_id = f"start-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    run_ranks = elastic_launch(_agent_config(config.run.world_size, logs_dir, run_id), sys.executable)
    with StopSignals(SignalException) as stop:
        try:
            run_ranks("-m", worker_module, str(config_path), str(os.getpid()))
            return EXIT_OK
        except ChildFailedError as error:
            folders = _rank_folders(logs_dir, run_id)
            failures = [_from_agent(rank, failure, folders.get(rank)) for rank, failure in error.failures.items()]
        except SignalException:
            # After a signal the agent passes no exit codes on; the ranks' own files say how they ended.
            failures = reported_failures(_rank_folders(logs_dir, run_id))
        finally:
            _restore_terminal()
    code = exit_code_of(failures, stopped_by=stop.received)
    _tell(code, failures, run_dir=config_path.parent, stopped_by=stop.received)
    return code


def write_config(config: TrainConfig) -> Path:
    """Write ``RUN_DIR/config.yaml``, every setting resolved, and return its path. Raises SpecError.

    Paths in it are absolute, so that the run can be resumed with that file from another folder.
    """
    from trainer.settings.resolve import config_to_yaml

    path = Path(config.run.dir).absolute() / "config.yaml"
    config = _with_absolute_paths(config, run_dir=path.parent)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(config_to_yaml(config), encoding="utf-8")
    except OSError as error:
        raise SpecError(f"--run-dir {config.run.dir}: cannot be written ({error.strerror})") from None
    return path


def _with_absolute_paths(config: TrainConfig, *, run_dir: Path) -> TrainConfig:
    def absolute(path: str | None) -> str | None:
        return None if path is None else str(Path(path).absolute())

    model, data, plan = config.model, config.data, config.plan
    preset = model.preset if not model.preset.endswith((".yaml", ".yml")) else str(Path(model.preset).absolute())
    cost = plan.cost if plan.cost == "auto" else str(Path(plan.cost).absolute())
    return dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, dir=str(run_dir)),
        model=dataclasses.replace(model, preset=preset),
        data=dataclasses.replace(
            data, path=absolute(data.path), tokenizer=absolute(data.tokenizer), cache_dir=absolute(data.cache_dir)
        ),
        plan=dataclasses.replace(plan, cost=cost),
    )


def _agent_config(world_size: int, logs_dir: Path, run_id: str) -> LaunchConfig:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.launcher.api import LaunchConfig

    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=world_size,
        run_id=run_id,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",  # otherwise torch resolves this machine's name, which may fail
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(
            log_dir=str(logs_dir), redirects={rank: Std.ALL for rank in range(1, world_size)}
        ),
        signals_to_handle="SIGUSR2",  # the agent needs at least one; StopSignals handles the others
    )


class StopSignals(HandledSignals):
    """On the first stop signal, raises the exception on which torch's agent stops the ranks with SIGTERM.

    ``received``: the first signal, or None. A second Ctrl-C ends this process, and with it the ranks, at once. Other
    repeated signals are ignored, because schedulers repeat them while the ranks save.
    """

    def __init__(self, agent_exception: type[Exception]) -> None:
        # nohup ignores SIGHUP: then the run must outlive the terminal
        nohup = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()
        super().__init__(number for number in _STOP_SIGNALS if number not in nohup)
        self._agent_exception = agent_exception
        self.received: signal.Signals | None = None

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signal.Signals(number)
            hint = " (Ctrl-C again: stop now)" if number == signal.SIGINT else ""
            # Not print: the handler may have interrupted a print to the same stream.
            os.write(2, f"\nlonghaul: {self.received.name}: stopping after this step and saving{hint}\n".encode())
            raise self._agent_exception(f"stopped by {self.received.name}", signal.SIGTERM)
        if number == signal.SIGINT:
            _restore_terminal()
            os._exit(EXIT_INTERRUPTED)  # the kernel then kills the ranks, see launch.worker.die_with_parent


def exit_code_of(failures: Iterable[RankFailure], *, stopped_by: signal.Signals | None) -> int:
    """The highest known code of any rank; else 128 + the signal that stopped the run; else 1."""
    known = KNOWN_CODES.intersection(failure.exit_code for failure in failures)
    if known:
        return max(known)
    return EXIT_FAILURE if stopped_by is None else 128 + stopped_by


def root_cause(failures: Iterable[RankFailure]) -> RankFailure | None:
    """The failure that caused the others; None without failures.

    First choice is a rank that reports a known code. Next is a rank that was killed from outside (out of memory, ``kill
    -9``, a crash), because its peers only saw the connection break; then the first rank to report. Last are ranks that
    aborted, or that the agent stopped with SIGTERM or SIGKILL.
    """
    ordered = sorted(failures, key=lambda failure: (failure.time_s, failure.rank))
    if not ordered:
        return None
    first_s = ordered[0].time_s

    def order(failure: RankFailure) -> tuple[int, int]:
        if failure.exit_code in KNOWN_CODES:
            return 0, -failure.exit_code
        if -failure.exit_code in _OUTSIDE_SIGNALS and failure.time_s < first_s + _AGENT_KILLS_AFTER_S:
            return 1, 0
        if failure.exit_code > 0:
            return 2, 0
        return 3, -failure.exit_code in (signal.SIGTERM, signal.SIGKILL)

    return min(ordered, key=order)


def describe(failure: RankFailure) -> str:
    """One line: which rank, what happened, and where to find more."""
    where = failure.traceback_path or failure.log_path
    place = f" ({'traceback' if failure.traceback_path else 'log'}: {where})" if where else ""
    if failure.message:
        what = " ".join(failure.message.split())
    elif failure.exit_code < 0:
        what = f"killed by {signal.Signals(-failure.exit_code).name}"
        if failure.exit_code == -signal.SIGKILL:
            what += " (out of memory, or kill -9)"
    else:
        what = f"ended with exit code {failure.exit_code}"
    is_expected = failure.exit_code in KNOWN_CODES and failure.message
    return f"rank {failure.rank}: {what}" + ("" if is_expected else place)


def _tell(
    code: int, failures: Iterable[RankFailure], *, run_dir: Path, stopped_by: signal.Signals | None
) -> None:
    if code == EXIT_PREEMPTED:
        line = f"stopped and saved; go on with: longhaul train {run_dir / 'config.yaml'} --resume"
    elif stopped_by is not None and code == 128 + stopped_by:
        line = f"stopped by {stopped_by.name} before the ranks could save"
    else:
        root = root_cause(failures)
        line = "error: " + ("the ranks failed and left no message" if root is None else describe(root))
    print(f"longhaul: {line}", file=sys.stderr)


def reported_failures(folders: Mapping[int, Path]) -> list[RankFailure]:
    """The reports that ranks left in their folders. Ranks that succeeded or left no report are not included."""
    found = []
    for rank, folder in folders.items():
        path = folder / "error.json"
        if path.exists():
            found.append(_from_reason(rank, json.loads(path.read_text(encoding="utf-8"))["message"], folder))
    return found


def _rank_folders(logs_dir: Path, run_id: str) -> dict[int, Path]:
    """This launch's log folder of each rank, as torch's DefaultLogsSpecs names them."""
    return {int(path.name): path for path in sorted(logs_dir.glob(f"{run_id}_*/attempt_0/*")) if path.is_dir()}


def _from_agent(rank: int, failure: Any, folder: Path | None) -> RankFailure:
    """``failure``: torch's ProcessFailure. If the rank wrote an error file, its content has our own format."""
    reason = failure.error_file_data.get("message")
    if folder is not None and isinstance(reason, dict) and "time_s" in reason:
        return _from_reason(rank, reason, folder)
    log_path = None if folder is None else folder / "stderr.log"
    return RankFailure(
        rank=rank,
        exit_code=failure.exitcode,
        time_s=float(failure.timestamp),
        message="",
        log_path=log_path if log_path is not None and log_path.exists() else None,
    )


def _from_reason(rank: int, reason: dict[str, Any], folder: Path) -> RankFailure:
    trace = folder / TRACEBACK_FILE
    return RankFailure(
        rank=rank,
        exit_code=reason["errorCode"],
        time_s=reason["time_s"],
        message=reason["message"],
        traceback_path=trace if trace.exists() else None,
    )


def _silence_agent() -> None:
    """torch's agent logs each signal and failure over many lines; ``_tell`` reports them in one."""
    agent_log = logging.getLogger("torch.distributed.elastic")
    agent_log.addHandler(logging.NullHandler())
    agent_log.propagate = False


def _restore_terminal() -> None:
    """Show the cursor again, which rank 0 hides under its live panel and cannot restore if it is killed."""
    if sys.stdout.isatty():
        os.write(1, _SHOW_CURSOR.encode())
