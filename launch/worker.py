"""One rank's process: ``python -m launch.worker CONFIG.yaml LAUNCHER_PID``, started by ``launch.local``.

Under plain torchrun the command line calls ``run`` and ``leave`` itself. The reason for a failure is written to the
file that torch's elastic launcher names, in its own format, so that either launcher can say which rank failed and why.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from launch import environment
from launch.console import error_lines
from planner.errors import EXIT_OK, EXIT_PREEMPTED, LonghaulError
from trainer.rank_env import RankEnv
from trainer.settings.resolve import load_recipe
from trainer.settings.tree import TrainConfig

Work = Callable[[TrainConfig, RankEnv], int]

EXIT_FAILURE = 1
EXIT_INTERRUPTED = 128 + signal.SIGINT
TRACEBACK_FILE = "traceback.txt"
_PR_SET_PDEATHSIG = 1


def main(work: Work | None = None) -> NoReturn:
    """Run the rank that the environment names, with the configuration that the launcher wrote. ``work``: what the rank
    does (default: train)."""
    try:
        config_path, launcher_pid = sys.argv[1:]
        env = environment.detect()
    except ValueError:
        sys.exit("longhaul: error: launch.worker is started by `longhaul train`: expected CONFIG.yaml LAUNCHER_PID")
    if env is None:
        sys.exit("longhaul: error: launch.worker is started by `longhaul train`: RANK is not set")
    die_with_parent(int(launcher_pid))
    leave(run(Path(config_path), env, is_watched=True, work=work))


def run(config: TrainConfig | Path, env: RankEnv, *, is_watched: bool, work: Work | None = None) -> int:
    """Train (or do other ``work``) as rank ``env.rank`` and return the exit code.

    ``config``: the configuration, or the path of a resolved one. ``is_watched``: our own launcher reads the failure
    file and reports; otherwise rank 0 reports on stderr. An unexpected exception is reported in the same way, and the
    exception hook ends the process.
    """

    def report_unexpected(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> NoReturn:
        text = "".join(traceback.format_exception(kind, error, trace))
        _report(f"{kind.__name__}: {error}", EXIT_FAILURE, trace=text)
        if not is_watched:
            print(text, file=sys.stderr)
        leave(EXIT_FAILURE)

    sys.excepthook = report_unexpected
    settings = environment.rank_process_settings(
        local_world_size=env.local_world_size,
        is_single_node=env.is_single_node,
        num_cores=environment.num_cores(),
    )
    environment.apply(settings)
    try:
        if isinstance(config, Path):
            config = load_recipe(str(config))
        code = (work or _train)(config, env)
    except LonghaulError as error:
        trace = "".join(traceback.format_exception(error))
        _report(str(error), error.exit_code, trace=trace)
        if not is_watched and env.rank == 0:
            print(error_lines(error), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    if code != EXIT_OK:
        _report("stopped and saved" if code == EXIT_PREEMPTED else f"ended with exit code {code}", code)
    return code


def _train(config: TrainConfig, env: RankEnv) -> int:
    # Imported here because torch reads environment variables at import, and run() sets them before.
    # megatron-core warns once per module, and gives advice for GPUs on CPUs too
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex")
    warnings.filterwarnings("ignore", message="When using async grad allreduce")
    from trainer.loop import run_rank

    return run_rank(config, env, cache_root=environment.cache_root())


def _report(message: str, code: int, *, trace: str = "") -> None:
    """Write the reason of a nonzero exit where torch's launcher looks for it. The file is replaced atomically, because
    the launcher must never read half of it."""
    path = environment.error_file()
    if path is None or not path.parent.is_dir():
        return
    now_s = time.time()
    reason = {
        "message": message,
        "errorCode": code,
        "time_s": now_s,
        "extraInfo": {"py_callstack": trace or message, "timestamp": str(int(now_s))},
    }
    if trace:
        path.with_name(TRACEBACK_FILE).write_text(trace, encoding="utf-8")
    replacement = path.with_name(path.name + ".new")
    replacement.write_text(json.dumps({"message": reason}), encoding="utf-8")
    replacement.replace(path)


def die_with_parent(parent_pid: int | None = None) -> None:
    """Ask Linux to kill this process when its parent ends, so that no rank outlives a killed launcher.

    ``parent_pid``: also end now if the parent is already gone. Does nothing on other systems.
    """
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent_pid is not None and os.getppid() != parent_pid:
        os._exit(EXIT_FAILURE)


def leave(code: int) -> NoReturn:
    """End the process with ``code``.

    After a failure it skips the interpreter's shutdown, in which an open process group would abort (SIGABRT) and hide
    the code.
    """
    if code == EXIT_OK:
        sys.exit(code)
    for child in multiprocessing.active_children():
        child.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
