"""Errors that other trainers shipped without noticing, each with a test that fails if Longhaul had it.

The cases are bugs that users reported against public sequence-parallel trainers; those of the attention alone stand in
``tests/parallel/test_silent_errors.py``. Losses and gradient norms are compared with the dense model's, in fp32, to
1e-5; the norm and not the updated weights, because Adam forgives a wrong scale.
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from memory import disk_tier
from memory.chunked_loss import IGNORE
from memory.ledger import MemoryLedger
from parallel.agree import agree_on_plan, compare_digests
from parallel.program import compile_rank_program
from planner.cost.limits import PlanLimits
from planner.errors import PlanMismatchError, SpecError
from planner.plan import AttentionGroup, AttentionKind, Span, StepPlan, plan_digest
from planner.pricing.verify import verify_plan
from planner.step_planner import plan_step
from planner.units import MIB
from tests.plans import cost_model, step_problem, verified_plan
from tests.ranks import RankPool
from tests.trainer import dense
from tests.trainer.step.dense_runs import CONFIG, SPEC, full_weights
from trainer.build import build_runtime
from trainer.data.batch import TokenRows, token_rows
from trainer.data.ledger import SampleLedger
from trainer.rank_env import RankEnv
from trainer.settings.resolve import resolve_config
from trainer.settings.tree import ParallelConfig
from trainer.step.one_step import train_step
from trainer.step.runtime import Runtime

NUM_RANKS = 4
TOLERANCE = 1e-5
CPU = torch.device("cpu")
SMALL = dataclasses.replace(SPEC, num_layers=1)
LENGTHS = (61, 40, 23, 17, 5, 1)
KINDS = (AttentionKind.ULYSSES, AttentionKind.RING)


def documents() -> list[np.ndarray]:
    rng = np.random.default_rng(11)
    return [rng.integers(0, SMALL.vocab_size, size=size + 1) for size in LENGTHS]


def start(rank: int, world_size: int, init_method: str, tensor_parallel: int = 1) -> Runtime:
    config = dataclasses.replace(CONFIG, parallel=ParallelConfig(tensor_parallel=tensor_parallel))
    env = RankEnv(rank=rank, world_size=world_size, local_rank=rank, local_world_size=world_size)
    return build_runtime(config, env, SMALL, init_method=init_method)


def one_step(
    rank: int, world_size: int, init_method: str, tensor_parallel: int, plan: StepPlan, unlabelled: tuple[int, ...]
) -> tuple[float, float]:
    """(loss, gradient norm) of the first step by this plan; documents in ``unlabelled`` carry no loss."""
    runtime = start(rank, world_size, init_method, tensor_parallel)
    texts = documents()

    def read(spans: tuple[Span, ...]) -> TokenRows:
        rows = token_rows([texts[s.sequence][s.start_token : s.stop_token + 1] for s in spans], spans, CPU)
        masked = [torch.full((s.num_tokens,), s.sequence in unlabelled) for s in spans]
        return dataclasses.replace(rows, labels_T=rows.labels_T.masked_fill(torch.cat(masked), IGNORE))

    labelled = sum(size for place, size in enumerate(LENGTHS) if place not in unlabelled)
    program = compile_rank_program(plan, runtime.mesh.data_rank)
    outcome = train_step(runtime, program, read, num_tokens=labelled, lr=1e-3)
    return outcome.loss, outcome.grad_norm


def initial_weights(rank: int, world_size: int, init_method: str) -> dict[str, np.ndarray]:
    return full_weights(start(rank, world_size, init_method))


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    pool = RankPool(NUM_RANKS)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def weights(pool: RankPool) -> dict[str, np.ndarray]:
    return pool.run(initial_weights, world_size=1)[0]


def dense_step(weights: dict[str, np.ndarray], unlabelled: tuple[int, ...] = ()) -> tuple[float, float]:
    """(loss, gradient norm) of the dense model, each document by itself."""
    leaves = {name: torch.from_numpy(weight).double().requires_grad_() for name, weight in weights.items()}
    labelled = [torch.from_numpy(ids) for place, ids in enumerate(documents()) if place not in unlabelled]
    loss = sum(dense.document_loss(leaves, SMALL, ids) for ids in labelled) / sum(len(ids) - 1 for ids in labelled)
    loss.backward()
    return loss.item(), math.sqrt(sum(leaf.grad.square().sum().item() for leaf in leaves.values()))


def group(kind: str, ranks: tuple[int, ...], sequences: tuple[int, ...]) -> AttentionGroup:
    return AttentionGroup(kind=AttentionKind(kind), ranks=ranks, sequences=sequences)


def shared_plan(kind: str, degree: int, num_ranks: int = NUM_RANKS) -> StepPlan:
    """All documents packed into one group; ranks outside of it have nothing to do."""
    everything = tuple(range(len(LENGTHS)))
    shared = group(kind if degree > 1 else "local", tuple(range(degree)), everything)
    return verified_plan([[shared]], LENGTHS, num_ranks)


def check(results: list[tuple[float, float]], wanted: tuple[float, float]) -> None:
    assert len(set(results)) == 1, "ranks report different numbers"
    assert results[0] == pytest.approx(wanted, rel=TOLERANCE)


class TestLossAndGradients:
    def test_no_inflated_loss_of_packed_documents_in_a_ring(self, pool: RankPool, weights: dict[str, Any]) -> None:
        """Ring attention over documents packed beforehand: a loss 1.8 times too high."""
        check(pool.run(one_step, 1, shared_plan("ring", 4), ()), dense_step(weights))

    @pytest.mark.parametrize("kind", ["ring", "ulysses"])
    @pytest.mark.parametrize("degree", [1, 2, 4])
    def test_no_loss_scaled_by_the_degree(
        self, pool: RankPool, weights: dict[str, Any], kind: str, degree: int
    ) -> None:
        """Loss or gradients that were multiplied or divided by the number of ranks that share a sequence."""
        check(pool.run(one_step, 1, shared_plan(kind, degree), ()), dense_step(weights))

    def test_no_nan_where_all_of_a_ranks_tokens_are_masked(self, pool: RankPool, weights: dict[str, Any]) -> None:
        """Ranks 0 and 1 hold only tokens without a label; an average over each rank's own tokens divides by zero."""
        plan = verified_plan(
            [[group("ring", (0, 1), (0, 1)), group("ulysses", (2, 3), (2, 3)), group("local", (2,), (4, 5))]],
            LENGTHS, NUM_RANKS,
        )
        check(pool.run(one_step, 1, plan, (0, 1)), dense_step(weights, (0, 1)))

    def test_no_token_counted_twice_in_metrics(self, pool: RankPool, weights: dict[str, Any]) -> None:
        """Ranks that share a document, or hold the same tokens for other heads, each adding the loss to the metrics."""
        for plan, tensor_parallel in (
            (shared_plan("ulysses", 2, num_ranks=2), 2),
            (verified_plan([[group("ring", (0, 1), (0,))], [group("local", (1,), (1, 2, 3, 4, 5))]], LENGTHS, 2), 2),
            (shared_plan("ulysses", 3), 1),
        ):
            check(pool.run(one_step, tensor_parallel, plan, ()), dense_step(weights))


def own_plan(rank: int) -> StepPlan:
    """What a planner that is not a function of its input would give: every rank another plan."""
    limits = PlanLimits(device_budget_bytes=2**40, max_ulysses_degree=4, kinds=KINDS)
    return plan_step(
        step_problem(LENGTHS, NUM_RANKS, cost_model(NUM_RANKS), limits), step=0, strategy="static", degree=rank + 1
    )


def run_with_own_plans(rank: int, world_size: int, init_method: str) -> tuple[str, str]:
    """(digest of the plan this rank would run, what it says about running its own)."""
    group = start(rank, world_size, init_method).mesh.control_group
    limits = PlanLimits(device_budget_bytes=2**40, max_ulysses_degree=4, kinds=KINDS)

    def verify(plan: StepPlan) -> None:
        verify_plan(plan, step_problem(LENGTHS, NUM_RANKS, cost_model(NUM_RANKS), limits))

    agreed = agree_on_plan(own_plan(rank) if rank == 0 else None, source=0, group=group, verify=verify)
    with pytest.raises(PlanMismatchError) as refused:
        compare_digests(plan_digest(own_plan(rank)), group)
    return plan_digest(agreed), str(refused.value)


def test_no_hang_because_ranks_disagree_on_the_plan(pool: RankPool) -> None:
    """Each rank computed the exchange plan by itself; where they differed, the all-to-all hung."""
    assert len({plan_digest(own_plan(rank)) for rank in range(NUM_RANKS)}) == NUM_RANKS
    results = pool.run(run_with_own_plans)
    assert {digest for digest, _ in results} == {plan_digest(own_plan(0))}
    assert all("do not agree" in said for _, said in results)


def one_line(arguments: list[str]) -> str:
    with pytest.raises(SpecError) as refused:
        resolve_config(arguments)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_no_load_balancing_loss_over_a_whole_pack_of_documents() -> None:
    """A mixture-of-experts auxiliary loss that took a pack of documents for one sequence: such models are refused."""
    assert "mixtral-8x7b" in one_line(["--model.preset", "mixtral-8x7b"])


def test_no_stale_activations_after_a_reload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Activation offload whose reload overtook its own copy-out, first of all in the first step: here every copy out is
    slow, is asked back at once, latest first as a backward does, and later steps use the places of earlier ones."""
    pwrite = os.pwrite

    def slow_write(file: int, data: bytes, at: int) -> int:
        time.sleep(0.01)
        return pwrite(file, data, at)

    monkeypatch.setattr(disk_tier.os, "pwrite", slow_write)
    tier = disk_tier.DiskTier(tmp_path / "swap", MIB, MemoryLedger({"disk": MIB}))
    try:
        for step in range(3):
            layers = [torch.full((500, 7), float(10 * step + layer)) for layer in range(6)]
            stored = [tier.store(layer) for layer in layers]
            back = [torch.full_like(layer, -1) for layer in layers]
            loads = [tier.load(stored[place], back[place]) for place in reversed(range(6))]
            for load in loads:
                load.wait()
            assert all(torch.equal(a, b) for a, b in zip(layers, back, strict=True)), step
            for each in stored:
                each.transfer.wait()
                tier.release(each)
    finally:
        tier.close()


def consumed(plan: StepPlan, samples: tuple[int, ...]) -> Counter[tuple[int, int]]:
    """How often each (sample, token) is computed, over all ranks."""
    programs = [compile_rank_program(plan, rank) for rank in range(plan.num_ranks)]
    return Counter(
        (samples[span.sequence], token)
        for program in programs for microbatch in program.microbatches for span in microbatch.spans
        for token in range(span.start_token, span.stop_token)
    )


def test_no_data_skipped_or_repeated_after_resuming_with_other_ranks() -> None:
    """A run that went on with fewer data ranks lost or repeated samples, and nobody noticed."""
    rng = np.random.default_rng(2)
    lengths = np.clip(rng.lognormal(3.0, 1.0, size=60).astype(np.int64), 1, 200)

    def make_ledger() -> SampleLedger:
        return SampleLedger(lengths, seed=5, tokens_per_step=260)

    seen: Counter[tuple[int, int]] = Counter()
    ledger, wanted = make_ledger(), make_ledger()
    step = 0
    for num_ranks, num_steps in ((4, 3), (2, 2), (3, 2)):  # each a run that saves its position at the end
        cost = cost_model(num_ranks)
        limits = PlanLimits(device_budget_bytes=2**40, max_ulysses_degree=4, kinds=KINDS)
        for _ in range(num_steps):
            samples = ledger.batch(step)
            assert samples == wanted.batch(step)
            sizes = [int(lengths[sample]) for sample in samples]
            plan = plan_step(step_problem(sizes, num_ranks, cost, limits), step=step, strategy="adaptive")
            seen += consumed(plan, samples)
            step += 1
        position = ledger.position(step)
        ledger = make_ledger()
        ledger.restore(position)
    uninterrupted = [sample for number in range(step) for sample in wanted.batch(number)]
    assert len(set(uninterrupted)) == len(uninterrupted) < len(lengths), "the test must stay within an epoch"
    assert seen == Counter((sample, token) for sample in uninterrupted for token in range(lengths[sample]))
