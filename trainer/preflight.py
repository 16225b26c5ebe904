"""What can be found wrong before any process starts: data, world size, run folder. No torch."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from planner.errors import SpecError
from trainer.config import RunConfig, TrainConfig
from trainer.training_data import open_training_data

CHECKPOINTS = "checkpoints"


def preflight(config: TrainConfig, cache_root: Path) -> None:
    """Open the corpus (tokenising it once, so that the ranks only map it) and check the run against it.

    Raises SpecError in one line each: no data, more ranks than sequences, a run folder that already holds a run.
    """
    data = open_training_data(config, cache_root)
    data_ranks = config.run.world_size // config.parallel.tensor_parallel
    if data_ranks > len(data.samples):
        raise SpecError(
            f"the corpus has {len(data.samples)} sequences for {data_ranks} data ranks: "
            "lower --world-size or give more data with --data"
        )
    saved = saved_steps(Path(config.run.dir))
    if saved and not config.run.resume:
        raise SpecError(
            f"{config.run.dir} already holds a run (checkpoint at step {saved[-1]}): "
            "add --resume to go on, or --run-dir for a new one"
        )


def saved_steps(run_dir: Path) -> list[int]:
    """Steps of the checkpoints in a run folder, ascending (not verified)."""
    names = [path.name for path in (run_dir / CHECKPOINTS).glob("step-*") if path.suffix != ".tmp"]
    return sorted(int(name.removeprefix("step-")) for name in names if name.removeprefix("step-").isdigit())


def with_free_run_dir(config: TrainConfig) -> TrainConfig:
    """Zero flags must work twice: a default run folder that is taken becomes the next free ``-2``, ``-3``, ..."""
    default = RunConfig().dir
    if config.run.dir != default or config.run.resume:
        return config
    candidate, number = default, 1
    while saved_steps(Path(candidate)):
        number += 1
        candidate = f"{default}-{number}"
    return dataclasses.replace(config, run=dataclasses.replace(config.run, dir=candidate))
