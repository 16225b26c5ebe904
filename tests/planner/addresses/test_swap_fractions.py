"""Swap fractions: against HiGHS on the program as written, against MEMO's formula, and where nothing fits."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.addresses.swap_fractions import Binding, PairPlace, SavedTensor, SwapProblem, memo_alpha, solve_fractions
from planner.errors import InfeasibleError, SpecError
from planner.solver import LinearModel, Outcome, WorkLimits
from planner.units import GIB, KIB

LIMITS = WorkLimits(max_nodes=100, max_work=10**9, time_limit_s=30, relative_gap=1e-9)


def random_problem(seed, *, spare=True):
    rng = random.Random(seed)
    tensors = tuple(
        SavedTensor(
            name=f"t{number}", bytes_per_token=rng.choice([0, 2, 10, rng.uniform(1, 50)]),
            recompute_s_per_token=rng.choice([0, 1e-6, rng.uniform(0, 1e-5)]),
        )
        for number in range(rng.randint(1, 6))
    )
    return SwapProblem(
        tensors=tensors, pair_bytes_per_token=rng.uniform(0, 20), num_tokens=rng.randint(1, 5000),
        num_layers=rng.randint(3, 9), forward_s=rng.uniform(0, 0.02), backward_s=rng.uniform(0, 0.04),
        store_bytes_per_s=rng.uniform(1e5, 4e7), load_bytes_per_s=rng.uniform(1e5, 4e7),
        tier_capacity_bytes=rng.uniform(0, 2e6),
        device_spare_bytes=rng.choice([0, rng.uniform(0, 1e6)]) if spare else 0.0,
    )


def linear_program(problem, pair):
    """The program of the module's docstring through HiGHS, for one place of the pair: added seconds, None where
    infeasible."""
    model = LinearModel()
    layers, tokens = problem.num_swapped_layers, problem.num_tokens
    out, stay = model.variable(), model.variable()  # seconds exposed, forward and backward
    objective, swapped, kept, constant = {out: layers, stay: layers}, {}, {}, 0.0
    for tensor in problem.tensors:
        size, seconds = tensor.bytes_per_token * tokens, tensor.recompute_s_per_token * tokens
        swap, keep = model.variable(high=1), model.variable(high=1)
        model.row({swap: 1, keep: 1}, high=1)
        swapped[swap], kept[keep] = size, size
        objective[swap] = objective[keep] = -seconds * layers
        constant += seconds * layers
    in_tier = problem.pair_bytes if pair is PairPlace.TIER else 0.0
    on_device = problem.pair_bytes - in_tier
    for seconds, rate, exposed in (
        (problem.forward_s, problem.store_bytes_per_s, out), (problem.backward_s, problem.load_bytes_per_s, stay)
    ):
        model.row({exposed: 1, **{v: -b / rate for v, b in swapped.items()}}, low=in_tier / rate - seconds)
    model.row(swapped, high=problem.tier_capacity_bytes / layers - in_tier)
    model.row(kept, high=problem.device_spare_bytes / layers - on_device)
    model.minimize(objective)
    solution = model.solve(LIMITS)
    return None if solution.outcome is Outcome.INFEASIBLE else solution.objective + constant


def check_feasible(problem, plan):
    layers = problem.num_swapped_layers
    for swap, keep in zip(plan.swap_fractions, plan.keep_fractions, strict=True):
        assert 0 <= swap <= 1 and 0 <= keep <= 1 and swap + keep <= 1 + 1e-9
    assert plan.tier_bytes <= problem.tier_capacity_bytes * (1 + 1e-9)
    assert plan.device_bytes <= problem.device_spare_bytes * (1 + 1e-9)
    assert plan.exposed_s == pytest.approx(layers * problem.exposed_s(plan.tier_bytes / layers), abs=1e-12)


class TestOptimum:
    @pytest.mark.parametrize("seed", range(60))
    def test_equals_the_linear_program(self, seed):
        problem = random_problem(seed)
        by_pair = {pair: linear_program(problem, pair) for pair in PairPlace}
        feasible = [value for value in by_pair.values() if value is not None]
        if not feasible:
            with pytest.raises(InfeasibleError, match="layer inputs and attention outputs"):
                solve_fractions(problem)
            return
        plan = solve_fractions(problem)
        check_feasible(problem, plan)
        assert plan.added_s == pytest.approx(min(feasible), rel=1e-6, abs=1e-9)
        assert by_pair[plan.pair] == pytest.approx(min(feasible), rel=1e-6, abs=1e-9)

    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(st.integers(0, 10**6))
    def test_never_slower_than_one_alpha(self, seed):
        problem = random_problem(seed, spare=False)
        try:
            memo = memo_alpha(problem)
        except InfeasibleError:
            with pytest.raises(InfeasibleError):
                solve_fractions(problem)
            return
        plan = solve_fractions(problem)
        check_feasible(problem, memo)
        check_feasible(problem, plan)
        assert plan.added_s <= memo.added_s * (1 + 1e-9) + 1e-12

    def test_strictly_better_where_tensors_differ(self):
        problem = memo_7b(num_tokens=1024 * KIB, tier_gib=2048)
        memo, plan = memo_alpha(problem), solve_fractions(problem)
        assert 0.1 < memo.swap_fractions[0] < 0.9
        assert plan.tier_bytes == pytest.approx(memo.tier_bytes, rel=1e-6)
        assert plan.recompute_s < 0.8 * memo.recompute_s
        gelu, up = (dict(zip([t.name for t in problem.tensors], plan.swap_fractions, strict=True))[name]
                    for name in ("gelu", "mlp up"))
        assert gelu < up, "what costs nothing to make again goes last"


def memo_7b(*, num_tokens, tier_gib, device_spare_bytes=0.0):
    """MEMO's GPT-7B on one of 8 devices: bytes and FLOPs per token and layer, at 170 TFLOP/s and 11 GB/s."""
    h, flop_per_s, link = 4096, 170e12, 11e9

    def tensor(name, vectors, flop):
        return SavedTensor(name=name, bytes_per_token=2 * h * vectors, recompute_s_per_token=flop / flop_per_s + 1e-10)

    forward_s = num_tokens * (24 * h * h + 2 * num_tokens * h) / flop_per_s
    return SwapProblem(
        tensors=(tensor("norm", 1, 0), tensor("qkv", 3, 6 * h * h), tensor("residual", 1, 2 * h * h),
                 tensor("norm 2", 1, 0), tensor("mlp up", 4, 8 * h * h), tensor("gelu", 4, 0)),
        pair_bytes_per_token=2 * h * 2, num_tokens=num_tokens // 8, num_layers=32, forward_s=forward_s / 8,
        backward_s=2 * forward_s / 8, store_bytes_per_s=link, load_bytes_per_s=link,
        tier_capacity_bytes=tier_gib * GIB / 8, device_spare_bytes=device_spare_bytes,
    )


class TestMemoAlpha:
    @pytest.mark.parametrize(("kilo_tokens", "alpha"), [(1024, 0.47), (1408, 0.30), (2048, 0.16)])
    def test_host_bound_of_the_paper_s_own_constraint(self, kilo_tokens, alpha):
        plan = memo_alpha(memo_7b(num_tokens=kilo_tokens * KIB, tier_gib=2048))
        assert plan.binding is Binding.HOST and plan.swap_fractions[0] == pytest.approx(alpha, abs=0.006)

    def test_link_bound_is_the_closed_form(self):
        problem = memo_7b(num_tokens=64 * KIB, tier_gib=2048)
        others = sum(t.bytes_per_token for t in problem.tensors) * problem.num_tokens
        wanted = (problem.store_bytes_per_s * problem.forward_s - problem.pair_bytes) / others
        plan = memo_alpha(problem)
        assert 0 < wanted < 1 and plan.swap_fractions == (pytest.approx(wanted),) * 6
        assert plan.binding is Binding.LINK and plan.exposed_s == pytest.approx(0, abs=1e-9)

    def test_all_fits(self):
        plan = memo_alpha(memo_7b(num_tokens=512 * KIB, tier_gib=10**5))
        assert plan.swap_fractions == (1.0,) * 6 and plan.binding is Binding.NOTHING and plan.added_s == 0

    def test_pair_too_slow_is_alpha_0_and_says_what_shows(self):
        problem = dataclasses.replace(memo_7b(num_tokens=64 * KIB, tier_gib=2048), store_bytes_per_s=1e8)
        plan = memo_alpha(problem)
        assert plan.swap_fractions == (0.0,) * 6 and plan.binding is Binding.LINK and plan.exposed_s > 0

    def test_pair_too_large_is_an_error_with_need_and_have(self):
        problem = memo_7b(num_tokens=1024 * KIB, tier_gib=100)
        with pytest.raises(InfeasibleError, match=r"need .* has 12.5 GiB") as caught:
            memo_alpha(problem)
        assert caught.value.available_bytes == 12.5 * GIB
        assert caught.value.needed_bytes == math.ceil(30 * problem.pair_bytes)


class TestPair:
    def test_stays_on_the_device_where_the_tier_cannot_take_it(self):
        problem = memo_7b(num_tokens=64 * KIB, tier_gib=1, device_spare_bytes=10**12)
        plan = solve_fractions(problem)
        assert plan.pair is PairPlace.DEVICE and "stay on the device" in plan.describe(problem)
        assert plan.added_s == 0 and plan.device_bytes <= 10**12

    def test_describe_names_shares_and_what_binds(self):
        problem = memo_7b(num_tokens=1024 * KIB, tier_gib=2048)
        text = solve_fractions(problem).describe(problem)
        assert "qkv 100%" in text and "bound by host" in text and "256 GiB in the tier" in text

    def test_bad_numbers(self):
        problem = memo_7b(num_tokens=1024, tier_gib=1)
        for change in ({"store_bytes_per_s": 0.0}, {"forward_s": math.nan}, {"tier_capacity_bytes": -1}):
            with pytest.raises(SpecError, match="swap program"):
                dataclasses.replace(problem, **change)
