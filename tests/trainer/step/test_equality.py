"""fp32: whatever the strategy, group shape, sharding, tensor or pipeline parallelism, the run equals a plain dense
model's, to 1e-5. Runs that swap, recompute or train in chunks are in ``test_memory_equality``."""

from __future__ import annotations

import dataclasses

import pytest

from planner.plan import AttentionKind
from tests.ranks import RankPool
from tests.trainer.step.dense_runs import (
    DATA,
    DAY_STEPS,
    MOVED,
    NUM_STEPS,
    REPLICAS_2,
    REPLICAS_4,
    RING,
    SPEC,
    STAGES_2,
    STAGES_2_TENSOR_2,
    TENSOR_2,
    ULYSSES,
    ZERO3,
    ZERO3_TENSOR_2,
    DenseRuns,
    compare,
    day_and_night,
    train_rank,
)
from trainer.settings.tree import ParallelConfig

RUNS = {
    "1 rank": (1, DATA, "static", 1, ULYSSES, 2**40, {("local", 1)}),
    "4 ranks flexsp": (4, DATA, "flexsp", None, ULYSSES, 60, {("local", 1), ("ulysses", 2), ("ulysses", 4)}),
    "4 ranks ulysses 2": (4, DATA, "static", 2, ULYSSES, 2**40, {("ulysses", 2)}),
    "4 ranks ulysses 4 (2 kv heads)": (4, DATA, "static", 4, ULYSSES, 2**40, {("ulysses", 4)}),
    "4 ranks ring 3+1": (4, DATA, "static", 3, RING, 2**40, {("ring", 3), ("local", 1)}),
    "4 ranks adaptive": (4, DATA, "adaptive", None, (*ULYSSES, *RING), 60, {("local", 1)}),
    "4 ranks hdp": (4, DATA, "hdp", None, RING, 60, {("local", 1), ("ring", 2)}),
    "4 ranks zeppelin": (4, DATA, "zeppelin", None, RING, 60, {("local", 1)}),
    "4 ranks megatron": (4, DATA, "megatron", None, RING, 60, {("local", 1)}),
    "4 ranks usp 2 x 2": (4, DATA, "static", 4, (AttentionKind.USP,), 2**40, {("usp", 4)}),
    "4 ranks double ring 2 x 2": (4, DATA, "static", 4, (AttentionKind.DOUBLE_RING,), 2**40, {("double_ring", 4)}),
    "4 ranks group-cast 3+1": (4, DATA, "static", 3, (AttentionKind.GROUP_CAST,), 2**40, {("group_cast", 3)}),
    "4 ranks all-gather": (4, DATA, "static", 4, (AttentionKind.ALL_GATHER,), 2**40, {("all_gather", 4)}),
    "4 ranks routed ring 2 x 2": (4, DATA, "static", 4, (AttentionKind.ROUTED_RING,), 2**40, {("routed_ring", 4)}),
    "4 ranks zeppelin remap": (4, DATA, "zeppelin", None, RING, 60, {("local", 1), (MOVED, 4)}),
    "pipeline 2 x data 2 zeppelin remap": (4, STAGES_2, "zeppelin", None, RING, 160, {("local", 1), (MOVED, 2)}),
    "pipeline 2 x data 2": (4, STAGES_2, "flexsp", None, ULYSSES, 160, {("local", 1), ("ulysses", 2)}),
    "pipeline 2 x data 2 hdp": (4, STAGES_2, "hdp", None, RING, 160, {("local", 1), ("ring", 2)}),
    "pipeline 2 x data 2 hdp-pp": (4, STAGES_2, "hdp-pp", None, RING, 160, {("local", 1), ("ring", 2)}),
    "pipeline 2 x tensor 2": (4, STAGES_2_TENSOR_2, "static", 1, ULYSSES, 2**40, {("local", 1)}),
    "2 replicas of 2": (4, REPLICAS_2, "flexsp", None, ULYSSES, 60, {("local", 1), ("ulysses", 4)}),
    "4 replicas": (4, REPLICAS_4, "flexsp", None, ULYSSES, 60, {("local", 1), ("ulysses", 4)}),
    "zero3 flexsp": (4, ZERO3, "flexsp", None, ULYSSES, 60, {("local", 1), ("ulysses", 4)}),
    "zero3 hdp": (4, ZERO3, "hdp", None, RING, 60, {("local", 1), ("ring", 2)}),
    "zero3 x tensor 2": (4, ZERO3_TENSOR_2, "adaptive", None, RING, 90, {("local", 1), ("ring", 2)}),
    "tensor 2 x data 2": (4, TENSOR_2, "static", 2, ULYSSES, 2**40, {("ulysses", 2)}),
}



COST_OPTIONS = {
    "4 ranks routed ring 2 x 2": {"node_size": 2},
    "4 ranks zeppelin remap": {"with_remap": True},
    "pipeline 2 x data 2 zeppelin remap": {"with_remap": True},
}
STRATEGIES = ("flexsp", "adaptive", "hdp", "zeppelin", "megatron", "static")


@pytest.fixture(scope="module")
def pool():
    pool = RankPool(4)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def large_pool():
    pool = RankPool(8)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def dense_runs(pool):
    return DenseRuns(pool)


@pytest.mark.parametrize(("name", "num_steps"), day_and_night(RUNS))
def test_equals_dense_model(pool, dense_runs, name, num_steps):
    world_size, *arguments, shapes = RUNS[name]
    results = pool.run(
        train_rank, *arguments, SPEC, num_steps, None, None, COST_OPTIONS.get(name), world_size=world_size
    )
    losses, final, used = results[0]
    assert all(others == losses for others, *_ in results), "ranks report different losses"
    assert shapes <= used
    compare(dense_runs(SPEC, num_steps), losses, final)


def test_tied_head_under_tensor_parallelism(pool, dense_runs):
    spec = dataclasses.replace(SPEC, tied_head=True, qk_norm=False)
    losses, final, _ = pool.run(train_rank, TENSOR_2, "static", 2, RING, 2**40, spec, DAY_STEPS)[0]
    compare(dense_runs(spec, DAY_STEPS), losses, final)


@pytest.mark.nightly
@pytest.mark.parametrize("num_stages", [1, 2])
@pytest.mark.parametrize("tensor_parallel", [1, 2])
@pytest.mark.parametrize("world_size", [4, 8])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_on_every_grid(large_pool, dense_runs, strategy, world_size, tensor_parallel, num_stages):
    parallel = ParallelConfig(tensor_parallel=tensor_parallel, pipeline_parallel=num_stages)
    budget = num_stages * (2 * 150 // parallel.data_ranks(world_size) + 30)
    kinds = (*ULYSSES, *RING)
    results = large_pool.run(
        train_rank, parallel, strategy, None, kinds, budget, SPEC, NUM_STEPS, world_size=world_size
    )
    losses, final, _ = results[0]
    compare(dense_runs(SPEC, NUM_STEPS), losses, final)
