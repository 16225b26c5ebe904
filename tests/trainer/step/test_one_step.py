"""The step on real processes: ranks without work, unequal counts, random plans, bf16, numbers that are not finite."""

from __future__ import annotations

import dataclasses
import json
import math
import random

import numpy as np
import pytest
import torch
import yaml

from memory.ledger import MemoryFullError
from parallel.engine import AttentionEngine
from parallel.program import compile_rank_program
from planner.codec import from_plain, to_plain
from planner.cost.fits import MemoryFit
from planner.cost.limits import PlanLimits
from planner.cost.model import CostModel
from planner.errors import InfeasibleError, NumericError
from planner.plan import AttentionGroup, AttentionKind, MemoryAction, MemoryPolicy
from tests.parallel.test_attention import TOLERANCE, dense_attention
from tests.plans import cost_model, verified_plan
from tests.ranks import RankPool
from tests.trainer.few_sweeps import few_sweeps
from tests.trainer.step.dense_runs import CONFIG, SPEC, full_weights
from trainer.build import build_runtime
from trainer.checkpoint.tensors import weights_digest
from trainer.data.batch import token_rows
from trainer.prices.calibration import MeasuredShape, calibrate, length_design
from trainer.prices.planned_memory import plan_memory
from trainer.rank_env import RankEnv
from trainer.record.step_report import predicted_host_bytes
from trainer.settings.tree import DataConfig, MemoryConfig
from trainer.step.one_step import accumulate_gradients, train_step

NUM_RANKS = 4
CPU = torch.device("cpu")
SMALL = dataclasses.replace(SPEC, num_layers=1, qk_norm=False)


def start(rank, world_size, init_method, config=CONFIG, spec=SMALL):
    env = RankEnv(rank=rank, world_size=world_size, local_rank=rank, local_world_size=world_size)
    return build_runtime(config, env, spec, init_method=init_method)


def plan_of(groups, lengths, num_ranks=NUM_RANKS):
    """Each group its own microbatch, in this order."""
    return verified_plan([[group] for group in groups], lengths, num_ranks)


def random_plan(seed):
    """Any legal assignment: groups of any ranks, kinds and sizes, any number of microbatches per rank."""
    rng = random.Random(seed)
    lengths = [rng.choice([1, 2, 5, rng.randint(1, 40)]) for _ in range(rng.randint(1, 8))]
    groups, waiting = [], list(range(len(lengths)))
    while waiting:
        taken = [waiting.pop() for _ in range(rng.randint(1, len(waiting)))]
        degree = rng.randint(1, NUM_RANKS)
        kind = rng.choice([AttentionKind.ULYSSES, AttentionKind.RING]) if degree > 1 else AttentionKind.LOCAL
        ranks = tuple(rng.sample(range(NUM_RANKS), degree))
        groups.append(AttentionGroup(kind=kind, ranks=ranks, sequences=tuple(taken)))
    return plan_of(groups, lengths)


def documents_of(plan, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, SMALL.vocab_size, size=sequence.num_tokens + 1) for sequence in plan.sequences]


def reader(documents):
    def read(spans):
        ids = [documents[s.sequence][s.start_token : s.stop_token + 1] for s in spans]
        return token_rows(ids, spans, CPU)

    return read


def gradients(rank, world_size, init_method, seeds):
    """For every seed: (sum of losses over ranks, full gradients) of a random plan; rank 0's answer counts."""
    runtime = start(rank, world_size, init_method)
    answers = []
    for seed in seeds:
        plan = random_plan(seed)
        loss, _ = accumulate_gradients(
            runtime, compile_rank_program(plan, rank), reader(documents_of(plan, seed)), num_tokens=plan.num_tokens
        )
        grads = {name: p.grad.full_tensor().clone().numpy() for name, p in runtime.model.named_parameters()}
        answers.append((loss, grads))
        runtime.optimizer.zero_grad()
    return answers, full_weights(runtime)


def alone(rank, world_size, init_method, seeds):
    """The same sequences, all on one rank."""
    runtime = start(rank, world_size, init_method)
    answers = []
    for seed in seeds:
        plan = random_plan(seed)
        group = AttentionGroup(
            kind=AttentionKind.LOCAL, ranks=(0,), sequences=tuple(range(len(plan.sequences)))
        )
        whole = plan_of([group], [s.num_tokens for s in plan.sequences], num_ranks=1)
        loss, _ = accumulate_gradients(
            runtime, compile_rank_program(whole, 0), reader(documents_of(plan, seed)), num_tokens=plan.num_tokens
        )
        answers.append((loss, {name: p.grad.full_tensor().numpy() for name, p in runtime.model.named_parameters()}))
        runtime.optimizer.zero_grad()
    return answers


def float64_attention(rank, world_size, init_method):
    """Engine over real gloo messages against dense attention: worst relative error of any kind."""
    runtime = start(rank, world_size, init_method)
    worst = 0.0
    for kind in (AttentionKind.RING, AttentionKind.ULYSSES):
        lengths = [37, 5, 90]
        plan = plan_of([AttentionGroup(kind=kind, ranks=(2, 0, 3, 1), sequences=(0, 1, 2))], lengths)
        generator = torch.Generator().manual_seed(4)
        shapes = [(8, 16), (2, 16), (2, 16), (8, 16)]
        documents = [
            [torch.randn(size, *shape, generator=generator, dtype=torch.float64) for shape in shapes]
            for size in lengths
        ]
        (microbatch,) = compile_rank_program(plan, rank).microbatches
        engine = AttentionEngine(runtime.engine.kernel, runtime.engine.wire, CPU)
        rows = [
            torch.cat([documents[s.sequence][part][s.start_token : s.stop_token] for s in microbatch.spans])
            for part in range(4)
        ]
        leaves = [x.requires_grad_() for x in rows[:3]]
        out = engine.bind(microbatch, num_query_heads=8, num_kv_heads=2, head_dim=16)(*leaves)
        got = (out.detach(), *torch.autograd.grad(out, leaves, rows[3]))
        wanted = [[], [], [], []]
        for document in documents:
            dense_leaves = [x.clone().requires_grad_() for x in document[:3]]
            dense = dense_attention(*dense_leaves)
            parts = (dense.detach(), *torch.autograd.grad(dense, dense_leaves, document[3]))
            for whole, part in zip(wanted, parts, strict=True):
                whole.append(part)
        for ours, whole in zip(got, wanted, strict=True):
            expected = torch.cat([whole[s.sequence][s.start_token : s.stop_token] for s in microbatch.spans])
            worst = max(worst, ((ours - expected).norm() / expected.norm()).item())
    return worst


def bf16_losses(rank, world_size, init_method):
    config = dataclasses.replace(CONFIG, run=dataclasses.replace(CONFIG.run, dtype="bf16"))
    runtime = start(rank, world_size, init_method, config)
    plan = random_plan(3)
    program, read = compile_rank_program(plan, rank), reader(documents_of(plan))
    losses = [train_step(runtime, program, read, num_tokens=plan.num_tokens, lr=1e-2).loss for _ in range(12)]
    return losses, {str(p.dtype) for p in runtime.optimizer.named_shards.values()}


def bf16_sums(rank, world_size, init_method, gradient_dtype):
    """bf16: the summed gradients of a step of 16 microbatches on each of two ranks, and the float64 sum of the
    gradients of its microbatches, each run as a step of its own."""
    config = dataclasses.replace(
        CONFIG, run=dataclasses.replace(CONFIG.run, dtype="bf16"),
        parallel=dataclasses.replace(CONFIG.parallel, gradient_dtype=gradient_dtype),
    )
    runtime = start(rank, world_size, init_method, config)
    lengths = [9 + number for number in range(32)]
    groups = [
        AttentionGroup(kind=AttentionKind.LOCAL, ranks=(number % 2,), sequences=(number,)) for number in range(32)
    ]
    whole = plan_of(groups, lengths, num_ranks=2)
    documents = documents_of(whole)

    def grads(plan, rows):
        accumulate_gradients(runtime, compile_rank_program(plan, rank), reader(rows), num_tokens=whole.num_tokens)
        found = {name: p.grad.full_tensor().double().numpy() for name, p in runtime.model.named_parameters()}
        dtypes = {str(p.grad.dtype) for p in runtime.model.parameters()}
        runtime.optimizer.zero_grad()
        return found, dtypes

    summed, dtypes = grads(whole, documents)
    exact = {name: np.zeros_like(grad) for name, grad in summed.items()}
    for number, length in enumerate(lengths):
        one = plan_of([dataclasses.replace(groups[number], sequences=(0,))], [length], num_ranks=2)
        for name, grad in grads(one, documents[number : number + 1])[0].items():
            exact[name] += grad
    errors = [np.linalg.norm(summed[name] - grad) / np.linalg.norm(grad) for name, grad in exact.items()]
    return max(errors), dtypes


def numeric_failure(rank, world_size, init_method):
    """Rank 2's weights turn bad; every rank must stop before the update."""
    runtime = start(rank, world_size, init_method)
    plan = plan_of([AttentionGroup(kind=AttentionKind.LOCAL, ranks=(2,), sequences=(0,))], [9])
    if rank == 2:
        runtime.optimizer.named_shards["norm.weight"].fill_(math.inf)
    before = weights_digest(runtime)
    try:
        train_step(
            runtime, compile_rank_program(plan, rank), reader(documents_of(plan)), num_tokens=plan.num_tokens, lr=1e-2
        )
    except NumericError as error:
        return str(error), before == weights_digest(runtime)
    return "no error", False


def planned_memory(rank, world_size, init_method, folder):
    """Every microbatch with a policy of its own, none of them the run's: gradients and bytes that went to the tier."""
    config = dataclasses.replace(
        CONFIG, run=dataclasses.replace(CONFIG.run, dir=str(folder)),
        data=DataConfig(max_length=64, tokens_per_step=256),
        memory=MemoryConfig(policy="swap", swap_fraction=1.0, tier="disk"),
    )
    runtime = start(rank, world_size, init_method, config, dataclasses.replace(SMALL, num_layers=4))
    kept = random_plan(5)
    policies = [
        MemoryPolicy(keep_fraction=0.2, swap_fraction=0.5, recompute_fraction=0.3),
        MemoryPolicy(keep_fraction=0.0, swap_fraction=0.0, recompute_fraction=1.0),
        MemoryPolicy(keep_fraction=0.5, swap_fraction=0.0, recompute_fraction=0.5),
    ]
    own = tuple(
        dataclasses.replace(microbatch, memory=policies[index % 3])
        for index, microbatch in enumerate(kept.microbatches)
    )
    answers = []
    for plan in (kept, dataclasses.replace(kept, microbatches=own)):
        written = runtime.memory.tier.written_bytes
        accumulate_gradients(
            runtime, compile_rank_program(plan, rank), reader(documents_of(plan)), num_tokens=plan.num_tokens
        )
        grads = {name: p.grad.full_tensor().clone().numpy() for name, p in runtime.model.named_parameters()}
        answers.append((grads, runtime.memory.tier.written_bytes - written))
        runtime.optimizer.zero_grad()
    runtime.memory.close()
    return answers


def planned_host_bytes(rank, world_size, init_method, folder):
    """(predicted, measured) bytes in the tier for a microbatch alone and for a ring, half of it swapped."""
    config = dataclasses.replace(
        CONFIG, run=dataclasses.replace(CONFIG.run, dir=str(folder)), memory=MemoryConfig(tier="host"),
        data=DataConfig(max_length=300, tokens_per_step=1200),
    )
    runtime = start(rank, world_size, init_method, config, dataclasses.replace(SMALL, num_layers=4))
    cost = cost_model(NUM_RANKS)
    cost = dataclasses.replace(
        cost, memory=MemoryFit(fixed_bytes=0, bytes_per_token=1e5),
        provenance=dataclasses.replace(cost.provenance, source="measured"),
    )
    limits = PlanLimits(device_budget_bytes=10**7, kinds=(AttentionKind.RING,), max_ulysses_degree=4)
    before, limits_before = cost, limits
    memory, cost, limits = plan_memory(config, runtime, before, limits_before, folder / "cache", world_size)
    assert {MemoryAction.SWAP, MemoryAction.RECOMPUTE} <= set(limits.policies)
    assert "measured" in cost.provenance.notes[0]
    stored = json.loads((folder / "memory.json").read_text()) if rank == 0 else {"cost": to_plain(cost)}
    assert from_plain(CostModel, stored["cost"], where="memory.json").digest == cost.digest
    resumed = dataclasses.replace(config, run=dataclasses.replace(config.run, resume=True), memory=config.memory)
    again, cost_again, limits_again = plan_memory(resumed, runtime, before, limits_before, folder / "none", world_size)
    again.close()
    assert (cost_again.digest, limits_again) == (cost.digest, limits), "a resumed run plans with what it began with"
    runtime = dataclasses.replace(runtime, memory=memory)
    answers = []
    for ranks, length in (((0,), 300), ((0, 1, 2, 3), 1200)):
        kind = AttentionKind.LOCAL if len(ranks) == 1 else AttentionKind.RING
        plan = plan_of([AttentionGroup(kind=kind, ranks=ranks, sequences=(0,))], [length])
        half = MemoryPolicy(keep_fraction=0.25, swap_fraction=0.5, recompute_fraction=0.25)
        plan = dataclasses.replace(
            plan, microbatches=tuple(dataclasses.replace(each, memory=half) for each in plan.microbatches)
        )
        outcome = train_step(
            runtime, compile_rank_program(plan, rank), reader(documents_of(plan)), num_tokens=plan.num_tokens, lr=0.0
        )
        answers.append((predicted_host_bytes(plan, cost, memory), max(outcome.tier_peak_bytes)))
    memory.close()
    return answers, cost.activation


def no_room_for_the_pair(rank, world_size, init_method, folder):
    """The fractions' program has no solution in this tier: every rank says so."""
    config = dataclasses.replace(
        CONFIG, run=dataclasses.replace(CONFIG.run, dir=str(folder)),
        memory=MemoryConfig(policy="swap", tier="host", tier_budget="1 KiB"),
    )
    with pytest.raises(InfeasibleError) as caught:
        start(rank, world_size, init_method, config, dataclasses.replace(SMALL, num_layers=4))
    return str(caught.value), caught.value.needed_bytes > caught.value.available_bytes


def full_tier(rank, world_size, init_method, folder):
    """A tier that one layer overflows: the step ends with need and have."""
    config = dataclasses.replace(
        CONFIG, run=dataclasses.replace(CONFIG.run, dir=str(folder)),
        memory=MemoryConfig(policy="swap", swap_fraction=1.0, tier="disk", tier_budget="64 KiB"),
    )
    runtime = start(rank, world_size, init_method, config, dataclasses.replace(SMALL, num_layers=4))
    plan = plan_of([AttentionGroup(kind=AttentionKind.LOCAL, ranks=(0,), sequences=(0,))], [300], num_ranks=1)
    with pytest.raises(MemoryFullError) as caught:
        train_step(
            runtime, compile_rank_program(plan, 0), reader(documents_of(plan)), num_tokens=plan.num_tokens, lr=1e-2
        )
    runtime.memory.close()
    return str(caught.value)


def calibration(rank, world_size, init_method):
    runtime = start(rank, world_size, init_method)
    before = weights_digest(runtime)
    shapes = (
        MeasuredShape(AttentionKind.LOCAL, 1), MeasuredShape(AttentionKind.ULYSSES, 2),
        MeasuredShape(AttentionKind.RING, 3), MeasuredShape(AttentionKind.USP, 4, 2),
    )
    with few_sweeps():
        measured = calibrate(runtime, shapes, max_length=128, machine="here")
    return measured, before == weights_digest(runtime), len(runtime.optimizer.adamw.state)


@pytest.fixture(scope="module")
def pool():
    pool = RankPool(NUM_RANKS)
    yield pool
    pool.close()


class TestStep:
    def test_random_plans_give_the_gradients_of_one_rank(self, pool):
        seeds = tuple(range(24))
        assert any(
            {rank for m in random_plan(seed).microbatches for rank in m.ranks} != set(range(NUM_RANKS))
            for seed in seeds
        ), "some plan must leave a rank without work"
        results = pool.run(gradients, seeds)
        wanted = pool.run(alone, seeds, world_size=1)[0]
        for number, (loss, grads) in enumerate(wanted):
            total = sum(answers[number][0] for answers, _ in results)
            assert total == pytest.approx(loss, rel=1e-5)
            for name, grad in grads.items():
                ours = results[0][0][number][1][name]
                error = np.linalg.norm(ours - grad) / max(np.linalg.norm(grad), 1e-3)
                assert error < 1e-5, (number, name, error)

    def test_float64_attention_over_real_messages(self, pool):
        assert max(pool.run(float64_attention)) < TOLERANCE

    def test_bf16_trains_with_fp32_weights(self, pool):
        losses, dtypes = pool.run(bf16_losses)[0]
        assert losses[-1] < 0.8 * losses[0] and dtypes == {"torch.float32"}

    def test_gradients_of_microbatches_are_summed_in_fp32_unless_asked_otherwise(self, pool):
        results = {name: pool.run(bf16_sums, name, world_size=2)[0] for name in ("fp32", "bf16")}
        (fp32, fp32_dtypes), (bf16, bf16_dtypes) = results["fp32"], results["bf16"]
        assert fp32 < 1e-5 and bf16 > 1e-3  # of what bf16 computed in each microbatch nothing is lost, and much is
        assert fp32_dtypes == bf16_dtypes == {"torch.float32"}  # what the optimizer gets

    def test_a_microbatch_s_own_memory_policy_is_executed(self, pool, tmp_path):
        results = pool.run(planned_memory, tmp_path)
        for (kept, kept_bytes), (own, own_bytes) in results:
            for name, grad in kept.items():
                assert np.linalg.norm(own[name] - grad) < 1e-6 * max(np.linalg.norm(grad), 1e-3), name
            assert own_bytes <= kept_bytes
        assert 0 < sum(own for _, (_, own) in results) < sum(kept for (_, kept), _ in results)

    def test_the_tier_holds_what_the_plan_says(self, pool, tmp_path):
        """Within the padding of places: 512 bytes for each of some 15 blocks of two layers."""
        answers, fit = pool.run(planned_host_bytes, tmp_path)[0]
        for predicted, measured in answers:
            assert predicted <= measured * 1.01 and measured <= predicted * 1.05 + 2 * 20 * 512, answers
        assert 0 < fit.recompute_bytes_per_token < fit.swap_bytes_per_token
        assert fit.recompute_s_per_token > 0 and fit.copy_bytes_per_s > 0 and 0 < fit.hidden_share <= 1

    def test_a_tier_too_small_for_what_is_never_recomputed_ends_every_rank(self, pool, tmp_path):
        for message, larger in pool.run(no_room_for_the_pair, tmp_path, world_size=2):
            assert "layer inputs and attention outputs of 2 layers" in message and larger

    def test_a_full_tier_names_need_and_have(self, pool, tmp_path):
        (message,) = pool.run(full_tier, tmp_path, world_size=1)
        assert "disk: need" in message and "of 64 KiB" in message and "raise --memory.tier-budget" in message

    def test_not_finite_stops_all_ranks_before_the_update(self, pool):
        for message, unchanged in pool.run(numeric_failure):
            assert "step 0" in message and "before the update" in message and unchanged

    def test_calibration_leaves_the_run_untouched_and_prices_everything(self, pool):
        (measured, unchanged, num_states), *_ = pool.run(calibration)
        assert unchanged and num_states == 0
        assert {(fit.kind, fit.degree) for fit in measured.cost.times} == {
            (AttentionKind.LOCAL, 1), (AttentionKind.ULYSSES, 2), (AttentionKind.RING, 3), (AttentionKind.USP, 4)
        }
        assert {(fit.kind, fit.inner_degree) for fit in measured.cost.times if fit.inner_degree > 1} == {
            (AttentionKind.USP, 2)
        }
        assert {sample.op for sample in measured.operations} == {"linear", "attention", "p2p", "all_to_all"}
        assert yaml.safe_load(yaml.safe_dump(to_plain(measured.cost))) == to_plain(measured.cost)  # machine.yaml
        assert measured.cost.step_fixed_s > 0 and measured.cost.peak_flop_per_s > 0
        assert measured.cost.memory.fixed_bytes > 0 and measured.cost.memory.bytes_per_token >= 1
        assert all(fit.group_s(num_tokens=128, num_tokens2=128**2, num_sequences=1) > 0 for fit in measured.cost.times)


def test_length_design_separates_the_coefficients():
    for degree in (1, 2, 3, 8):
        rows = [
            [sum(size * size for size in lengths), sum(lengths), len(lengths), 1]
            for lengths in length_design(2048, degree)
        ]
        scaled = np.asarray(rows, dtype=float) / np.linalg.norm(rows, axis=0)
        if degree != 3:
            assert np.linalg.matrix_rank(scaled, tol=1e-3) == 4
        assert np.linalg.matrix_rank(scaled[:, 1:], tol=1e-3) == 3  # what a shape does not share with others
