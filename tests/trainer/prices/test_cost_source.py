"""When memory may bind: blocks are then mapped one by one, for plans turn on predicted peaks."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from planner.inputs.files import load_model
from planner.units import MIB
from trainer import build
from trainer.prices.cost_source import memory_may_bind, own_budget_bytes
from trainer.rank_env import RankEnv
from trainer.settings.tree import DataConfig, MemoryConfig, PlanConfig, RunConfig, TrainConfig

SPEC = dataclasses.replace(load_model("tiny"), num_layers=2)


def settings(*, tokens=4096, policy="keep", budget="auto"):
    return TrainConfig(
        run=RunConfig(dir="unused", world_size=1, device="cpu"),
        data=DataConfig(max_length=tokens, tokens_per_step=tokens), plan=PlanConfig(device_budget=budget),
        memory=MemoryConfig(policy=policy),
    )


def test_memory_binds_where_a_step_is_not_far_below_the_budget():
    held = SPEC.num_layers * SPEC.saved_bytes_per_token(4) * 4096 + 20 * SPEC.num_params
    assert memory_may_bind(settings(), SPEC, 2 * held - 1)
    assert not memory_may_bind(settings(), SPEC, 2 * held + 1)
    assert memory_may_bind(settings(tokens=8192), SPEC, 2 * held + 1)


def test_the_budget_is_what_was_asked_for_or_a_share_of_the_machine():
    assert own_budget_bytes(settings(budget="3 MiB"), torch.device("cpu"), 2) == 3 * MIB
    alone, shared = (own_budget_bytes(settings(), torch.device("cpu"), ranks) for ranks in (1, 2))
    assert alone // 2 - 1 <= shared <= alone // 2 + 1


@pytest.mark.parametrize(
    ("policy", "budget", "fine"),
    [("keep", "100 GiB", False), ("keep", "1 MiB", True), ("auto", "100 GiB", False), ("auto", "1 MiB", True),
     ("recompute", "100 GiB", True)],
)
def test_blocks_are_mapped_finely_where_memory_may_bind(monkeypatch, policy, budget, fine):
    def stop(*, fine):
        raise _AskedFor(fine)

    monkeypatch.setattr(build, "map_large_blocks", stop)
    env = RankEnv(rank=0, world_size=1, local_rank=0, local_world_size=1)
    with pytest.raises(_AskedFor) as asked:
        build.build_runtime(settings(tokens=64, policy=policy, budget=budget), env, SPEC)
    assert asked.value.args == (fine,)


class _AskedFor(Exception):
    """What ``build_runtime`` wanted before it made anything."""
