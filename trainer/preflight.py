"""Finds problems before any process starts: data, world size, run folder, cost file. Does not import torch."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from planner.codec import from_plain
from planner.errors import SpecError
from planner.units import parse_bytes
from trainer.checkpoint.manifests import CHECKPOINTS, check_same_run, list_checkpoints, newest_checkpoint, run_identity
from trainer.data.ledger import LedgerPosition
from trainer.data.training_data import TrainingData, open_training_data
from trainer.prices.plan_inputs import (
    load_run_cost,
    measures_policies,
    plan_limits,
    plans_policies,
    require_longest_fits,
    with_policies,
)
from trainer.settings.tree import RunConfig, TrainConfig

_NO_BUDGET_BYTES = 2**62


def preflight(config: TrainConfig, cache_root: Path) -> None:
    """Open the corpus and check the run against it. Tokenises the corpus, so that the ranks only need to map it.

    Raises the errors that the ranks would raise later. SpecError: no data, more ranks than sequences, a run folder that
    already holds a run, or a cost file that does not fit. InfeasibleError: a sequence that fits no group.
    CheckpointError: a resume without a checkpoint, or with other settings than those it was saved with.
    """
    data = open_training_data(config, cache_root)
    data_ranks = config.parallel.data_ranks(config.run.world_size)
    if data_ranks > len(data.samples):
        raise SpecError(
            f"the corpus has {len(data.samples)} sequences for {data_ranks} data ranks: "
            "lower --world-size or give more data with --data"
        )
    _check_run_folder(config, data)
    _check_cost_file(config, data, data_ranks)


def _check_run_folder(config: TrainConfig, data: TrainingData) -> None:
    folder = Path(config.run.dir) / CHECKPOINTS
    if config.run.resume:
        # Checks only the manifests. The ranks hash the files and skip checkpoints that are damaged.
        path, manifest, _ = newest_checkpoint(folder, verify=False)
        check_same_run(path, manifest["run"], run_identity(config, data.spec))
        data.ledger.restore(from_plain(LedgerPosition, manifest["ledger"], where=str(path)))
        return
    saved = list_checkpoints(folder)
    if saved:
        raise SpecError(
            f"{config.run.dir} already holds a run ({saved[-1].name}): "
            "add --resume to continue it, or --run-dir for a new one"
        )


def _check_cost_file(config: TrainConfig, data: TrainingData, data_ranks: int) -> None:
    """Check a given cost file. What the ranks measure themselves (cost, memory) cannot be checked here."""
    if config.plan.cost == "auto":
        return
    budget = config.plan.device_budget
    budget_bytes = _NO_BUDGET_BYTES if budget == "auto" else parse_bytes(budget, what="--plan.device-budget")
    cost, limits = load_run_cost(config), plan_limits(config, data.spec, device_budget_bytes=budget_bytes)
    if plans_policies(config):
        if measures_policies(cost):
            return
        limits = with_policies(limits, host_budget_bytes=_NO_BUDGET_BYTES)
    require_longest_fits(config, data, data_ranks, cost, limits)


def with_free_run_dir(config: TrainConfig) -> TrainConfig:
    """If the default run folder is taken, use the next free ``-2``, ``-3``, ... so that zero flags work repeatedly."""
    default = RunConfig().dir
    if config.run.dir != default or config.run.resume:
        return config
    candidate, number = default, 1
    while list_checkpoints(Path(candidate) / CHECKPOINTS):
        number += 1
        candidate = f"{default}-{number}"
    return dataclasses.replace(config, run=dataclasses.replace(config.run, dir=candidate))
