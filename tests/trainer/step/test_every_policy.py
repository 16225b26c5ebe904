"""Every memory policy with every strategy on every grid of four ranks gives the dense model's losses and weights, in
fp32 to 1e-5. Where plans choose no policy, a run with ``auto`` keeps everything and says why. (What settings refuse is
in ``test_config``.)"""

from __future__ import annotations

import itertools

import pytest

from planner.pages.policy_reasons import POLICY_STRATEGIES
from planner.step_planner import STRATEGIES
from tests.ranks import RankPool
from tests.trainer.step import dense_runs as runs
from trainer.settings.tree import MemoryConfig

NUM_RANKS, NUM_STEPS, LONGEST = 4, 2, 150
"""Both steps hold one sequence of 150 tokens, which no rank alone has room for, and six shorter ones."""
GRIDS = {
    "gather_once": runs.DATA, "zero3": runs.ZERO3, "tensor 2": runs.TENSOR_2, "stages 2": runs.STAGES_2,
}
POLICIES = {
    "keep": None, "half swapped, half recomputed": runs.HALF, "recompute": MemoryConfig(policy="recompute"),
    "seco": runs.SECO_16, "auto": runs.ON_DISK,
}
BY_DAY = {("megatron", "gather_once", "seco"), ("zeppelin", "zero3", "recompute"), ("hdp-pp", "stages 2", "seco")}


CASES = [
    pytest.param(*case, marks=() if case in BY_DAY else pytest.mark.nightly)
    for case in itertools.product(STRATEGIES, GRIDS, POLICIES)
]


@pytest.fixture(scope="module")
def pool():
    pool = RankPool(NUM_RANKS)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def oracle(pool):
    return runs.dense_run(pool, runs.DEEP, NUM_STEPS)


@pytest.mark.parametrize(("strategy", "grid", "policy"), CASES)
def test_every_policy_with_every_strategy_on_every_grid(pool, oracle, tmp_path, strategy, grid, policy):
    parallel, memory, options = GRIDS[grid], POLICIES[policy], {}
    data_ranks = parallel.data_ranks(NUM_RANKS)
    budget = parallel.pipeline_parallel * (2 * LONGEST // data_ranks + 30)
    if policy == "auto":
        options["activation"] = runs.ACTIVATION
        # a stage of two layers can recompute, but has none to swap
        able = strategy in POLICY_STRATEGIES if grid != "stages 2" else strategy == "adaptive"
        if able:  # kept, the longest would need more ranks than there are
            budget = parallel.pipeline_parallel * (LONGEST // data_ranks - 8)
    plans = (parallel, strategy, None, (*runs.ULYSSES, *runs.RING), budget)
    run = pool.run(runs.train_rank, *plans, runs.DEEP, NUM_STEPS, memory, tmp_path, options)
    losses, final, used = run[0]
    runs.compare(oracle, losses, final)
    if policy == "auto":
        note = next(words for name, words in used if name == "note")
        chosen = any(action in ("swap", "recompute") for action, _ in used)
        assert chosen == able, used
        if strategy not in POLICY_STRATEGIES:
            assert note.startswith(f"memory: all activations kept: {strategy} chooses no memory policies (")
