"""Runs of real ranks that must equal a plain dense model's: the ranks' part, the dense model's, and the comparison.

By day a run makes the first steps of the schedule, nightly all of them."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
import torch

from parallel.agree import agree_on_plan
from planner.cost.fits import ActivationFit
from planner.cost.limits import PlanLimits
from planner.inputs.model import ModelSpec
from planner.plan import AttentionKind, MemoryPolicy
from planner.pricing.verify import verify_plan
from planner.step_planner import plan_step
from tests.plans import cost_model, step_problem
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

NUM_STEPS, DAY_STEPS, FEW_STEPS = 10, 4, 2
"""The first two steps each hold one sequence of 150 tokens and six shorter ones; the second shows what the first did to
the weights, and the optimizer's moments."""
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
DATA = ParallelConfig()
TENSOR_2 = ParallelConfig(tensor_parallel=2)
STAGES_2 = ParallelConfig(pipeline_parallel=2)
STAGES_2_TENSOR_2 = ParallelConfig(pipeline_parallel=2, tensor_parallel=2)
REPLICAS_2, REPLICAS_4 = ParallelConfig(shard_ranks=2), ParallelConfig(shard_ranks=1)
ZERO3 = ParallelConfig(sharding="zero3")
ZERO3_TENSOR_2 = ParallelConfig(sharding="zero3", tensor_parallel=2)
MOVED = "tokens moved for the token-wise layers"
ULYSSES, RING = (AttentionKind.ULYSSES,), (AttentionKind.RING,)
SMALL_STEPS = DataConfig(max_length=150, tokens_per_step=1050)
DEEP = dataclasses.replace(SPEC, num_layers=4)
"""The last two layers of a run that swaps stay; two more are put away."""
DEEPER = dataclasses.replace(SPEC, num_layers=8)
"""Enough for two pipeline stages that swap."""
HALF = MemoryConfig(policy="swap", swap_fraction=0.5, tier="disk")
FLEXSP = ("flexsp", None, ULYSSES, 60)
ACTIVATION = ActivationFit(
    swap_bytes_per_token=0.5, recompute_bytes_per_token=0.45, recompute_s_per_token=2e-6, copy_bytes_per_s=2e4,
    hidden_share=0.3,
)
ON_DISK, ON_HOST = MemoryConfig(tier="disk"), MemoryConfig(tier="host")
SLOW_COPIES = dataclasses.replace(ACTIVATION, copy_bytes_per_s=1.0)
SECO_16 = MemoryConfig(policy="seco", chunk_tokens=16)


def batches():
    """The same documents for every run: long-tailed lengths, random ids."""
    rng = np.random.default_rng(3)
    steps = []
    for _ in range(NUM_STEPS):
        lengths = np.clip(rng.lognormal(3.0, 1.1, size=7).astype(int), 1, 150)
        steps.append([rng.integers(0, SPEC.vocab_size, size=size + 1) for size in lengths])
    return steps


def train_rank(
    rank, world_size, init_method, parallel, strategy, degree, kinds, budget_tokens, spec, num_steps, memory=None,
    folder=None, cost_options=None,
):
    """One rank's run of the first steps; (losses, final weights, what was used). Rank 0 plans for all, as in training:
    that every process plans the same is in ``tests/planner/test_planner_faults.py``."""
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
    losses, used = [], {("note", runtime.memory.note)}
    for step, documents in enumerate(batches()[:num_steps]):
        problem, plan = step_problem([len(ids) - 1 for ids in documents], num_ranks, cost, limits), None
        if rank == 0:
            plan = plan_step(problem, step=step, strategy=strategy, degree=degree)
        verify = functools.partial(verify_plan, problem=problem)
        plan = agree_on_plan(plan, source=0, group=runtime.mesh.control_group, verify=verify)
        used |= shapes_of(plan)
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
    if activation is not None and not keeps and any(action == "swap" for action, _ in used):
        written = torch.tensor([float(tier.written_bytes)])
        torch.distributed.all_reduce(written)
        assert tier.written_bytes == tier.read_bytes and written > 0
    if memory is not None and memory.policy == "swap" and (parallel == DATA or not runtime.model.stage.is_last):
        assert tier.written_bytes == tier.read_bytes > 0, "nothing was swapped"
    runtime.memory.close()
    return losses, final, used


def shapes_of(plan):
    """What a plan uses: groups by kind and degree, and every other means with the number of ranks that use it."""
    used = {(str(group.kind), group.degree) for each in plan.microbatches for group in each.groups}
    for each in plan.microbatches:
        memory = each.memory
        means = {
            MOVED: each.moves, "swap": memory.swap_fraction, "recompute": memory.recompute_fraction,
            "chunks": memory.chunk_tokens,
        }
        used |= {(name, len(each.ranks)) for name, amount in means.items() if amount}
    return used


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


def dense_run(pool, spec, num_steps):
    """Losses and final weights of the dense model, from the weights that the one-rank model starts with."""
    ((_, initial, _),) = pool.run(train_rank, DATA, "static", 1, ULYSSES, 2**40, spec, 0, world_size=1)
    steps = [[torch.from_numpy(ids) for ids in documents] for documents in batches()[:num_steps]]
    rates = [learning_rate(CONFIG.optimizer, step=step, num_steps=NUM_STEPS) for step in range(num_steps)]
    weights = {name: torch.from_numpy(weight) for name, weight in initial.items()}
    return dense.train(weights, spec, steps, CONFIG.optimizer, rates)


class DenseRuns:
    """Dense runs from the first time they are asked for."""

    def __init__(self, pool):
        self._pool, self._runs = pool, {}

    def __call__(self, spec, num_steps):
        key = spec, num_steps
        if key not in self._runs:
            self._runs[key] = dense_run(self._pool, spec, num_steps)
        return self._runs[key]


def compare(dense_losses_and_weights, losses, final):
    dense_losses, dense_final = dense_losses_and_weights
    assert max(abs(a - b) / b for a, b in zip(losses, dense_losses, strict=True)) < TOLERANCE
    for name, weight in dense_final.items():
        error = (torch.from_numpy(final[name])[: weight.shape[0]] - weight).abs().max().item()
        assert error < TOLERANCE, f"{name}: {error}"


def assert_same_run(run, reference):
    """To the rounding of products that come out otherwise when rows are computed again."""
    (losses, final, _), (wanted_losses, wanted, _) = run, reference
    assert losses == pytest.approx(wanted_losses, rel=1e-6)
    assert max(np.abs(final[name] - weight).max() for name, weight in wanted.items()) < 1e-6


def day_and_night(names, by_day=None, day_steps=DAY_STEPS):
    """Parameters (name, number of steps): the names of ``by_day`` (None: all) with the first steps, and nightly every
    name with all."""
    first = [pytest.param(name, day_steps) for name in names if by_day is None or name in by_day]
    return first + [pytest.param(name, NUM_STEPS, marks=pytest.mark.nightly) for name in names]
