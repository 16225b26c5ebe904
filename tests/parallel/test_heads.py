"""Head layouts for any degree, KV heads fewer than ranks included: pure integers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.heads import HeadLayout
from planner.errors import PlanError

layouts = st.tuples(st.integers(1, 8), st.integers(1, 8), st.integers(1, 64)).map(
    lambda t: HeadLayout(t[0] * t[1], t[0], min(t[2], t[0] * t[1]))
)


@given(layouts)
def test_members_share_the_query_heads_out_exactly_and_evenly(layout):
    ranges = [layout.query_heads(index) for index in range(layout.degree)]
    assert [head for start, stop in ranges for head in range(start, stop)] == list(range(layout.num_query_heads))
    sizes = [stop - start for start, stop in ranges]
    assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 1


@given(layouts)
def test_kv_heads_are_just_those_that_the_query_heads_read(layout):
    ratio = layout.num_query_heads // layout.num_kv_heads
    for index in range(layout.degree):
        queries = range(*layout.query_heads(index))
        assert set(range(*layout.kv_heads(index))) == {head // ratio for head in queries}


@given(layouts)
def test_kernel_rule_or_explicit_map_reads_the_right_kv_head(layout):
    ratio = layout.num_query_heads // layout.num_kv_heads
    for index in range(layout.degree):
        (q0, q1), (k0, k1) = layout.query_heads(index), layout.kv_heads(index)
        wanted = [head // ratio - k0 for head in range(q0, q1)]
        explicit = layout.irregular_kv_map(index)
        if explicit is None:
            assert wanted == [head // ((q1 - q0) // (k1 - k0)) for head in range(q1 - q0)]
        else:
            assert list(explicit) == wanted


@pytest.mark.parametrize(("query", "kv", "degree"), [(4, 2, 5), (4, 3, 2), (4, 4, 0)])
def test_impossible_layouts_are_refused(query, kv, degree):
    with pytest.raises(PlanError, match="cannot split"):
        HeadLayout(query, kv, degree)
