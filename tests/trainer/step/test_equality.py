"""fp32: whatever the strategy, group shape or tensor parallelism, the run equals a plain dense model's, to 1e-5."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from planner.cost.chunk_fit import ChunkFit
from planner.cost.fits import ActivationFit
from planner.cost.limits import PlanLimits
from planner.inputs.model import ModelSpec
from planner.plan import AttentionKind, MemoryPolicy
from planner.pricing.verify import verify_plan
from planner.step_planner import plan_step
from tests.plans import cost_model, step_problem
from tests.ranks import RankPool
from tests.trainer import dense
from trainer.build import build_runtime
from trainer.data.batch import token_rows
from trainer.model.optimizer import learning_rate
from trainer.prices.planned_memory import plan_memory
from trainer.rank_env import RankEnv
from trainer.settings.tree import (
    DataConfig,
    MemoryConfig,
    OptimizerConfig,
    ParallelConfig,
    PlanConfig,
    RunConfig,
    TrainConfig,
)
from trainer.step.one_step import compile_stage_program, train_step

NUM_STEPS = 10
TOLERANCE = 1e-5
SPEC = ModelSpec(
    name="test", num_layers=2, hidden_dim=32, ffn_dim=48, num_query_heads=4, num_kv_heads=2, head_dim=8,
    vocab_size=61, qk_norm=True,
)
# eps: Adam divides a gradient by its own size, so with the usual 1e-8 a weight whose gradient is next to nothing moves
# by the rounding of that gradient (seen: 2e-5 for one rank, on some processors); gradients scaled wrongly go unseen.
# At 1e-3 a step is a smooth function of the gradient.
CONFIG = TrainConfig(
    run=RunConfig(steps=NUM_STEPS, seed=7, collective_timeout_s=60),
    optimizer=OptimizerConfig(lr=1e-2, warmup_steps=3, eps=1e-3),
)


def batches():
    """The same documents for every run: long-tailed lengths, random ids."""
    rng = np.random.default_rng(3)
    steps = []
    for _ in range(NUM_STEPS):
        lengths = np.clip(rng.lognormal(3.0, 1.1, size=7).astype(int), 1, 150)
        steps.append([rng.integers(0, SPEC.vocab_size, size=size + 1) for size in lengths])
    return steps


def train_rank(
    rank, world_size, init_method, parallel, strategy, degree, kinds, budget_tokens, spec, memory=None, folder=None,
    cost_options=None, num_steps=NUM_STEPS,
):
    """One rank's run of the first steps; rank 0 returns (losses, initial weights, final weights, what was used)."""
    config = dataclasses.replace(CONFIG, parallel=parallel, plan=PlanConfig(strategy=strategy))
    if memory is not None:
        config = dataclasses.replace(
            config, memory=memory, run=dataclasses.replace(CONFIG.run, dir=str(folder)), data=SMALL_STEPS
        )
    env = RankEnv(rank=rank, world_size=world_size, local_rank=rank, local_world_size=world_size)
    runtime = build_runtime(config, env, spec, init_method=init_method)
    num_ranks = parallel.data_ranks(world_size)
    options = dict(cost_options or {})
    activation, keeps = options.pop("activation", None), options.pop("keeps", False)
    chunks = options.pop("chunks", None)
    cost = dataclasses.replace(
        cost_model(num_ranks, **options), sharding=runtime.sharding, num_stages=runtime.mesh.num_stages,
        activation=activation, chunks=chunks,
    )
    limits = PlanLimits(
        device_budget_bytes=budget_tokens, kinds=kinds,
        max_ulysses_degree=spec.num_query_heads // parallel.tensor_parallel,
    )
    if activation is not None or (memory is not None and memory.policy == "auto"):
        planned, cost, limits = plan_memory(config, runtime, cost, limits, folder, world_size)
        runtime = dataclasses.replace(runtime, memory=planned)
    initial = full_weights(runtime)
    losses, shapes = [], {("note", runtime.memory.note)}
    for step, documents in enumerate(batches()[:num_steps]):
        lengths = [len(ids) - 1 for ids in documents]
        plan = plan_step(step_problem(lengths, num_ranks, cost, limits), step=step, strategy=strategy, degree=degree)
        verify_plan(plan, step_problem(lengths, num_ranks, cost, limits))
        shapes |= {(str(g.kind), g.degree) for m in plan.microbatches for g in m.groups}
        shapes |= {(MOVED, len(m.ranks)) for m in plan.microbatches if m.moves}
        shapes |= {("swap", len(m.ranks)) for m in plan.microbatches if m.memory.swap_fraction > 0}
        shapes |= {("recompute", len(m.ranks)) for m in plan.microbatches if m.memory.recompute_fraction > 0}
        shapes |= {("chunks", len(m.ranks)) for m in plan.microbatches if m.memory.chunk_tokens}
        if keeps:
            kept = tuple(dataclasses.replace(each, memory=MemoryPolicy()) for each in plan.microbatches)
            plan = dataclasses.replace(plan, microbatches=kept)
        program = compile_stage_program(runtime, plan)

        def read(spans, documents=documents):
            ids = [documents[s.sequence][s.start_token : s.stop_token + 1] for s in spans]
            return token_rows(ids, spans, torch.device("cpu"))

        outcome = train_step(
            runtime, program, read, num_tokens=plan.num_tokens,
            lr=learning_rate(config.optimizer, step=step, num_steps=NUM_STEPS),
        )
        losses.append(outcome.loss)
    final = full_weights(runtime)
    tier = runtime.memory.tier
    if activation is not None and not keeps and any(action == "swap" for action, _ in shapes):
        written = torch.tensor([float(tier.written_bytes)])
        torch.distributed.all_reduce(written)
        assert tier.written_bytes == tier.read_bytes and written > 0
    if memory is not None and memory.policy == "swap" and (parallel == DATA or not runtime.model.stage.is_last):
        assert tier.written_bytes == tier.read_bytes > 0, "nothing was swapped"
    runtime.memory.close()
    return losses, initial, final, shapes


def full_weights(runtime):
    """All weights in full on every rank: gathered over the data axis, joined over the tensor axis and the stages."""
    joined = {}
    for name, parameter in runtime.model.named_parameters():
        local = parameter.full_tensor().detach().contiguous()
        parts = [torch.empty_like(local) for _ in range(runtime.mesh.tensor_size)]
        torch.distributed.all_gather(parts, local, group=runtime.mesh.tensor_group)
        if "norm" in name:
            joined[name] = parts[0]
        else:
            joined[name] = torch.cat(parts, dim=1 if name.endswith(("out.weight", "down.weight")) else 0)
    everywhere = [None] * runtime.mesh.world_size
    torch.distributed.all_gather_object(everywhere, {name: weight.numpy() for name, weight in joined.items()})
    return {name: weight for part in everywhere for name, weight in part.items()}


DATA = ParallelConfig()
TENSOR_2 = ParallelConfig(tensor_parallel=2)
STAGES_2 = ParallelConfig(pipeline_parallel=2)
STAGES_2_TENSOR_2 = ParallelConfig(pipeline_parallel=2, tensor_parallel=2)
REPLICAS_2, REPLICAS_4 = ParallelConfig(shard_ranks=2), ParallelConfig(shard_ranks=1)
ZERO3 = ParallelConfig(sharding="zero3")
ZERO3_TENSOR_2 = ParallelConfig(sharding="zero3", tensor_parallel=2)
MOVED = "tokens moved for the token-wise layers"
ULYSSES, RING = (AttentionKind.ULYSSES,), (AttentionKind.RING,)
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


SMALL_STEPS = DataConfig(max_length=150, tokens_per_step=1050)
DEEP = dataclasses.replace(SPEC, num_layers=4)
"""The last two layers of a run that swaps stay; two more are put away."""
DEEPER = dataclasses.replace(SPEC, num_layers=8)
"""Enough for two pipeline stages that swap."""
HALF = MemoryConfig(policy="swap", swap_fraction=0.5, tier="disk")
FLEXSP = ("flexsp", None, ULYSSES, 60)
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

ACTIVATION = ActivationFit(
    swap_bytes_per_token=0.5, recompute_bytes_per_token=0.45, recompute_s_per_token=2e-6, copy_bytes_per_s=2e4,
    hidden_share=0.3,
)
ON_DISK, ON_HOST = MemoryConfig(tier="disk"), MemoryConfig(tier="host")
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
SLOW_COPIES = dataclasses.replace(ACTIVATION, copy_bytes_per_s=1.0)
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


SECO_16 = MemoryConfig(policy="seco", chunk_tokens=16)
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


def dense_run(pool, spec, num_steps=NUM_STEPS):
    """The dense model's run, from the initial weights that the one-rank model starts with."""
    ((_, initial, _, _),) = pool.run(train_rank, DATA, "static", 1, ULYSSES, 2**40, spec, world_size=1)
    steps = [[torch.from_numpy(ids) for ids in documents] for documents in batches()[:num_steps]]
    rates = [learning_rate(CONFIG.optimizer, step=step, num_steps=NUM_STEPS) for step in range(num_steps)]
    weights = {name: torch.from_numpy(weight) for name, weight in initial.items()}
    return dense.train(weights, spec, steps, CONFIG.optimizer, rates)


@pytest.fixture(scope="module")
def oracle(pool):
    return dense_run(pool, SPEC)


@pytest.fixture(scope="module")
def deep_oracle(pool):
    return dense_run(pool, DEEP)


def some_nightly(names, by_day):
    return [pytest.param(name, marks=() if name in by_day else pytest.mark.nightly) for name in names]


class TestEquality:
    @pytest.mark.parametrize("name", RUNS)
    def test_equals_dense_model(self, pool, oracle, name):
        world_size, *arguments, shapes = RUNS[name]
        results = pool.run(train_rank, *arguments, SPEC, None, None, COST_OPTIONS.get(name), world_size=world_size)
        assert all(losses == results[0][0] for losses, *_ in results), "ranks report different losses"
        losses, _, final, used = results[0]
        assert shapes <= used
        self.compare(oracle, losses, final)

    @pytest.mark.parametrize(
        "name", some_nightly(MEMORY_RUNS, CHEAP_RUNS)
    )
    def test_swapping_and_recomputing_change_nothing(self, pool, tmp_path, name):
        """Against the same plans with everything kept: of recomputed rows some products round otherwise, no more."""
        *arguments, memory = MEMORY_RUNS[name]
        losses, _, final, _ = pool.run(train_rank, *arguments, DEEP, memory, tmp_path)[0]
        kept_losses, _, kept, _ = pool.run(train_rank, *arguments, DEEP)[0]
        assert losses == pytest.approx(kept_losses, rel=1e-6)
        assert max(np.abs(final[name] - weight).max() for name, weight in kept.items()) < 1e-6
        assert not list(tmp_path.glob("swap/*")), "the disk tier leaves no file"

    @pytest.mark.parametrize("name", some_nightly(MLP_RUNS, CHEAP_MLP_RUNS))
    def test_mlp_in_pieces_equals_dense_model(self, pool, deep_oracle, tmp_path, name):
        losses, _, final, _ = pool.run(train_rank, *MLP_RUNS[name][:-1], DEEP, MLP_RUNS[name][-1], tmp_path)[0]
        self.compare(deep_oracle, losses, final)

    def test_half_swapped_half_recomputed_equals_dense_model(self, pool, deep_oracle, tmp_path):
        losses, _, final, _ = pool.run(train_rank, *MEMORY_RUNS["half swapped, half recomputed"][:-1], DEEP, HALF,
                                       tmp_path)[0]
        self.compare(deep_oracle, losses, final)

    @pytest.mark.parametrize("name", some_nightly(PLANNED_RUNS, CHEAP_PLANNED_RUNS))
    def test_policies_chosen_by_the_plan_equal_the_dense_model(self, pool, deep_oracle, tmp_path, name):
        *arguments, memory, wanted = PLANNED_RUNS[name]
        options = {"activation": SLOW_COPIES if "slow" in name else ACTIVATION}
        spec = DEEPER if "8 layers" in name else DEEP
        losses, _, final, used = pool.run(train_rank, *arguments, spec, memory, tmp_path, options)[0]
        assert wanted <= used, used
        dense_losses = deep_oracle[0] if spec is DEEP else dense_run(pool, spec)[0]
        assert losses == pytest.approx(dense_losses, rel=TOLERANCE)
        options["keeps"] = True
        kept_losses, _, kept, _ = pool.run(train_rank, *arguments, spec, memory, tmp_path, options)[0]
        assert losses == pytest.approx(kept_losses, rel=1e-6)
        assert max(np.abs(final[name] - weight).max() for name, weight in kept.items()) < 1e-6

    @pytest.mark.parametrize("name", some_nightly(PLANNED_CHUNK_RUNS, ("adaptive",)))
    def test_chunks_chosen_by_the_plan_equal_the_dense_model(self, pool, oracle, tmp_path, name):
        parallel, kinds, budget, wanted = PLANNED_CHUNK_RUNS[name]
        no_help = dataclasses.replace(SLOW_COPIES, swap_bytes_per_token=0.1, recompute_bytes_per_token=0.05)
        options = {"activation": no_help, "chunks": CHUNKS}
        losses, _, final, used = pool.run(
            train_rank, parallel, "adaptive", None, kinds, budget, SPEC, ON_HOST, tmp_path, options
        )[0]
        assert wanted <= used, used
        self.compare(oracle, losses, final)

    @pytest.mark.parametrize("name", some_nightly(CHUNKED_RUNS, set(CHUNKED_RUNS).difference(NIGHTLY_CHUNKED_RUNS)))
    def test_chunk_by_chunk_equals_dense_model(self, pool, oracle, name):
        *arguments, memory = CHUNKED_RUNS[name]
        losses, _, final, _ = pool.run(train_rank, *arguments, SPEC, memory)[0]
        self.compare(oracle, losses, final)

    def test_tied_head_under_tensor_parallelism(self, pool):
        spec = dataclasses.replace(SPEC, tied_head=True, qk_norm=False)
        losses, _, final, _ = pool.run(train_rank, TENSOR_2, "static", 2, RING, 2**40, spec)[0]
        self.compare(dense_run(pool, spec), losses, final)

    @pytest.mark.nightly
    @pytest.mark.parametrize("num_stages", [1, 2])
    @pytest.mark.parametrize("tensor_parallel", [1, 2])
    @pytest.mark.parametrize("world_size", [4, 8])
    @pytest.mark.parametrize("strategy", STRATEGIES)
    def test_every_strategy_on_every_grid(self, large_pool, oracle, strategy, world_size, tensor_parallel, num_stages):
        parallel = ParallelConfig(tensor_parallel=tensor_parallel, pipeline_parallel=num_stages)
        budget = num_stages * (2 * 150 // parallel.data_ranks(world_size) + 30)
        kinds = (*ULYSSES, *RING)
        results = large_pool.run(train_rank, parallel, strategy, None, kinds, budget, SPEC, world_size=world_size)
        losses, _, final, _ = results[0]
        self.compare(oracle, losses, final)

    @staticmethod
    def compare(oracle, losses, final):
        dense_losses, dense_final = oracle
        assert max(abs(a - b) / b for a, b in zip(losses, dense_losses, strict=True)) < TOLERANCE
        for name, weight in dense_final.items():
            error = (torch.from_numpy(final[name])[: weight.shape[0]] - weight).abs().max().item()
            assert error < TOLERANCE, f"{name}: {error}"
