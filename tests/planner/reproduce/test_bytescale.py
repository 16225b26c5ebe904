"""ByteScale rebuilt: constants give back the trace, batches the shares, plans are legal and priced as they run."""

import itertools
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.program import compile_rank_program
from planner.plan import StepPlan
from planner.pricing.simulate import step_lengths
from planner.pricing.verify import verify_plan
from planner.reproduce import bytescale
from planner.reproduce.bytescale import BytescaleData
from planner.reproduce.bytescale_stages import best_placing
from planner.reproduce.bytescale_step import (
    BytescaleWorkload,
    balance_plan,
    batches_of,
    hdp_step_s,
    naive_plan,
    static_packs,
    static_step_s,
    workload_of,
)
from planner.reproduce.table import load_data
from tests.plans import step_problem

DATA = load_data(BytescaleData, "bytescale")
SMALL_BATCH = 2**22


def small(model: str, context: int = 256) -> BytescaleWorkload:
    """64 ranks instead of 512."""
    return workload_of(
        model, replace(DATA.models[model], num_ranks=64), DATA.trace, context_tokens=context * 1024,
        capacity_tokens=DATA.capacity_tokens,
    )


def plans_of(workload: BytescaleWorkload, lengths: list[int]) -> list[StepPlan]:
    naive = naive_plan(workload, lengths)
    return [naive, balance_plan(workload, lengths, naive)]


def test_every_bar_of_the_figure_is_there_once() -> None:
    keys = [(bar.model, bar.lengths, bar.context) for bar in DATA.figure17]
    expected = itertools.product(("LLaMA-7B", "Mistral-8x7B"), ("github", "byted"), (256, 512, 1024, 2048))
    assert sorted(keys) == sorted(expected)
    assert all(1 < bar.naive < bar.balance for bar in DATA.figure17)


def test_constants_give_back_the_traced_kernels_and_scale_with_the_layout() -> None:
    trace, llama, mistral = DATA.trace, small("LLaMA-7B").prices, small("Mistral-8x7B").prices
    passes = 1 + trace.backward_over_forward
    attention_s = llama.attention_s_per_pair * 319_488**2 / 2 / 39
    assert attention_s / 32 / passes == pytest.approx(0.110)
    assert llama.hop_s_per_token * 8192 * 255 / 32 / passes == pytest.approx(0.405)
    assert llama.microbatch_s([8192], 1) == pytest.approx(3.0 + 0.5 * 8192**2 * llama.attention_s_per_pair)
    assert mistral.attention_s_per_pair == pytest.approx(llama.attention_s_per_pair / 2)
    assert mistral.linear_s_per_token == pytest.approx(llama.linear_s_per_token * 13 / 7 / 2)


@pytest.mark.parametrize(("name", "share_2m", "share_128k"), [("byted", 0.121, 0.443), ("github", 0.011, 0.162)])
def test_batches_hold_the_published_shares_of_tokens(name: str, share_2m: float, share_128k: float) -> None:
    """As the paper's text and figure 4 have them; of 2M to within one sequence."""
    batches = batches_of(name, 2**21, DATA.batch_tokens, bytescale.NUM_BATCHES)
    assert {sum(batch) for batch in batches} == {DATA.batch_tokens}
    total = len(batches) * DATA.batch_tokens
    sizes = list(itertools.chain(*batches))
    assert sum(size for size in sizes if size == 2**21) / total == pytest.approx(share_2m, abs=2**21 / total)
    floor = 2**17 / 2**0.5  # where the bucket labelled 128K begins
    assert sum(size for size in sizes if size >= floor) / total == pytest.approx(share_128k, abs=0.02)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(["byted", "github"]), st.integers(12, 21), st.integers(1, 3))
def test_batches_are_cut_at_the_context_and_repeat(name: str, log2_context: int, num_batches: int) -> None:
    batches = batches_of(name, 2**log2_context, 2**20, num_batches)
    assert batches == batches_of(name, 2**log2_context, 2**20, num_batches)
    assert [sum(batch) for batch in batches] == [2**20] * num_batches
    assert all(1 <= size <= 2**log2_context for batch in batches for size in batch)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 64), min_size=1, max_size=60))
def test_packs_hold_every_token_in_as_few_packs_as_can_be(lengths: list[int]) -> None:
    packs = static_packs(lengths, 64)
    assert len(packs) == -(-sum(lengths) // 64)
    assert all(0 < sum(pack) <= 64 for pack in packs)
    assert sum(map(sum, packs)) == sum(lengths)


@pytest.mark.parametrize("model", ["LLaMA-7B", "Mistral-8x7B"])
@pytest.mark.parametrize("name", ["byted", "github"])
def test_plans_are_legal_and_their_price_is_the_exact_one(model: str, name: str) -> None:
    """The cost model has no transfers: in rings that memory forms they are always hidden."""
    workload = small(model)
    (lengths,) = batches_of(name, workload.context_tokens, SMALL_BATCH, 1)
    for plan in plans_of(workload, lengths):
        verify_plan(plan, step_problem(lengths, 64, workload.cost, workload.limits))
        sizes = step_lengths(plan)
        for microbatch in plan.microbatches:
            (group,) = microbatch.groups
            exact_s = workload.prices.microbatch_s([sizes[index] for index in group.sequences], group.degree)
            assert microbatch.predicted_s == pytest.approx(exact_s)


@pytest.mark.parametrize("model", ["LLaMA-7B", "Mistral-8x7B"])
def test_balance_beats_naive_and_the_grid(model: str) -> None:
    workload = small(model)
    (lengths,) = batches_of("byted", workload.context_tokens, SMALL_BATCH, 1)
    naive, balance = plans_of(workload, lengths)
    assert hdp_step_s(workload, balance) < hdp_step_s(workload, naive)
    assert hdp_step_s(workload, balance) < static_step_s(workload, lengths)


def test_the_grid_pays_for_its_ring_whatever_it_holds() -> None:
    """Short sequences only: the linear part stays, the transfers double with the context."""
    lengths = [2048] * (SMALL_BATCH // 2048)
    steps_s = [static_step_s(small("LLaMA-7B", context), lengths) - 3.0 for context in (128, 256, 512)]
    rest_s = 3.0 * 8  # of 8 full microbatches a rank
    rings_s = [step_s - rest_s for step_s in steps_s]
    assert rings_s[1] / rings_s[0] == pytest.approx(31 / 15)
    assert rings_s[2] / rings_s[1] == pytest.approx(63 / 31)


def test_pp_balance_moves_microbatches_and_changes_none() -> None:
    workload = small("Mistral-8x7B")
    (lengths,) = batches_of("github", workload.context_tokens, SMALL_BATCH, 1)
    naive, balance = plans_of(workload, lengths)

    def work(plan: StepPlan) -> Counter[tuple[int, tuple[int, ...]]]:
        return Counter((group.degree, group.sequences) for each in plan.microbatches for group in each.groups)

    assert work(naive) == work(balance)


@pytest.mark.parametrize("name", ["byted", "github"])
def test_the_price_of_stages_is_when_the_programs_of_all_ranks_end(name: str) -> None:
    """There is one scheduler: the plans that the reproduction prices, compiled for the runtime and run message by
    message, end when it says. The runtime's plans take backwards to be twice as long as forwards, so here they are."""
    model = replace(DATA.models["Mistral-8x7B"], num_ranks=8)
    workload = workload_of(
        "Mistral-8x7B", model, replace(DATA.trace, backward_over_forward=2.0), context_tokens=2**15,
        capacity_tokens=DATA.capacity_tokens,
    )
    (lengths,) = batches_of(name, workload.context_tokens, 2**18, 1)
    for plan in plans_of(workload, lengths):
        assert len({len(microbatch.ranks) for microbatch in plan.microbatches}) > 1
        end_s = run_programs(staged(plan, model.stages), model.stages)
        assert hdp_step_s(workload, plan) - workload.prices.step_fixed_s == pytest.approx(end_s, rel=1e-12)


def staged(plan: StepPlan, num_stages: int) -> StepPlan:
    """The plan of one stage. The reproduction's prices are those of all stages together."""
    microbatches = [replace(each, predicted_s=each.predicted_s / num_stages) for each in plan.microbatches]
    return replace(plan, num_stages=num_stages, microbatches=tuple(microbatches))


def run_programs(plan: StepPlan, num_stages: int) -> float:
    """When the last rank is done, if each stage of each rank follows its own program: an action begins once all of its
    ranks have come to it and the stage before, or after, has sent what it needs."""
    queues = {}
    for rank, stage in itertools.product(range(plan.num_ranks), range(num_stages)):
        program = compile_rank_program(plan, rank, stage=stage, num_stages=num_stages)
        queues[rank, stage] = [(program.microbatches[each.place].index, each.backward) for each in program.actions]
    free_s = dict.fromkeys(queues, 0.0)
    sent_s: dict[tuple[int, int, bool], float] = {}
    while any(queues.values()):
        num_sent = len(sent_s)
        for stage, queue in ((place[1], queue) for place, queue in queues.items() if queue):
            index, backward = queue[0]
            microbatch = plan.microbatches[index]
            places = [(rank, stage) for rank in microbatch.ranks]
            sender = (index, stage + 1 if backward else stage - 1, backward)
            waits = 0 <= sender[1] < num_stages and sender not in sent_s
            if waits or any(queues[place][:1] != [(index, backward)] for place in places):
                continue
            start_s = max(sent_s.get(sender, 0.0), *(free_s[place] for place in places))
            stop_s = start_s + microbatch.predicted_s * (2 / 3 if backward else 1 / 3)
            sent_s[index, stage, backward] = stop_s
            for place in places:
                queues[place].pop(0)
                free_s[place] = stop_s
        assert len(sent_s) > num_sent, f"no rank can go on: {queues}"
    return max(free_s.values())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0.1, 5.0), st.integers(1, 8)), min_size=1, max_size=40), st.integers(1, 4))
def test_a_placing_ends_when_its_pipelines_do(items: list[tuple[float, int]], num_stages: int) -> None:
    items.sort(reverse=True)
    stage_s, degrees = [item[0] for item in items], [item[1] for item in items]
    placing = best_placing(stage_s, degrees, num_ranks=8, num_stages=num_stages)
    alone_s = [0.0] * 8
    for each_s, degree, first in zip(stage_s, degrees, placing.first_ranks, strict=True):
        assert 0 <= first <= 8 - degree
        for rank in range(first, first + degree):
            alone_s[rank] += each_s * (1 if alone_s[rank] else num_stages)
    assert placing.finish_s >= max(alone_s) * (1 - 1e-9)
    assert placing.finish_s >= num_stages * stage_s[0] * (1 - 1e-9)


def test_rows_of_a_bar_are_its_throughputs() -> None:
    bar = DATA.figure17[4]
    data = replace(
        DATA, batch_tokens=SMALL_BATCH, models={bar.model: replace(DATA.models[bar.model], num_ranks=64)}
    )
    result = bytescale.bar_result(data, bar, num_batches=2)
    assert result == bytescale.bar_result(data, bar, num_batches=2)
    naive, balance, throughput = bytescale.bar_rows(data, bar, result)
    assert (naive.paper, balance.paper, throughput.paper) == (bar.naive, bar.balance, bar.balance_k_tok_s)
    assert throughput.ours * 1e3 == pytest.approx(balance.ours * result.baseline.tokens_per_s)
    assert 0 < naive.ours < balance.ours
    assert result.naive_busiest_over_idlest > 1


def test_a_sequence_of_312k_takes_the_published_ranks() -> None:
    workload = bytescale.bar_workload(DATA, next(bar for bar in DATA.figure17 if bar.name == bytescale.CASE_BAR))
    plan = naive_plan(workload, [312 * 1024])
    assert [len(microbatch.ranks) for microbatch in plan.microbatches] == [DATA.case.ranks_of_312k]


def test_offload_rows_leave_out_what_they_are_fitted_on() -> None:
    rows = {row.name: row for row in bytescale.offload_rows(DATA.offload)}
    assert sorted(rows) == [
        "offload 0.5: GB", "offload 0.5: s", "offload 0.6: GB", "offload 0.8: GB", "offload 0.8: s",
    ]
    slower = replace(DATA.offload, steps=(*DATA.offload.steps[:-1], replace(DATA.offload.steps[-1], step_s=8.0)))
    changed = {row.name: row for row in bytescale.offload_rows(slower)}
    assert changed["offload 0.8: s"].ours > rows["offload 0.8: s"].ours
    assert changed["offload 0.5: s"].ours == DATA.offload.none_s  # below the knee, copies are free
