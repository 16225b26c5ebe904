"""Cost models: the sums, and the derived one against FlexSP's released coefficients and plain arithmetic."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.cost.data_sheet import derive_cost
from planner.cost.fits import MemoryFit, Provenance, TimeFit
from planner.cost.model import CostModel
from planner.errors import PlanError, SpecError
from planner.inputs.files import load_cluster, load_model
from planner.plan import AttentionKind, Sharding
from planner.units import MIB

LOCAL, ULYSSES, RING = AttentionKind.LOCAL, AttentionKind.ULYSSES, AttentionKind.RING


def simple_cost(bytes_per_token: float = 10.5, fixed_bytes: int = 1000) -> CostModel:
    fit = TimeFit(kind=LOCAL, degree=1, s_per_token2=0.5, s_per_token=2.0, s_per_sequence=10.0, fixed_s=100.0)
    return CostModel(
        times=(fit,), memory=MemoryFit(fixed_bytes=fixed_bytes, bytes_per_token=bytes_per_token), step_fixed_s=1.0,
        peak_flop_per_s=1.0, provenance=Provenance(source="derived", cluster="c", model="m"),
    )


def test_group_seconds_by_hand() -> None:
    assert simple_cost().group_s(LOCAL, 1, (3, 4)) == 0.5 * 25 + 2.0 * 7 + 10.0 * 2 + 100.0
    assert simple_cost().group_s(LOCAL, 1, iter((3, 4))) == simple_cost().group_s(LOCAL, 1, (3, 4))
    with pytest.raises(PlanError, match=r"no ring of degree 2"):
        simple_cost().group_s(RING, 2, (3,))


@pytest.mark.parametrize("value", [-1e-9, float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["s_per_token2", "s_per_token", "s_per_sequence", "fixed_s"])
def test_coefficients_are_finite_and_not_negative(name: str, value: float) -> None:
    good = {"s_per_token2": 0.0, "s_per_token": 0.0, "s_per_sequence": 0.0, "fixed_s": 0.0}
    with pytest.raises(SpecError, match=f"{name} must be 0 or more"):
        TimeFit(kind=RING, degree=3, **(good | {name: value}))


@settings(max_examples=200, deadline=None)
@given(tokens=st.integers(0, 10**6), per_token=st.floats(1.0, 1e6), fixed=st.integers(0, 10**9))
def test_a_budget_made_for_some_tokens_holds_them(tokens: int, per_token: float, fixed: int) -> None:
    cost = simple_cost(per_token, fixed)
    assert cost.max_local_tokens(cost.device_bytes(tokens)) >= tokens


@settings(max_examples=200, deadline=None)
@given(budget=st.integers(0, 10**12), per_token=st.floats(1.0, 1e7), fixed=st.integers(0, 10**11))
def test_max_local_tokens_is_the_largest_that_fits(budget: int, per_token: float, fixed: int) -> None:
    cost = simple_cost(per_token, fixed)
    tokens = cost.max_local_tokens(budget)
    if budget < fixed:
        assert tokens == 0
        return
    assert cost.device_bytes(tokens) <= budget
    assert cost.device_bytes(tokens + 2) > budget


# FlexSP's released coefficients: s per token^2, s per token, s per microbatch.
PUBLISHED = {
    "gpt-7b": (5.128e-9, 0.1839576e-3, 0.6293563),
    "gpt-13b": (9.2852e-9, 0.3060189e-3, 1.1325632),
    "gpt-30b": (15.4262e-9, 0.8035742e-3, 2.7893644),
}
# Bytes per second of resident data in an all-to-all of degree d, as released ("2 IB").
PUBLISHED_ALL_TO_ALL = {2: 119.54e9, 4: 104.07e9, 8: 96.5e9, 16: 10.33e9, 32: 5.94e9, 64: 4.87e9}


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_derived_a100_coefficients_are_near_the_published_ones(name: str) -> None:
    model = load_model(name)
    cost = derive_cost(load_cluster("a100-40g-64"), model, num_ranks=64, sharding=Sharding.ZERO3)
    local = cost.time_fit(LOCAL, 1)
    quadratic, linear, fixed = PUBLISHED[name]
    assert local.s_per_token2 == pytest.approx(quadratic, rel=0.11)
    assert local.s_per_token == pytest.approx(linear, rel=0.11)
    assert local.fixed_s == pytest.approx(fixed, rel=0.11)
    for degree, bytes_per_s in PUBLISHED_ALL_TO_ALL.items():
        fit = cost.time_fit(ULYSSES, degree)
        all_to_all_s = 8 * model.num_layers * model.hidden_dim * 2 / degree / bytes_per_s
        assert fit.s_per_token2 == pytest.approx(local.s_per_token2 / degree)
        assert fit.s_per_token - local.s_per_token / degree == pytest.approx(all_to_all_s, rel=0.26)


def test_derived_memory_of_gpt_7b_is_the_published_one() -> None:
    cost = derive_cost(load_cluster("a100-40g-64"), load_model("gpt-7b"), num_ranks=64)
    assert cost.memory.bytes_per_token == pytest.approx(4.480441895 * MIB, rel=0.01)  # kept in full, no recompute


def test_the_gathered_copy_decides_what_fits() -> None:
    cluster, model = load_cluster("a100-40g-64"), load_model("gpt-7b")
    once = derive_cost(cluster, model, num_ranks=64)
    lean = derive_cost(cluster, model, num_ranks=64, sharding=Sharding.ZERO3)
    assert once.sharding is Sharding.GATHER_ONCE and lean.sharding is Sharding.ZERO3
    assert once.memory.fixed_bytes == int(model.num_params * (16 / 64 + 6))  # bf16 copy and fp32 gradients in full
    assert once.memory.fixed_bytes > cluster.device.memory_bytes > 5 * lean.memory.fixed_bytes
    assert once.step_fixed_s > lean.step_fixed_s and once.time_fit(LOCAL, 1).fixed_s < lean.time_fit(LOCAL, 1).fixed_s
    assert once.digest != lean.digest


def test_one_rank_moves_nothing() -> None:
    cluster, model = load_cluster("h200-8"), load_model("qwen3-8b")
    cost = derive_cost(cluster, model, num_ranks=1)
    assert [(fit.kind, fit.degree) for fit in cost.times] == [(LOCAL, 1)]
    optimizer_s = 28 * model.num_params / cluster.device.memory_bytes_per_s
    assert cost.step_fixed_s == pytest.approx(optimizer_s)
    local = cost.time_fit(LOCAL, 1)
    assert local.s_per_token == pytest.approx(model.linear_flop(1) / (989e12 * 0.65))


def test_degrees() -> None:
    cost = derive_cost(load_cluster("h200-64"), load_model("llama-3-8b"), num_ranks=24)
    assert cost.degrees(RING) == tuple(range(2, 25))
    assert cost.degrees(ULYSSES) == (2, 4, 8, 16, 24)  # powers of two and all ranks
    assert derive_cost(load_cluster("h200-64"), load_model("llama-3-8b"), num_ranks=64).degrees(ULYSSES)[-1] == 32
    assert cost.provenance.source == "derived" and any("guess" in note for note in cost.provenance.notes)


def test_fewer_kv_heads_move_fewer_bytes_until_they_are_replicated() -> None:
    cluster = load_cluster("h200-64")
    cost = derive_cost(cluster, load_model("llama-3-8b"), num_ranks=64)  # 32 query, 8 KV heads, head_dim 128, 32 layers
    token_s = cost.time_fit(LOCAL, 1).s_per_token

    def moved(degree: int) -> float:
        return (cost.time_fit(ULYSSES, degree).s_per_token - token_s / degree) * degree

    layer_bytes = 2 * 128 * 2 * 32  # forward and backward of one head in bf16, all layers
    assert moved(8) == pytest.approx((2 * 32 + 2 * 8) * layer_bytes * 7 / 8 / 360e9)
    assert moved(16) == pytest.approx((2 * 32 + 2 * 16) * layer_bytes * 8 / 16 / 47e9)  # a KV head on each rank
    full = derive_cost(cluster, load_model("llama-7b"), num_ranks=64)  # 32 KV heads
    full_s = full.time_fit(ULYSSES, 8).s_per_token * 8 - full.time_fit(LOCAL, 1).s_per_token
    assert full_s == pytest.approx(4 * 32 * layer_bytes * 7 / 8 / 360e9)
    ring = cost.time_fit(RING, 8).s_per_token * 8 - token_s
    assert 0 < ring < full.time_fit(RING, 8).s_per_token * 8 - full.time_fit(LOCAL, 1).s_per_token


def test_leaving_the_node_costs() -> None:
    cost = derive_cost(load_cluster("h200-64"), load_model("llama-3-8b"), num_ranks=64)
    local_s = cost.time_fit(LOCAL, 1).s_per_token
    for kind in (ULYSSES, RING):
        inside = cost.time_fit(kind, 8).s_per_token * 8 - local_s
        across = cost.time_fit(kind, 16).s_per_token * 16 - local_s
        assert across > 3 * inside


def test_tensor_parallel_divides_work_and_weights() -> None:
    cluster, model = load_cluster("h200-8"), load_model("llama-3-8b")
    whole = derive_cost(cluster, model, num_ranks=4)
    halved = derive_cost(cluster, model, num_ranks=4, tensor_parallel=2)
    assert halved.memory.fixed_bytes == pytest.approx(whole.memory.fixed_bytes / 2, rel=1e-6)
    assert halved.memory.bytes_per_token == whole.memory.bytes_per_token / 2
    assert halved.peak_flop_per_s == 2 * whole.peak_flop_per_s
    one, two = whole.time_fit(LOCAL, 1), halved.time_fit(LOCAL, 1)
    assert two.s_per_token2 == one.s_per_token2 / 2
    assert one.s_per_token / 2 < two.s_per_token < one.s_per_token  # the all-reduces cost something


def test_impossible_settings() -> None:
    cluster, model = load_cluster("h200-8"), load_model("llama-3-8b")
    with pytest.raises(SpecError, match="16 data ranks x 1 tensor-parallel do not fit cluster h200-8 of 8 devices"):
        derive_cost(cluster, model, num_ranks=16)
    with pytest.raises(SpecError, match="do not fit"):
        derive_cost(cluster, model, num_ranks=8, tensor_parallel=2)
    with pytest.raises(SpecError, match="32 query heads cannot be split over 3"):
        derive_cost(cluster, model, num_ranks=2, tensor_parallel=3)


def test_the_end_of_a_step_may_be_the_peak():
    cost = simple_cost()
    ended = dataclasses.replace(cost, memory=dataclasses.replace(cost.memory, update_bytes=2_000))
    assert [ended.device_bytes(tokens) for tokens in (0, 10, 200)] == [2_000, 2_000, cost.device_bytes(200)]
    assert ended.max_local_tokens(1_999) == 0 < cost.max_local_tokens(1_999)
    assert ended.max_local_tokens(5_000) == cost.max_local_tokens(5_000)
