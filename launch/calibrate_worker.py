"""One rank of ``longhaul calibrate``: like ``launch.worker``, but it measures instead of training."""

from __future__ import annotations

from launch.worker import main
from trainer.rank_env import RankEnv
from trainer.settings.tree import TrainConfig


def _calibrate(config: TrainConfig, env: RankEnv) -> int:
    # Imported here because torch reads environment variables at import, and the worker must set them before.
    from trainer.calibrate_run import calibrate_rank

    return calibrate_rank(config, env)


if __name__ == "__main__":
    main(_calibrate)
