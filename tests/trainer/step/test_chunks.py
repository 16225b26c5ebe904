"""Chunked training on real processes: calibration under the policy, half precision, samples that all ranks share."""

from __future__ import annotations

import dataclasses
from unittest import mock

import numpy as np
import pytest
import torch

from memory.sparse_chunks import Sampling
from parallel.program import compile_rank_program
from planner.errors import PlanError
from planner.plan import AttentionGroup, AttentionKind, MemoryPolicy, Sharding
from tests.plans import verified_plan
from tests.ranks import RankPool
from tests.trainer.few_sweeps import few_sweeps
from tests.trainer.step.dense_runs import CONFIG, SPEC
from tests.trainer.step.test_one_step import reader, start
from trainer.checkpoint.tensors import weights_digest
from trainer.prices.calibration import MeasuredShape, calibrate
from trainer.settings.tree import MemoryConfig, ParallelConfig
from trainer.step.chunk_policy import chunk_policy
from trainer.step.chunks import resident_bytes_per_token
from trainer.step.one_step import accumulate_gradients, compile_stage_program, train_step

LENGTHS = [70, 9, 31]
SECO = MemoryConfig(policy="seco", chunk_tokens=8)
SPACO = MemoryConfig(policy="spaco", chunk_tokens=8, sample_fraction=0.5)


def configured(memory, dtype="fp32"):
    return dataclasses.replace(CONFIG, memory=memory, run=dataclasses.replace(CONFIG.run, dtype=dtype))


def losses(rank, world_size, init_method, memory, dtype, kind, num_steps):
    """Losses of some steps on the same documents, and the digest of the weights after them."""
    runtime = start(rank, world_size, init_method, configured(memory, dtype), SPEC)
    groups = [[AttentionGroup(kind=kind, ranks=(1, 0), sequences=(0, 2))],
              [AttentionGroup(kind=AttentionKind.LOCAL, ranks=(1,), sequences=(1,))]]
    program = compile_rank_program(verified_plan(groups, LENGTHS, world_size), rank)
    rng = np.random.default_rng(8)
    read = reader([rng.integers(0, SPEC.vocab_size, size=size + 1) for size in LENGTHS])
    values = [
        train_step(runtime, dataclasses.replace(program, step=step), read, num_tokens=sum(LENGTHS), lr=1e-2).loss
        for step in range(num_steps)
    ]
    return values, weights_digest(runtime)


SHAPES = (
    MeasuredShape(AttentionKind.LOCAL, 1), MeasuredShape(AttentionKind.ULYSSES, 2), MeasuredShape(AttentionKind.RING, 2)
)


def calibration(rank, world_size, init_method, memory, parallel, shapes):
    """With chunks of 16 tokens: most of the measured sets are several of them."""
    config = dataclasses.replace(configured(dataclasses.replace(memory, chunk_tokens=16)), parallel=parallel)
    runtime = start(rank, world_size, init_method, config, SPEC)
    before = weights_digest(runtime)
    with few_sweeps():
        measured = calibrate(runtime, shapes, max_length=64, machine="here")
    return measured.cost, before == weights_digest(runtime)


@pytest.fixture(scope="module")
def pool():
    pool = RankPool(2)
    yield pool
    pool.close()


@pytest.mark.parametrize("kind", [AttentionKind.ULYSSES, AttentionKind.RING])
def test_half_precision_chunks_train_like_whole_microbatches(pool, kind):
    (chunked, _), _ = pool.run(losses, SECO, "bf16", kind, 8)
    (whole, _), _ = pool.run(losses, MemoryConfig(), "bf16", kind, 8)
    assert chunked[-1] < 0.8 * chunked[0]
    assert max(abs(a - b) for a, b in zip(chunked, whole, strict=True)) < 0.05


def tiered_losses(rank, world_size, init_method, memory, parallel, kind, folder):
    """Losses of two steps, bytes that went through the tier, most in it, and resident bytes of a token."""
    config = dataclasses.replace(configured(memory), parallel=parallel)
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=folder))
    runtime = start(rank, world_size, init_method, config, SPEC)
    groups = [[AttentionGroup(kind=kind, ranks=(1, 0), sequences=(0, 2))],
              [AttentionGroup(kind=AttentionKind.LOCAL, ranks=(1,), sequences=(1,))]]
    plan = dataclasses.replace(verified_plan(groups, LENGTHS, world_size), sharding=runtime.sharding)
    program = compile_rank_program(plan, rank)
    rng = np.random.default_rng(8)
    read = reader([rng.integers(0, SPEC.vocab_size, size=size + 1) for size in LENGTHS])
    outcomes = [
        train_step(runtime, dataclasses.replace(program, step=step), read, num_tokens=sum(LENGTHS), lr=1e-2)
        for step in range(2)
    ]
    tier = runtime.memory.tier
    moved = (0, 0) if tier is None else (tier.written_bytes, tier.read_bytes)
    runtime.memory.close()
    return [outcome.loss for outcome in outcomes], moved, outcomes[-1].tier_peak_bytes, resident_bytes_per_token(
        runtime
    )


@pytest.mark.parametrize(("parallel", "kind"), [
    (ParallelConfig(), AttentionKind.ULYSSES), (ParallelConfig(sharding="zero3"), AttentionKind.RING),
], ids=["gather_once ulysses", "zero3 ring"])
def test_chunks_in_a_tier_train_to_the_same_bits(pool, tmp_path, parallel, kind):
    tiered = dataclasses.replace(SECO, tier="disk")
    wanted = pool.run(tiered_losses, SECO, parallel, kind, str(tmp_path))
    for rank, (values, moved, peak_bytes, token_bytes) in enumerate(
        pool.run(tiered_losses, tiered, parallel, kind, str(tmp_path))
    ):
        assert values == wanted[rank][0]
        assert min(moved) > 0 and min(peak_bytes) > 0 and wanted[rank][2] == (0, 0)
        assert token_bytes <= wanted[rank][3]


def test_sampled_chunks_repeat_exactly_and_differ_by_step_and_seed(pool):
    (first, digest), (other_rank, _) = pool.run(losses, SPACO, "fp32", AttentionKind.ULYSSES, 3)
    assert first == other_rank
    assert pool.run(losses, SPACO, "fp32", AttentionKind.ULYSSES, 3)[0] == (first, digest)
    exact, _ = pool.run(losses, SECO, "fp32", AttentionKind.ULYSSES, 1)[0]
    assert first[0] != pytest.approx(exact[0], rel=1e-3), "the loss of a sample is an estimate"


@pytest.mark.parametrize(("memory", "parallel", "shapes"), [
    (SECO, ParallelConfig(), SHAPES), (SPACO, ParallelConfig(), SHAPES),
    (SPACO, ParallelConfig(sharding="zero3"), SHAPES[:2]), (SECO, ParallelConfig(pipeline_parallel=2), SHAPES[:1]),
], ids=["seco", "spaco", "spaco zero3", "seco pipeline"])
def test_calibration_measures_the_policy(pool, memory, parallel, shapes):
    cost, unchanged = pool.run(calibration, memory, parallel, shapes)[0]
    assert unchanged
    assert {(fit.kind, fit.degree) for fit in cost.times} == {(shape.kind, shape.degree) for shape in shapes}


def test_budget_becomes_rows_and_measuring_has_no_chance():
    memory = dataclasses.replace(SPACO, chunk_budget="1 MiB", sampling="importance")
    policy = chunk_policy(configured(memory), SPEC)
    assert policy.keep_rows == 2**20 // (SPEC.num_layers * SPEC.saved_bytes_per_token(4))
    assert chunk_policy(configured(memory, "bf16"), SPEC).keep_rows > policy.keep_rows
    pieces = dataclasses.replace(memory, mlp_chunk_tokens=8)
    assert chunk_policy(configured(pieces), SPEC).keep_rows > policy.keep_rows, "a row's MLP saves less"
    assert policy.sampler.kind is Sampling.IMPORTANCE and policy.sampler.seed == CONFIG.run.seed
    assert policy.steady().sampler.kind is Sampling.EVEN and policy.steady().keep_rows == policy.keep_rows
    assert chunk_policy(CONFIG, SPEC) is None
    assert "estimates (SpaCO, fraction 0.5, importance sampling)" in policy.describe_gradients()


def reductions(rank, world_size, init_method, memory):
    """Gradient reductions over the data axis and backward calls in one step."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group

    runtime = start(rank, world_size, init_method, configured(memory), SPEC)
    counted = {"reduce": 0, "backward": 0}
    reduce, backward = _fsdp_param_group.foreach_reduce, torch.Tensor.backward

    def watched(name, function):
        def call(*arguments, **options):
            counted[name] += 1
            return function(*arguments, **options)

        return call

    groups = [[AttentionGroup(kind=AttentionKind.ULYSSES, ranks=(1, 0), sequences=(0,))]]
    program = compile_rank_program(verified_plan(groups, [64], world_size), rank)
    read = reader([np.arange(65) % SPEC.vocab_size])
    with (
        mock.patch.object(_fsdp_param_group, "foreach_reduce", watched("reduce", reduce)),
        mock.patch.object(torch.Tensor, "backward", watched("backward", backward)),
    ):
        train_step(runtime, program, read, num_tokens=64, lr=1e-2)
    return counted


def test_gradients_are_reduced_once_a_step(pool):
    chunked, whole = pool.run(reductions, SECO)[0], pool.run(reductions, MemoryConfig())[0]
    assert whole["backward"] == 2 and chunked["backward"] == 64 // (2 * 8) + 1  # the last one is the empty microbatch
    assert chunked["reduce"] == whole["reduce"] == SPEC.num_layers + 1


def planned_chunks(rank, world_size, init_method, parallel, groups):
    """(losses, gradients, backward calls) of a plan whose first microbatch runs in chunks, and of the plan without."""
    config = dataclasses.replace(CONFIG, parallel=parallel)
    runtime = start(rank, world_size, init_method, config, SPEC)
    whole = verified_plan(groups, LENGTHS, runtime.mesh.data_size)
    whole = dataclasses.replace(
        whole, sharding=runtime.sharding, num_stages=runtime.mesh.num_stages
    )
    first, *others = whole.microbatches
    first = dataclasses.replace(first, memory=MemoryPolicy(chunk_tokens=8))
    rng = np.random.default_rng(8)
    read = reader([rng.integers(0, SPEC.vocab_size, size=size + 1) for size in LENGTHS])
    answers = []
    for plan in (whole, dataclasses.replace(whole, microbatches=(first, *others))):
        with mock.patch.object(torch.Tensor, "backward", autospec=True, side_effect=torch.Tensor.backward) as backward:
            loss, _ = accumulate_gradients(
                runtime, compile_stage_program(runtime, plan), read, num_tokens=plan.num_tokens
            )
        grads = {name: p.grad.full_tensor().clone().numpy() for name, p in runtime.model.named_parameters()}
        answers.append((loss, grads, backward.call_count))
        runtime.optimizer.zero_grad()
    return answers


LOCAL_GROUPS = [[AttentionGroup(kind=AttentionKind.LOCAL, ranks=(0,), sequences=(0, 2))],
                [AttentionGroup(kind=AttentionKind.LOCAL, ranks=(0,), sequences=(1,))]]


@pytest.mark.parametrize(("parallel", "groups"), [
    (ParallelConfig(), [[AttentionGroup(kind=AttentionKind.RING, ranks=(1, 0), sequences=(0, 2))],
                        [AttentionGroup(kind=AttentionKind.LOCAL, ranks=(1,), sequences=(1,))]]),
    (ParallelConfig(sharding="zero3"), [[AttentionGroup(kind=AttentionKind.LOCAL, ranks=(1,), sequences=(0, 2))],
                                        [AttentionGroup(kind=AttentionKind.LOCAL, ranks=(0,), sequences=(1,))]]),
    (ParallelConfig(pipeline_parallel=2), LOCAL_GROUPS),
], ids=["gather_once", "zero3", "pipeline"])
def test_a_microbatch_planned_in_chunks_runs_in_chunks_and_others_whole(pool, parallel, groups):
    results = pool.run(planned_chunks, parallel, groups)
    losses = [sum(answers[way][0] for answers in results) for way in (0, 1)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    for answers in results:
        (_, whole, _), (_, chunked, _) = answers
        for name, grad in whole.items():
            assert np.linalg.norm(chunked[name] - grad) < 1e-5 * max(np.linalg.norm(grad), 1e-3), name
    assert max(chunked[2] for _, chunked in results) >= max(whole[2] for whole, _ in results) + 101 // 16


@pytest.mark.parametrize("sharding", Sharding)
def test_chunks_and_swapping_are_not_mixed_silently(sharding):
    plan = verified_plan(LOCAL_GROUPS, LENGTHS, 1)
    both = MemoryPolicy(keep_fraction=0.5, recompute_fraction=0.5, chunk_tokens=8)
    first, second = plan.microbatches
    mixed = dataclasses.replace(plan, microbatches=(dataclasses.replace(first, memory=both), second), sharding=sharding)
    with pytest.raises(PlanError, match="chunks"):
        compile_rank_program(mixed, 0)
