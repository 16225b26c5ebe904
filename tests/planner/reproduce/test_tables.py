"""Rebuilt tables: the arithmetic of errors and verdicts, and the systems on inputs small enough for a test."""

import itertools
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.errors import SpecError
from planner.plan import AttentionKind
from planner.reproduce import b200, flexsp, memo
from planner.reproduce.table import Reproduction, Row, Rule, as_json, load_data

TEN = Rule(name="ten", below=0.1, above=0.1)


def table(*rows: Row) -> Reproduction:
    return Reproduction(system="x", title="x", rows=rows, assumptions=("a",))


def row(ours: float, rule: Rule = TEN) -> Row:
    return Row(name=f"row {ours}", paper=2.0, ours=ours, rule=rule)


def test_errors_are_relative_to_the_published_figure() -> None:
    result = table(row(2.1), row(1.5), row(2.0))
    assert [each.error for each in result.rows] == pytest.approx([0.05, -0.25, 0.0])
    assert [each.within for each in result.rows] == [True, False, True]
    assert result.mean_error == pytest.approx(0.1)
    assert result.worst_error == pytest.approx(0.25)
    assert result.misses() == ("row 1.5: -25.0%",)
    assert not result.met


def test_a_one_sided_rule_takes_more_above_than_below() -> None:
    memory = Rule(name="memory", below=0.0, above=0.05)
    assert [row(ours, memory).within for ours in (1.99, 2.0, 2.09, 2.11)] == [False, True, True, False]


def test_a_mean_can_miss_where_every_row_is_met() -> None:
    rule = Rule(name="time", below=0.12, above=0.12, mean=0.05)
    assert table(row(2.2, rule), row(2.0, rule), row(2.0, rule)).met
    missed = table(row(2.2, rule), row(1.8, rule), row(2.0, rule))
    assert all(each.within for each in missed.rows)
    assert missed.misses() == ("mean of time: 6.7%",)
    assert missed.rule_lines()[0].endswith("mean 5% (here: mean 6.7%, worst 10.0% of 3 rows)")


def test_no_answer_is_a_miss_and_null_in_json() -> None:
    result = table(row(2.0), row(math.nan))
    value = json.loads(json.dumps(as_json(result), allow_nan=False))
    assert value["rows"][1] == {"row": "row nan", "paper": 2.0, "ours": None, "error": None, "within": False}
    assert value["worst_error"] is None and value["met"] is False and value["schema"] == 1


def test_figures_that_have_no_relative_error_are_refused() -> None:
    with pytest.raises(SpecError, match="other than 0"):
        Row(name="zero", paper=0.0, ours=1.0, rule=TEN)
    with pytest.raises(SpecError, match="no rows"):
        table()


def test_flexsp_released_coefficients_give_the_known_budgets_and_times() -> None:
    data = load_data(flexsp.FlexspData, "flexsp")
    budgets = [
        flexsp.workload_of(data, model, context).rank_tokens
        for model, context in itertools.product(("7b", "30b"), (192, 384))
    ]
    assert budgets == pytest.approx([5992, 5950, 6028, 5939], abs=1)
    workload = flexsp.workload_of(data, "7b", 384)
    # 64 sequences of 4,096 tokens on 64 devices: 1.47 s on one device each, 3.15 s on all together
    assert workload.cost.group_s(AttentionKind.LOCAL, 1, [4096]) == pytest.approx(1.47, abs=0.005)
    assert workload.cost.group_s(AttentionKind.ULYSSES, 64, [4096] * 64) == pytest.approx(3.15, rel=0.03)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 100), min_size=1, max_size=60), st.integers(50, 100))
def test_best_fit_keeps_every_sequence_and_the_fill(lengths: list[int], fill: int) -> None:
    bins = flexsp.pack_best_fit(lengths, fill, 100)
    assert sorted(itertools.chain(*bins)) == sorted(lengths)
    assert all(sum(sizes) <= fill or len(sizes) == 1 for sizes in bins)
    assert all(sum(one) + sum(other) > fill for one, other in itertools.combinations(bins, 2))


def test_a_static_step_waits_for_the_slowest_group_of_each_round() -> None:
    data = load_data(flexsp.FlexspData, "flexsp")
    workload = flexsp.workload_of(data, "7b", 192)
    lengths = [160_000, 150_000, 140_000]
    group_s = [workload.cost.group_s(AttentionKind.ULYSSES, 32, [size]) for size in lengths]
    assert flexsp.static_s(workload, lengths, 32) == pytest.approx(group_s[0] + group_s[2])
    assert flexsp.static_s(workload, lengths, 8) == math.inf


def test_flexsp_beats_batchada_beats_deepspeed_on_wikipedia() -> None:
    data = load_data(flexsp.FlexspData, "flexsp")
    speed = flexsp.bar_speed(data, data.figure4[0], num_batches=8, num_planned=1)
    assert 1.0 < speed.batchada < speed.flexsp
    assert speed.num_unpacked == 0


def test_memo_is_met_without_a_constant_of_its_own() -> None:
    result = memo.reproduce_memo()
    assert result.met, result.misses()
    mfu = result.rows[0]
    assert 0.45 < mfu.ours < 0.55 and mfu.ours != mfu.paper


@settings(max_examples=50, deadline=None)
@given(st.integers(3, 100), st.integers(1, 16384), st.integers(1, 2**22), st.integers(2**30, 2**42))
def test_memo_host_share_fills_the_host_exactly(
    num_layers: int, hidden_dim: int, num_tokens: int, host_bytes: int
) -> None:
    share = memo.host_share(
        num_layers=num_layers, hidden_dim=hidden_dim, num_tokens=num_tokens, host_bytes=host_bytes
    )
    used = (num_layers - 2) * (4 + 28 * share) * hidden_dim * num_tokens
    assert used == pytest.approx(host_bytes) if share < 1 else used <= host_bytes * 1.000001


def test_b200_predicts_all_measured_rows_within_its_tolerances() -> None:
    result = b200.reproduce_b200()
    assert len(result.rows) == 28
    assert result.met, result.misses()
    assert all(row.ours >= row.paper for row in result.rows if row.rule == b200.MEMORY)


def test_b200_layer_is_the_sum_of_its_products_and_attention_at_their_measured_rates() -> None:
    data = load_data(b200.B200Data, "b200")
    step = data.steps[0]  # neither tensor nor context parallel: no collectives in a layer
    tokens, hidden, ffn, qkv = 4096, 8192, 28672, 10240
    products = tokens * (hidden * qkv + hidden * hidden + hidden * 2 * ffn + ffn * hidden)
    compute_s = 1.05 * 6 * products / 2250e9 / 1000
    assert compute_s / 0.65 < b200.layer_s(data, step) < compute_s / 0.40
    assert data.model.layer_params == products // tokens


def test_b200_a_pipeline_repeats_its_slowest_stage() -> None:
    data = load_data(b200.B200Data, "b200")
    few, more = data.steps[0], data.steps[4]
    assert (few.pipeline, few.microbatches, more.microbatches) == (2, 4, 8)
    stage_s = data.model.num_layers // 2 * b200.layer_s(data, few) + b200.head_s(data, few)
    assert b200.step_s(data, more) - b200.step_s(data, few) == pytest.approx(4 * stage_s)
