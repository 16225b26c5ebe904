"""fp32: a run that swaps, recomputes or trains chunk by chunk, as the run or each plan says, equals the dense model's
or that of the same plans with everything kept."""

from __future__ import annotations

import dataclasses

import pytest

from planner.cost.chunk_fit import ChunkFit
from tests.ranks import RankPool
from tests.trainer.step.dense_runs import (
    ACTIVATION,
    DATA,
    DEEP,
    DEEPER,
    FEW_STEPS,
    FLEXSP,
    HALF,
    ON_DISK,
    ON_HOST,
    REPLICAS_2,
    RING,
    SECO_16,
    SLOW_COPIES,
    SPEC,
    STAGES_2,
    STAGES_2_TENSOR_2,
    TENSOR_2,
    TOLERANCE,
    ULYSSES,
    ZERO3,
    ZERO3_TENSOR_2,
    DenseRuns,
    assert_same_run,
    compare,
    day_and_night,
    train_rank,
)
from trainer.settings.tree import MemoryConfig

MEMORY_RUNS = {
    "half swapped, half recomputed": (DATA, *FLEXSP, HALF),
    "all swapped, ring": (DATA, "hdp", None, RING, 60, MemoryConfig(policy="swap", swap_fraction=1.0, tier="host")),
    "recompute": (DATA, *FLEXSP, MemoryConfig(policy="recompute")),
    "measured fractions": (DATA, *FLEXSP, MemoryConfig(policy="swap", tier="disk")),
    "half and half, tensor 2": (TENSOR_2, "static", 2, ULYSSES, 2**40, HALF),
    "half and half, pipeline 2": (STAGES_2, "flexsp", None, ULYSSES, 160, HALF),
    "half and half, zero3": (ZERO3, *FLEXSP, HALF),
    "recompute, zero3": (ZERO3, *FLEXSP, MemoryConfig(policy="recompute")),
    "half and half, zero3 x tensor 2": (ZERO3_TENSOR_2, "adaptive", None, RING, 90, HALF),
}
MLP_IN_PIECES = dataclasses.replace(HALF, mlp_chunk_tokens=12)
MLP_RUNS = {
    "half swapped": (DATA, *FLEXSP, MLP_IN_PIECES),
    "zero3": (ZERO3, *FLEXSP, MLP_IN_PIECES),
    "tensor 2": (TENSOR_2, "static", 2, ULYSSES, 2**40, MLP_IN_PIECES),
    "pipeline 2": (STAGES_2, "flexsp", None, ULYSSES, 160, MLP_IN_PIECES),
    "keep, zero3 x tensor 2": (
        ZERO3_TENSOR_2, "adaptive", None, RING, 90, MemoryConfig(policy="keep", mlp_chunk_tokens=12),
    ),
    "seco": (DATA, "hdp", None, RING, 60, MemoryConfig(policy="seco", chunk_tokens=16, mlp_chunk_tokens=5)),
}
CHEAP_MLP_RUNS = ("half swapped",)
CHEAP_RUNS = ("all swapped, ring", "half and half, tensor 2", "half and half, zero3")


PLANNED_RUNS = {  # 30 tokens a rank: 150 on four ranks do not fit if all is kept
    "adaptive": (DATA, "adaptive", None, (*ULYSSES, *RING), 30, ON_DISK, {("swap", 4)}),
    "hdp with its offload ratio": (DATA, "hdp", None, RING, 30, ON_HOST, {("swap", 3)}),
    "hdp-floor": (DATA, "hdp-floor", None, RING, 30, ON_DISK, {("swap", 3)}),
    "adaptive, zero3": (ZERO3, "adaptive", None, RING, 30, ON_DISK, {("swap", 4)}),
    "adaptive, tensor 2": (TENSOR_2, "adaptive", None, RING, 60, ON_HOST, {("swap", 2)}),
    "adaptive, slow copies": (DATA, "adaptive", None, RING, 30, ON_DISK, {("recompute", 4)}),
    "adaptive, pipeline 2": (STAGES_2, "adaptive", None, RING, 130, ON_DISK, {("recompute", 2)}),
    "adaptive, pipeline 2, 8 layers": (STAGES_2, "adaptive", None, RING, 130, ON_DISK, {("swap", 2)}),
}
CHUNKS = ChunkFit(
    resident_bytes_per_token=0.3, num_kv_heads=2, fixed_bytes=0, bytes_per_token=1.0, shared_bytes_per_token=0.0,
    again_attention=0.3, again_linear=0.3, s_per_chunk=1e-7,
)
PLANNED_CHUNK_RUNS = {  # nothing swapped hides and recomputing frees little: 150 tokens fit in chunks only
    "adaptive": (DATA, RING, 24, {("chunks", 4)}),
    "adaptive, ulysses": (DATA, ULYSSES, 34, {("chunks", 4)}),
    "adaptive, zero3": (ZERO3, RING, 24, {("chunks", 4)}),
    "adaptive, tensor 2": (TENSOR_2, RING, 48, {("chunks", 2)}),
}
CHEAP_PLANNED_RUNS = ("adaptive", "hdp with its offload ratio", "adaptive, slow copies", "adaptive, pipeline 2")


CHUNKED_RUNS = {
    "4 ranks flexsp": (DATA, "flexsp", None, ULYSSES, 60, SECO_16),
    "4 ranks hdp": (DATA, "hdp", None, RING, 60, SECO_16),
    "zeppelin, some chunks kept": (
        DATA, "zeppelin", None, RING, 60, dataclasses.replace(SECO_16, chunk_tokens=7, chunk_budget="64 KiB"),
    ),
    "tensor 2 x data 2": (TENSOR_2, "static", 2, ULYSSES, 2**40, SECO_16),
    "2 replicas of 2": (REPLICAS_2, "flexsp", None, ULYSSES, 60, SECO_16),
    "all chunks sampled": (
        DATA, "flexsp", None, ULYSSES, 60, dataclasses.replace(SECO_16, policy="spaco", sample_fraction=1.0),
    ),
    "zero3": (ZERO3, "flexsp", None, ULYSSES, 60, SECO_16),
    "zero3 zeppelin": (ZERO3, "zeppelin", None, RING, 60, SECO_16),
    "zero3 x tensor 2": (ZERO3_TENSOR_2, "adaptive", None, RING, 90, dataclasses.replace(SECO_16, chunk_tokens=7)),
    "pipeline 2 x data 2": (STAGES_2, "flexsp", None, ULYSSES, 160, SECO_16),
    "pipeline 2 x data 2 hdp": (STAGES_2, "hdp", None, RING, 160, dataclasses.replace(SECO_16, chunk_tokens=7)),
    "pipeline 2 x tensor 2": (STAGES_2_TENSOR_2, "static", 1, ULYSSES, 2**40, SECO_16),
    "pipeline 2, all chunks sampled": (
        STAGES_2, "flexsp", None, ULYSSES, 160, dataclasses.replace(SECO_16, policy="spaco", sample_fraction=1.0),
    ),
}
NIGHTLY_CHUNKED_RUNS = (
    "2 replicas of 2", "zero3", "zero3 x tensor 2", "pipeline 2 x data 2 hdp", "pipeline 2 x tensor 2",
    "pipeline 2, all chunks sampled",
)

@pytest.fixture(scope="module")
def pool():
    pool = RankPool(4)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def dense_runs(pool):
    return DenseRuns(pool)


@pytest.mark.parametrize(("name", "num_steps"), day_and_night(MEMORY_RUNS, CHEAP_RUNS, day_steps=FEW_STEPS))
def test_swapping_and_recomputing_change_nothing(pool, tmp_path, name, num_steps):
    """Against the same plans with everything kept: of recomputed rows some products round otherwise, no more."""
    *arguments, memory = MEMORY_RUNS[name]
    run = pool.run(train_rank, *arguments, DEEP, num_steps, memory, tmp_path)[0]
    assert_same_run(run, pool.run(train_rank, *arguments, DEEP, num_steps)[0])
    assert not list(tmp_path.glob("swap/*")), "the disk tier leaves no file"


@pytest.mark.parametrize(("name", "num_steps"), day_and_night(MLP_RUNS, CHEAP_MLP_RUNS, day_steps=FEW_STEPS))
def test_mlp_in_pieces_equals_dense_model(pool, dense_runs, tmp_path, name, num_steps):
    *arguments, memory = MLP_RUNS[name]
    losses, final, _ = pool.run(train_rank, *arguments, DEEP, num_steps, memory, tmp_path)[0]
    compare(dense_runs(DEEP, num_steps), losses, final)


@pytest.mark.parametrize(("name", "num_steps"), day_and_night(["half swapped, half recomputed"], day_steps=FEW_STEPS))
def test_half_swapped_half_recomputed_equals_dense_model(pool, dense_runs, tmp_path, name, num_steps):
    *arguments, memory = MEMORY_RUNS[name]
    losses, final, _ = pool.run(train_rank, *arguments, DEEP, num_steps, memory, tmp_path)[0]
    compare(dense_runs(DEEP, num_steps), losses, final)


@pytest.mark.parametrize(("name", "num_steps"), day_and_night(PLANNED_RUNS, CHEAP_PLANNED_RUNS, day_steps=FEW_STEPS))
def test_policies_chosen_by_the_plan_equal_the_dense_model(pool, dense_runs, tmp_path, name, num_steps):
    *arguments, memory, wanted = PLANNED_RUNS[name]
    options = {"activation": SLOW_COPIES if "slow" in name else ACTIVATION}
    spec = DEEPER if "8 layers" in name else DEEP
    run = pool.run(train_rank, *arguments, spec, num_steps, memory, tmp_path, options)[0]
    losses, _, used = run
    assert wanted <= used, used
    assert losses == pytest.approx(dense_runs(spec, num_steps)[0], rel=TOLERANCE)
    options["keeps"] = True
    assert_same_run(run, pool.run(train_rank, *arguments, spec, num_steps, memory, tmp_path, options)[0])


@pytest.mark.parametrize(("name", "num_steps"), day_and_night(PLANNED_CHUNK_RUNS, ("adaptive",), day_steps=FEW_STEPS))
def test_chunks_chosen_by_the_plan_equal_the_dense_model(pool, dense_runs, tmp_path, name, num_steps):
    parallel, kinds, budget, wanted = PLANNED_CHUNK_RUNS[name]
    no_help = dataclasses.replace(SLOW_COPIES, swap_bytes_per_token=0.1, recompute_bytes_per_token=0.05)
    options = {"activation": no_help, "chunks": CHUNKS}
    losses, final, used = pool.run(
        train_rank, parallel, "adaptive", None, kinds, budget, SPEC, num_steps, ON_HOST, tmp_path, options
    )[0]
    assert wanted <= used, used
    compare(dense_runs(SPEC, num_steps), losses, final)


@pytest.mark.parametrize(
    ("name", "num_steps"),
    day_and_night(CHUNKED_RUNS, set(CHUNKED_RUNS).difference(NIGHTLY_CHUNKED_RUNS), day_steps=FEW_STEPS),
)
def test_chunk_by_chunk_equals_dense_model(pool, dense_runs, name, num_steps):
    *arguments, memory = CHUNKED_RUNS[name]
    losses, final, _ = pool.run(train_rank, *arguments, SPEC, num_steps, memory)[0]
    compare(dense_runs(SPEC, num_steps), losses, final)
