"""The step benchmark: lengths, arithmetic and report on made-up results, then one small real run."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.lengths import skewed_batches
from benchmarks.peers.report import goal_lines
from benchmarks.step import main
from benchmarks.step_report import RunConditions, markdown
from benchmarks.step_results import (
    BATCH_BEST,
    FLEXSP,
    MeasuredPeerStep,
    MeasuredStep,
    PeerCheck,
    PeerMisfit,
    StepRun,
    StepSettings,
    best_peer,
    best_static,
    loss_spread,
    peer_speedups,
    planned_errors,
    repeat_differences,
    speedups,
    summarise,
)
from benchmarks.step_worker import measure_rank, turn_order
from planner.codec import from_plain
from planner.cost.fits import Provenance
from tests.ranks import RankPool
from tests.trainer.few_sweeps import few_sweeps

SETTINGS = StepSettings(
    num_ranks=4, num_batches=2, tokens_per_batch=300, max_length=200, capacity_tokens=50, attention="ulysses",
    model="tiny", seed=3,
)


def step(batch, strategy, num_tokens, predicted_s, measured_s, loss=5.0, work=""):
    return MeasuredStep(
        batch=batch, strategy=strategy, num_tokens=num_tokens, predicted_s=predicted_s, measured_s=measured_s,
        plan_s=0.004, gap=0.1, status="feasible", winner="flexsp", work=work or strategy, loss=loss,
    )


RUN = StepRun(
    settings=SETTINGS,
    batches=((200, 50, 50), (100,)),
    budget_bytes=2**30,
    cost_origin=Provenance(source="measured", cluster="here", model="tiny"),
    steps=(
        # static 2 wins the median batch, static 4 the whole run
        step(0, FLEXSP, 300, 2.0, 2.0), step(0, "static 2", 300, 4.0, 5.0), step(0, "static 4", 300, 3.0, 4.0),
        step(1, "static 4", 100, 1.0, 2.0), step(1, FLEXSP, 100, 1.5, 1.0), step(1, "static 2", 100, 1.1, 1.1),
    ),
    misfits=(("static 1", 1),),
    num_threads=1,
    load_before=0.1,
    load_after=3.9,
)


def peer_step(batch, peer, num_tokens, measured_s, loss=5.0):
    return MeasuredPeerStep(
        batch=batch, peer=peer, num_tokens=num_tokens, num_padding_tokens=num_tokens // 10, num_microbatches=2,
        pack_s=0.001, measured_s=measured_s, loss=loss,
    )


def check(name, *, right):
    return PeerCheck(name=name, loss_error=2e-7, gradient_error=3e-6, gradients_meant_right=right)


WITH_PEERS = dataclasses.replace(
    RUN,
    settings=dataclasses.replace(SETTINGS, strategies=("adaptive",), peers=("verl", "ring-flash-attn")),
    steps=tuple(
        dataclasses.replace(step, strategy="adaptive") if step.strategy == FLEXSP else step for step in RUN.steps
    ),
    # ring wins the second batch, verl the whole run
    peer_steps=(
        peer_step(0, "verl 2", 300, 3.0), peer_step(0, "ring-flash-attn 4", 300, 5.0),
        peer_step(1, "ring-flash-attn 4", 100, 1.2), peer_step(1, "verl 2", 100, 2.0),
    ),
    peer_checks=(check("verl 2", right=True), check("ring-flash-attn 4", right=False)),
    peer_misfits=(PeerMisfit(name="verl 4", reason="heads do not divide"),),
)
CONDITIONS = RunConditions(command="the command", day="2001-02-03", cpu="a processor", num_cores=2, torch_version="2.x")


class TestLengths:
    def test_batches_are_full_long_tailed_and_repeatable(self):
        batches = skewed_batches(num_batches=20, tokens_per_batch=16384, max_length=4096, seed=0)
        assert batches == skewed_batches(num_batches=20, tokens_per_batch=16384, max_length=4096, seed=0)
        assert batches != skewed_batches(num_batches=20, tokens_per_batch=16384, max_length=4096, seed=1)
        lengths = [length for batch in batches for length in batch]
        assert all(12288 < sum(batch) <= 16384 for batch in batches)
        assert min(lengths) >= 1 and max(lengths) == 4096
        assert statistics.fmean(lengths) > 2 * statistics.median(lengths)

    def test_first_draws_do_not_depend_on_the_number_of_batches(self):
        few = skewed_batches(num_batches=2, tokens_per_batch=2048, max_length=512, seed=5)
        assert skewed_batches(num_batches=5, tokens_per_batch=2048, max_length=512, seed=5)[:2] == few


class TestArithmetic:
    def test_summary(self):
        line = summarise(RUN, FLEXSP)
        assert line.tokens_per_s == pytest.approx(400 / 3)
        assert line.median_tokens_per_s == pytest.approx((150 + 100) / 2)
        assert line.absolute_error == pytest.approx(0.25) and line.signed_error == pytest.approx(0.25)
        assert summarise(RUN, "static 2").signed_error == pytest.approx(-0.1)
        assert summarise(RUN, "static 4").absolute_error == pytest.approx((0.25 + 0.5) / 2)

    def test_best_static_is_the_best_over_the_whole_run(self):
        assert best_static(RUN) == "static 4"

    def test_speedups_pair_the_batches(self):
        assert speedups(RUN, FLEXSP, "static 4") == (2.0, 2.0)
        assert speedups(RUN, FLEXSP, "static 2") == pytest.approx((2.5, 1.1))

    def test_repeat_differences_pair_only_the_same_plan_of_the_same_batch(self):
        assert repeat_differences(RUN) == ()
        again = dataclasses.replace(RUN, steps=(
            *RUN.steps, step(0, BATCH_BEST, 300, 3.0, 5.0, work="static 4"), step(1, BATCH_BEST, 100, 1.0, 9.0),
        ))
        assert repeat_differences(again) == (0.25,)

    def test_loss_spread(self):
        assert loss_spread(RUN) == 0
        other = dataclasses.replace(RUN, steps=(*RUN.steps, step(1, BATCH_BEST, 100, 1.0, 1.0, loss=4.0)))
        assert loss_spread(other) == pytest.approx(0.2)


def test_every_strategy_has_every_turn_and_different_predecessors():
    orders = [turn_order(["a", "b", "c"], number) for number in range(6)]
    assert {order[0] for order in orders} == {order[-1] for order in orders} == set("abc")
    follows = {pair for order in orders for pair in zip(order, order[1:], strict=False)}
    assert follows == {(x, y) for x in "abc" for y in "abc" if x != y}


class TestPeers:
    def test_arithmetic(self):
        assert best_peer(WITH_PEERS) == "verl 2"
        assert peer_speedups(WITH_PEERS, "adaptive", "verl 2") == (1.5, 2.0)
        assert peer_speedups(WITH_PEERS, "adaptive") == pytest.approx((1.5, 1.2))

    def test_peers_must_reach_the_same_loss(self):
        other = dataclasses.replace(WITH_PEERS, peer_steps=(peer_step(0, "verl 2", 300, 3.0, loss=4.5),))
        assert loss_spread(WITH_PEERS) == 0 and loss_spread(other) == pytest.approx(0.1)

    def test_errors_count_a_plan_that_two_strategies_chose_once(self):
        run = dataclasses.replace(RUN, settings=dataclasses.replace(SETTINGS, strategies=(FLEXSP, "adaptive")), steps=(
            step(0, FLEXSP, 300, 2.0, 2.0, work="a"), step(0, "adaptive", 300, 2.0, 3.0, work="a"),
            step(1, FLEXSP, 100, 1.0, 2.0, work="a"), step(0, "static 2", 300, 9.0, 1.0),
        ))
        assert planned_errors(run) == pytest.approx((2.0 / 2.5 - 1, -0.5))

    def test_report_rows_and_goal(self):
        text = markdown(WITH_PEERS, dataclasses.replace(CONDITIONS, peer_versions=("verl 0.9",)))
        # 400 tokens in 5 s against static 4's 400 in 6 s
        assert "| verl 2 (best peer) | 80 | 1.20x | 2.500 | 2.0 | 10.0% | 2e-07 | 3e-06 |" in text
        assert "| ring-flash-attn 4 | 65 | 0.97x | 3.100 | 2.0 | 10.0% | 2e-07 | known to be wrong" in text
        assert "| verl 4 | does not fit: heads do not divide |" in text
        assert "adaptive against the best peer, verl 2: 1.67x over the run; batch by batch median 1.75x" in text
        assert "goal: adaptive at 1.5x the tokens/s of the best peer: 1.67x of verl 2: met" in text
        assert "prediction of 2 different plans of adaptive: mean absolute error 25.0%" in text
        assert "goal: step time predicted to 10%: 25.0% over 2 plans: not judged, it needs 20" in text
        assert "verl's Ulysses exchange" in text and "(verl 0.9)" in text

    def test_goal_not_met(self):
        slow = dataclasses.replace(WITH_PEERS, steps=tuple(
            dataclasses.replace(step, measured_s=1.2 * step.measured_s) for step in WITH_PEERS.steps
        ))
        text = markdown(slow, CONDITIONS)
        assert "goal: adaptive at 1.5x the tokens/s of the best peer: 1.39x of verl 2: NOT met" in text

    def test_predictions_are_judged_over_twenty_plans(self):
        for error, verdict in ((0.09, "9.0% over 20 plans: met"), (0.11, "11.0% over 20 plans: NOT met")):
            steps = tuple(step(n, FLEXSP, 300, 1 + error, 1.0, work=str(n)) for n in range(20))
            (line,) = goal_lines(dataclasses.replace(RUN, steps=steps))
            assert line == f"goal: step time predicted to 10%: {verdict}"

    def test_report_without_peers_does_not_mention_them(self):
        assert "peer" not in markdown(RUN, CONDITIONS)


class TestReport:
    def test_table(self):
        cells = {
            line.split(" | ")[0].strip("| "): [cell.strip(" |") for cell in line.split(" | ")[1:]]
            for line in markdown(RUN, CONDITIONS).splitlines()
            if line.startswith(("| flexsp", "| static"))
        }
        assert cells[FLEXSP] == ["133", "125", "2.00x", "1.750", "1.500", "25.0% (+25.0%)", "4.0", "10.0%"]
        assert cells["static 4 (best static)"][2] == "1.00x"
        assert cells["static 1"][0] == "does not fit: the longest sequence of 1 of 2 batches"

    def test_says_how_it_was_made(self):
        text = markdown(RUN, CONDITIONS)
        for fact in (
            "the command", "2001-02-03", "a processor, 2 cores", "4 ranks share 2 cores", "device budget 1 GiB",
            "median 2.00x, lowest 2.00x, highest 2.00x", "2 of 4 sequences",
            "over all 6 measured steps: mean absolute error 24.2%, worst 50.0%",
        ):
            assert fact in text, fact


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--ranks 1", "--ranks 1: at least 2"),
        ("--max-length 4096 --tokens-per-step 4000", "less than one sequence"),
        ("--capacity-tokens 100", "at least 1024"),
        ("--model nothing", "unknown model"),
        ("--out no/such/folder.md", "does not exist"),
    ],
)
def test_bad_arguments(arguments, said, capsys):
    assert main(arguments.split()) == 2
    assert said in capsys.readouterr().err


def measure(rank, world_size, init_method, settings, folder):
    with few_sweeps():
        measure_rank(settings, rank, Path(folder))


def test_real_run(tmp_path):
    pool = RankPool(4)
    try:
        pool.run(measure, SETTINGS, str(tmp_path))
    finally:
        pool.close()
    run = from_plain(StepRun, json.loads((tmp_path / "result.json").read_text()), where="result")
    assert run.batches == skewed_batches(num_batches=2, tokens_per_batch=300, max_length=200, seed=3)
    assert {FLEXSP, BATCH_BEST, "static 4"} <= set(run.strategies())
    # every strategy ran every batch, and those that could not are named
    assert Counter(step.strategy for step in run.steps) == dict.fromkeys(run.strategies(), 2)
    assert {name for name, _ in run.misfits} == {"static 1", "static 2"} - set(run.strategies())
    assert [step.num_tokens for step in run.of(FLEXSP)] == [sum(batch) for batch in run.batches]
    assert all(step.measured_s > 0 and step.predicted_s > 0 for step in run.steps)
    assert f"up to {SETTINGS.tokens_per_batch}" in markdown(run, CONDITIONS)
