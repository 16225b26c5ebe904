"""Chunks measured in a run, chosen by its plans, run, and weighed again."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from planner.codec import from_plain
from planner.cost import CostModel
from planner.plan import AttentionKind, MemoryAction
from planner.step_planner import plan_step
from tests.ranks import RankPool
from tests.trainer.test_equality import CONFIG, SPEC
from tests.trainer.test_step import reader, start
from trainer.calibration import MeasuredShape, calibrate
from trainer.checkpoint import weights_digest
from trainer.chunk_prices import _fit_bytes, _fit_seconds, _Probe, chunks_may_pay, resident_bytes
from trainer.config import DataConfig, MemoryConfig, ParallelConfig
from trainer.planned_memory import plan_memory, policy_note
from trainer.plan_inputs import plan_limits
from trainer.step import compile_stage_program, train_step

LONGEST = 1024
LEAN = dataclasses.replace(
    SPEC, num_layers=6, hidden_dim=64, ffn_dim=256, num_query_heads=8, num_kv_heads=1, head_dim=8, qk_norm=False
)
"""384 bytes of K/V and dK/dV a layer and token... few beside what recomputing leaves: 64 + 64 values of the pair."""
LOCAL, RING = AttentionKind.LOCAL, AttentionKind.RING
SHAPES = (MeasuredShape(LOCAL, 1), MeasuredShape(RING, 2))


def chunked_run(rank, world_size, init_method, folder, parallel):
    """Calibrate, plan in a budget that only chunks fit, and run a step: (cost, plan, peaks, note, weights kept)."""
    config = dataclasses.replace(
        CONFIG, run=dataclasses.replace(CONFIG.run, dir=str(folder)), parallel=parallel, memory=MemoryConfig(tier="host"),
        data=DataConfig(max_length=LONGEST, tokens_per_step=2 * LONGEST),
    )
    runtime = start(rank, world_size, init_method, config, LEAN)
    before = weights_digest(runtime)
    measured = calibrate(runtime, SHAPES, max_length=LONGEST, machine="here").cost
    room = int(measured.memory.bytes_per_token * LONGEST / 6)
    limits = plan_limits(config, LEAN, device_budget_bytes=measured.memory.fixed_bytes + room)
    limits = dataclasses.replace(limits, kinds=(RING,))
    memory, cost, limits = plan_memory(config, runtime, measured, limits, folder / "cache", world_size)
    same = before == weights_digest(runtime)
    resumed = dataclasses.replace(config, run=dataclasses.replace(config.run, resume=True))
    again, cost_again, _ = plan_memory(resumed, runtime, measured, limits, folder / "none", world_size)
    again.close()
    assert cost_again.digest == cost.digest, "a resumed run plans with what it began with"
    runtime = dataclasses.replace(runtime, memory=memory)
    limits = dataclasses.replace(limits, policies=(MemoryAction.KEEP, MemoryAction.CHUNK))
    lengths = [LONGEST, 50]
    plan = plan_step(lengths, step=0, num_ranks=world_size, cost=cost, limits=limits, strategy="adaptive")
    read = reader([np.arange(size + 1) % LEAN.vocab_size for size in lengths])
    program = compile_stage_program(runtime, plan)
    peaks = [
        train_step(runtime, program, read, num_tokens=plan.num_tokens, lr=0.0).peak_bytes for _ in range(2)
    ]
    memory.close()
    note = policy_note(plan_step([LONGEST], step=0, num_ranks=world_size, cost=cost, limits=limits,
                                 strategy="adaptive"), cost, limits)
    return cost, plan, peaks, note, same


@pytest.fixture(scope="module")
def pool():
    pool = RankPool(2)
    yield pool
    pool.close()


@pytest.mark.parametrize("parallel", [
    ParallelConfig(), pytest.param(ParallelConfig(sharding="zero3"), marks=pytest.mark.nightly),
], ids=["gather_once", "zero3"])
def test_measured_chunks_are_chosen_run_and_stay_within_their_prediction(pool, tmp_path, parallel):
    cost, plan, peaks, note, same = pool.run(chunked_run, tmp_path, parallel)[0]
    fit = cost.chunks
    assert same and fit is not None
    assert fit.resident_bytes_per_token == pytest.approx(1.035 * 6 * 2 * 8 * (4 + 4))
    assert fit.bytes_per_token >= cost.memory.bytes_per_token * (1 - 1e-9)
    assert 2 / 7 <= fit.again_attention == fit.again_linear < 5 and 0 <= fit.s_per_chunk < 1
    assert any("chunks: measured on microbatches of 1024 tokens" in each for each in cost.provenance.notes)
    stored = json.loads((tmp_path / "memory.json").read_text())
    assert from_plain(CostModel, stored["cost"], where="memory.json").chunks == fit
    assert plan.microbatches[0].memory.chunk_tokens > 0
    for peak in peaks:
        assert max(peak) <= plan.peak_bytes
    assert "chunks of " in note and "for another forward" in note


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
    from tests.plans import cost_model
    from trainer.layer_profile import profile_layer

    profile = profile_layer(runtime, num_tokens=64)
    saved = spec.num_layers * (profile.pair_bytes_per_token + sum(t.bytes_per_token for t in profile.tensors))
    cost = dataclasses.replace(
        cost_model(1), memory=dataclasses.replace(cost_model(1).memory, fixed_bytes=0, bytes_per_token=saved)
    )
    from planner.cost import ActivationFit

    activation = ActivationFit(
        swap_bytes_per_token=0.0, recompute_bytes_per_token=saved - spec.num_layers * profile.pair_bytes_per_token,
        recompute_s_per_token=1e-6, copy_bytes_per_s=1.0, hidden_share=0.0,
    )
    assert resident_bytes(runtime) == spec.num_layers * 2 * spec.num_kv_heads * spec.head_dim * 8
    return chunks_may_pay(runtime, cost, activation)
