"""A rank that behaves as the file ``behaviour`` in its run folder says, in place of training; the rest is real."""

import os
import signal
import time
from pathlib import Path

from launch import worker
from planner.errors import EXIT_PREEMPTED, NumericError
from trainer.rank_env import RankEnv
from trainer.settings.tree import TrainConfig


def behave(config: TrainConfig, env: RankEnv) -> int:
    run_dir = Path(config.run.dir)
    behaviour = (run_dir / "behaviour").read_text()
    (run_dir / f"pid-{env.rank}").write_text(str(os.getpid()))
    if behaviour == "bug" and env.rank == 1:
        raise RuntimeError("boom\nsecond line")
    if behaviour == "numeric":
        raise NumericError("loss is not finite at step 7")
    if behaviour == "killed":
        if env.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.2)
        raise RuntimeError("connection closed by peer")
    if behaviour in ("save", "deaf"):
        return _wait_for_stop(run_dir, env, is_deaf=behaviour == "deaf")
    if behaviour == "bug":
        time.sleep(60)
    return 0


def _wait_for_stop(run_dir: Path, env: RankEnv, *, is_deaf: bool) -> int:
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
    (run_dir / f"ready-{env.rank}").touch()
    while is_deaf or not stopped:
        time.sleep(0.02)
    (run_dir / f"saved-{env.rank}").touch()
    return EXIT_PREEMPTED


if __name__ == "__main__":
    worker.main(behave)
