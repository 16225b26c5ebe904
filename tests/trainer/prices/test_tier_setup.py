"""From settings and measured speeds to a memory policy: rounding, and the same fractions again after a resume."""

from __future__ import annotations

import dataclasses
import json

import pytest

from memory.policy import ActivationPolicy
from planner.addresses.swap_fractions import solve_fractions
from planner.codec import from_plain
from tests.planner.addresses.test_swap_fractions import memo_7b
from tests.ranks import RankPool
from tests.trainer.step.test_one_step import SMALL
from trainer.build import build_runtime
from trainer.model.transformer import STEPS
from trainer.prices.layer_profile import profile_layer
from trainer.prices.tier_setup import POLICY_FILE, _stored_or_solved
from trainer.rank_env import RankEnv
from trainer.settings.tree import MemoryConfig, RunConfig, TrainConfig


def settings(folder, *, resume=False, fraction=None):
    return TrainConfig(
        run=RunConfig(dir=str(folder), resume=resume), memory=MemoryConfig(policy="swap", swap_fraction=fraction)
    )


def policy_of(answer):
    return from_plain(ActivationPolicy, json.loads(answer)["policy"], where="answer")


def test_fractions_are_the_program_s_rounded_down(tmp_path):
    problem = memo_7b(num_tokens=2**20, tier_gib=2048)
    plan, policy = solve_fractions(problem), policy_of(_stored_or_solved(settings(tmp_path), problem, 128))
    assert policy.swap_pair and policy.row_multiple == 128
    for tensor, wanted, (name, swap, keep) in zip(problem.tensors, plan.swap_fractions, policy.by_step, strict=True):
        assert name == tensor.name and wanted - 1 / 32 < swap <= wanted + 1e-9 and keep == 0
    assert (tmp_path / POLICY_FILE).exists()


@pytest.mark.parametrize("damage", [None, "", "{}", '{"key": 3}'])
def test_a_resumed_run_goes_on_with_its_fractions(tmp_path, damage):
    slow, fast = memo_7b(num_tokens=2**16, tier_gib=2048), memo_7b(num_tokens=2**19, tier_gib=10**5)
    began = policy_of(_stored_or_solved(settings(tmp_path), slow, 1))
    if damage is not None:
        (tmp_path / POLICY_FILE).write_text(damage)
    resumed = _stored_or_solved(settings(tmp_path, resume=True), fast, 1)
    if damage is None:
        assert policy_of(resumed) == began and "as the run began" in json.loads(resumed)["how"]
    else:
        assert policy_of(resumed) != began, "measured again"


def test_other_memory_settings_are_solved_again(tmp_path):
    slow, fast = memo_7b(num_tokens=2**16, tier_gib=2048), memo_7b(num_tokens=2**19, tier_gib=10**5)
    began = policy_of(_stored_or_solved(settings(tmp_path), slow, 1))
    changed = settings(tmp_path, resume=True)
    changed = dataclasses.replace(changed, memory=dataclasses.replace(changed.memory, tier_budget="1 TiB"))
    assert policy_of(_stored_or_solved(changed, fast, 1)) != began


def profile(rank, world_size, init_method, mlp_chunk_tokens):
    config = TrainConfig(
        run=RunConfig(world_size=world_size), memory=MemoryConfig(policy="keep", mlp_chunk_tokens=mlp_chunk_tokens)
    )
    env = RankEnv(rank=rank, world_size=world_size, local_rank=rank, local_world_size=world_size)
    return profile_layer(build_runtime(config, env, SMALL, init_method=init_method), num_tokens=64)


def test_the_program_is_told_what_an_mlp_in_pieces_saves():
    pool = RankPool(1)
    try:
        whole, pieces = (pool.run(profile, chunk_tokens)[0] for chunk_tokens in (0, 24))
    finally:
        pool.close()
    assert tuple(tensor.name for tensor in whole.tensors) == STEPS
    assert tuple(tensor.name for tensor in pieces.tensors) == (*STEPS[:3], "mlp")
    same = [[tensor.bytes_per_token for tensor in profile.tensors[:3]] for profile in (whole, pieces)]
    assert same[0] == same[1]
    assert pieces.tensors[3].bytes_per_token == 0 < sum(t.bytes_per_token for t in whole.tensors[3:])
    assert pieces.pair_bytes_per_token == whole.pair_bytes_per_token
