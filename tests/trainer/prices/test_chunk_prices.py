"""Chunks measured in a run, chosen by its plans, run, and weighed again."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from planner.codec import from_plain
from planner.cost.fits import ActivationFit, MemoryFit
from planner.cost.limits import PlanLimits
from planner.cost.model import CostModel
from planner.plan import AttentionKind, MemoryAction
from planner.step_planner import plan_step
from tests.plans import cost_model, step_problem
from tests.ranks import RankPool
from tests.trainer.step.dense_runs import CONFIG, SPEC
from tests.trainer.step.test_one_step import reader, start
from trainer.checkpoint.tensors import weights_digest
from trainer.prices.calibration import PEAK_MARGIN, MeasuredShape
from trainer.prices.chunk_prices import _fit_bytes, _fit_seconds, _Probe, chunks_may_pay, resident_bytes
from trainer.prices.layer_profile import profile_layer
from trainer.prices.planned_memory import plan_memory, policy_note
from trainer.settings.tree import DataConfig, MemoryConfig, ParallelConfig
from trainer.step.one_step import compile_stage_program, train_step

LONGEST = 1024
LEAN = dataclasses.replace(
    SPEC, num_layers=6, hidden_dim=64, ffn_dim=256, num_query_heads=8, num_kv_heads=1, head_dim=8, qk_norm=False
)
"""128 bytes of K/V and dK/dV a layer and token, 512 of what recomputing leaves."""
SAVED = LEAN.num_layers * LEAN.saved_bytes_per_token(4)
RING = (AttentionKind.RING,)


def measured_cost(bytes_per_token=SAVED):
    cost = cost_model(2)
    return dataclasses.replace(
        cost, memory=MemoryFit(fixed_bytes=0, bytes_per_token=bytes_per_token),
        provenance=dataclasses.replace(cost.provenance, source="measured"),
    )


def chunked_run(rank, world_size, init_method, folder, parallel):
    """Measure, plan in a budget that only chunks fit, and run a step: (cost, plan, peaks over a tiny step's, note,
    whether weights stayed)."""
    config = dataclasses.replace(
        CONFIG, run=dataclasses.replace(CONFIG.run, dir=str(folder)), parallel=parallel,
        memory=MemoryConfig(tier="host"), data=DataConfig(max_length=LONGEST, tokens_per_step=2 * LONGEST),
    )
    runtime = start(rank, world_size, init_method, config, LEAN)
    before, given = weights_digest(runtime), dataclasses.replace(measured_cost(), sharding=runtime.sharding)
    asked = PlanLimits(device_budget_bytes=SAVED * LONGEST // 6, kinds=RING, max_ulysses_degree=8)
    memory, cost, limits = plan_memory(config, runtime, given, asked, folder / "cache", world_size)
    same = before == weights_digest(runtime)
    resumed = dataclasses.replace(config, run=dataclasses.replace(config.run, resume=True))
    again, cost_again, _ = plan_memory(resumed, runtime, given, asked, folder / "none", world_size)
    again.close()
    assert cost_again.digest == cost.digest, "a resumed run plans with what it began with"
    runtime = dataclasses.replace(runtime, memory=memory)
    # room for the fixed part of a chunk, which at this size is nearly all of it
    limits = dataclasses.replace(
        limits, policies=(MemoryAction.KEEP, MemoryAction.CHUNK),
        device_budget_bytes=limits.device_budget_bytes + cost.chunks.fixed_bytes,
    )
    cost = dataclasses.replace(cost, memory=dataclasses.replace(
        cost.memory, fixed_bytes=cost.chunks.fixed_bytes
    ), chunks=dataclasses.replace(cost.chunks, fixed_bytes=0))

    def planned(lengths):
        return plan_step(step_problem(lengths, world_size, cost, limits), step=0, strategy="adaptive")

    def peak_of(plan):
        read = reader([np.arange(each.num_tokens + 1) % LEAN.vocab_size for each in plan.sequences])
        program = compile_stage_program(runtime, plan)
        return max(max(
            train_step(runtime, program, read, num_tokens=plan.num_tokens, lr=0.0).peak_bytes) for _ in range(2)
        )

    plan = planned([LONGEST, 50])
    base = peak_of(planned([8, 8]))
    over = peak_of(plan) - base
    memory.close()
    return cost, plan, over, policy_note(planned([LONGEST]), cost, limits), same


@pytest.fixture(scope="module")
def pool():
    pool = RankPool(2)
    yield pool
    pool.close()


@pytest.mark.parametrize("parallel", [
    ParallelConfig(), pytest.param(ParallelConfig(sharding="zero3"), marks=pytest.mark.nightly),
], ids=["gather_once", "zero3"])
def test_measured_chunks_are_chosen_run_and_stay_within_their_prediction(pool, tmp_path, parallel):
    cost, plan, over, note, same = pool.run(chunked_run, tmp_path, parallel)[0]
    fit = cost.chunks
    assert same and fit is not None
    assert fit.resident_bytes_per_token == pytest.approx(PEAK_MARGIN * 6 * 2 * 8 * (4 + 4))
    assert fit.bytes_per_token >= SAVED * (1 - 1e-9)
    assert 2 / 7 <= fit.again_attention == fit.again_linear and fit.s_per_chunk >= 0
    assert "chunks: measured on whole microbatches in chunks of two sizes" in cost.provenance.notes
    stored = json.loads((tmp_path / "memory.json").read_text())
    kept = from_plain(CostModel, stored["cost"], where="memory.json").chunks
    assert dataclasses.replace(kept, fixed_bytes=0) == fit
    assert plan.microbatches[0].memory.chunk_tokens > 0
    assert over <= plan.peak_bytes
    assert "chunks of " in note and "for a second forward" in note


def test_chunks_are_measured_only_where_they_may_pay():
    """A model with as many KV heads as query heads keeps more in chunks than recomputing leaves."""
    wide = dataclasses.replace(LEAN, num_kv_heads=8)
    pool = RankPool(1)
    try:
        for spec, pays in ((LEAN, True), (wide, False)):
            assert pool.run(may_pay, spec, world_size=1) == [pays]
    finally:
        pool.close()


def may_pay(rank, world_size, init_method, spec):
    runtime = start(rank, world_size, init_method, CONFIG, spec)
    profile = profile_layer(runtime, num_tokens=64)
    pair = profile.pair_bytes_per_token
    saved = spec.num_layers * (pair + sum(tensor.bytes_per_token for tensor in profile.tensors))
    activation = ActivationFit(
        swap_bytes_per_token=0.0, recompute_bytes_per_token=saved - spec.num_layers * pair,
        recompute_s_per_token=1e-6, copy_bytes_per_s=1.0, hidden_share=0.0,
    )
    assert resident_bytes(runtime) == spec.num_layers * 2 * spec.num_kv_heads * spec.head_dim * 8
    return chunks_may_pay(runtime, measured_cost(saved), activation)


def probe(shape, chunk_tokens, seconds, peak_bytes=0):
    return _Probe(shape, chunk_tokens, seconds, peak_bytes)


def test_seconds_that_follow_the_price_are_found_again():
    cost, local, ring = measured_cost(), MeasuredShape(AttentionKind.LOCAL, 1), MeasuredShape(AttentionKind.RING, 2)
    probes = []
    for shape in (local, ring):
        fit, total = cost.time_fit(shape.kind, shape.degree), 1000 * shape.degree
        work_s = fit.s_per_token2 * total**2 + fit.s_per_token * total
        probes.append(probe(shape, 0, work_s))
        probes += [probe(shape, size, 1.5 * work_s + 3e-3 * (1000 / size + 1)) for size in (500, 125)]
    again, s_per_chunk = _fit_seconds(probes, cost, 1000)
    assert (again, s_per_chunk) == pytest.approx((0.5, 3e-3))
    free = [dataclasses.replace(each, seconds=1.0) for each in probes]
    assert _fit_seconds(free, cost, 1000) == (2 / 7, 0.0)  # never less than attention's own share


def test_no_measured_peak_lies_above_its_line():
    local, ring = MeasuredShape(AttentionKind.LOCAL, 1), MeasuredShape(AttentionKind.RING, 2)
    probes = [probe(local, 500, 0.0, 70_000), probe(local, 125, 0.0, 30_000), probe(ring, 500, 0.0, 95_000)]
    fixed, slope, shared = _fit_bytes(probes, 100.0, 10_000)
    assert slope == pytest.approx(40_000 / 375)
    for each in probes:
        wide = each.shape.degree * shared if each.shape.degree > 1 else 0
        assert each.peak_bytes <= 10_000 + fixed + each.chunk_tokens * (slope + wide) + 1e-6
    assert _fit_bytes(probes[:2], 200.0, 10_000) == (0.0, 200.0, 0.0)  # whole microbatches say more
