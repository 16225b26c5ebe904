"""The chunk benchmarks: verdicts and ratios on made-up results, the search for the longest sequence, one small step."""

from __future__ import annotations

import contextlib
import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.chunked import WAYS, Case, Rounds, report
from benchmarks.chunked_tier import TierStep, longest_fit, longest_table, main, sizes_table
from benchmarks.memory_run import Measured
from planner.units import MIB
from tests.ranks import RankPool

CASE = Case(num_tokens=1024, num_chunks=8, num_layers=1, hidden_dim=128)


def turn(slowness=1.0, spaco_s=1.0, over=1.05):
    """One turn of all ways on a machine that is so much slower."""
    sizes = {"weight_bytes": MIB, "stored_bytes": MIB, "chunk_bytes": MIB}
    found = {}
    for way in WAYS:
        seconds = slowness * (spaco_s if way.startswith("spaco") else 3.0)
        chunked = way.startswith(("seco", "spaco"))
        found[way] = {"seconds": seconds, "cpu_s": seconds, "peak_bytes": 3 * over * MIB, **(sizes if chunked else {})}
    return found


@pytest.mark.parametrize(
    ("turns", "met"),
    [
        ([turn()], True),
        ([turn(spaco_s=1.3)], False),
        ([turn(over=1.11)], False),
        ([turn(), turn(over=1.11)], False),  # the highest peak counts
        ([turn(), turn(slowness=5.0), turn(spaco_s=9.0)], True),  # one bad turn of three does not
    ],
)
def test_goals_of_the_chunk_benchmark(turns, met):
    text, verdict = report(CASE, Rounds(tuple(turns)), {"bernoulli": (0.0, 1.0)})
    assert verdict is met and ("NOT met" not in text) is met


def test_a_ratio_is_the_median_within_turns():
    rounds = Rounds((turn(), turn(slowness=10.0, spaco_s=1.5), turn(slowness=3.0)))
    assert rounds.ratio("seco", "spaco 1/8", "seconds") == 3.0
    assert rounds.typical("seco")["seconds"] == 9.0


@given(st.integers(1, 5000), st.integers(1, 200), st.integers(200, 4000))
def test_the_longest_that_fits_is_found_to_a_sixteenth(limit, start, most):
    tried = []

    def fits(length):
        tried.append(length)
        return Measured(way="seco", length=length, fits=length <= limit)

    found = longest_fit(fits, start, most)
    assert max(tried) <= most
    if limit < start:
        assert found is None
    else:
        wanted = min(limit, most)
        assert found.length <= wanted <= found.length + max(1, found.length // 16)


def test_the_longest_table_says_what_is_only_a_lower_bound():
    found = {"recompute": Measured(way="recompute", length=100, step_s=1.0), "seco": None,
             "seco disk": Measured(way="seco disk", length=800, step_s=4.0)}
    text = "\n".join(longest_table(found, 800))
    assert "at least 800 | 8.0" in text and "| seco | none |" in text and "at least 100" not in text


def step(seconds, peak_bytes=100, moved_bytes=0):
    return TierStep(
        seconds=seconds, cpu_s=seconds, peak_bytes=peak_bytes, ideal_bytes=100, moved_bytes=moved_bytes,
        hidden_share=0.5,
    )


@pytest.mark.parametrize(("peak_bytes", "met"), [(109, True), (111, False)])
def test_sizes_compare_within_turns(peak_bytes, met):
    turns = [{"seco": step(s), "seco disk": step(1.5 * s, peak_bytes, 7)} for s in (1.0, 10.0, 2.0)]
    lines, verdict = sizes_table({256: turns})
    text = "\n".join(lines)
    assert verdict is met and "| 256 | seco disk | 3 s | 1.50 | 1.50 |" in text and "50%" in text


def work_alone(rank, world_size, init_method, arguments):
    """The last line that the benchmark's own process would print."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        assert main(arguments) == 0
    return shown.getvalue().splitlines()[-1]


def test_one_step_with_the_tier_moves_all_rows_out_and_back():
    workload = {"num_layers": 3, "dim": 64, "repeats": 1, "chunk_tokens": 16}
    told = {"job": "step", "way": "seco disk", "length": 64, "workload": workload}
    pool = RankPool(1)  # a process of its own, but with torch already loaded
    try:
        (answer,) = pool.run(work_alone, ["--worker", json.dumps(told)])
    finally:
        pool.close()
    found = TierStep(**json.loads(answer))
    rows_bytes = 3 * 16 * 2 * 64 * 4  # of one chunk: layers, tokens, K and V, one head of 64, fp32
    assert found.moved_bytes >= 3 * (2 * rows_bytes + rows_bytes)  # three chunks' K/V out and back, and dK/dV out
    assert 0 <= found.hidden_share <= 1 and found.seconds > 0 and found.ideal_bytes > 0
