"""One rank of ``longhaul calibrate``: as ``launch.worker``, but it measures instead of training."""

from __future__ import annotations

from launch.worker import main
from trainer.rank_env import RankEnv
from trainer.settings.tree import TrainConfig


def _calibrate(config: TrainConfig, env: RankEnv) -> int:
    # Imported here: torch reads its variables when it is imported, and the worker sets them first.
    from trainer.calibrate_run import calibrate_rank

    return calibrate_rank(config, env)


if __name__ == "__main__":
    main(_calibrate)
