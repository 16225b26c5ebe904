"""The pure part of the calibration: memory from peaks, and where measured groups lie."""

from __future__ import annotations

import pytest

from planner.plan import AttentionKind
from trainer.calibration import MeasuredShape, bytes_per_token, design_plan, length_design, rank_share


def test_bytes_per_token_ignores_what_small_sets_show_beside_their_tokens():
    peaks = [(128, 1_000 + 12_800 + 50_000), (1024, 1_000 + 102_400), (2048, 1_000 + 204_800 + 2_048)]
    assert bytes_per_token(peaks, 1_000) == pytest.approx(101)


def test_bytes_per_token_is_never_free():
    assert bytes_per_token([(100, 500)], 1_000) == 1.0


@pytest.mark.parametrize("num_ranks", [4, 8, 12])
@pytest.mark.parametrize("node_size", [None, 4, 5])
def test_groups_are_measured_where_planners_put_them(num_ranks, node_size):
    """A group that fits in a node and is measured across two would be priced at the links between them."""
    size = num_ranks if node_size is None else node_size
    for degree in range(1, num_ranks + 1):
        plan = design_plan(num_ranks, MeasuredShape(AttentionKind.RING, degree), (64, 8), node_size=node_size)
        ranks = [microbatch.ranks for microbatch in plan.microbatches]
        assert ranks and len({rank for group in ranks for rank in group}) == degree * len(ranks)
        for group in ranks:
            assert group == tuple(range(group[0], group[0] + degree)) and group[-1] < num_ranks
            if degree <= size:
                assert group[0] // size == group[-1] // size
            else:
                assert group[0] % size == 0
        if node_size is None:
            assert len(ranks) == num_ranks // degree


@pytest.mark.parametrize("degree", [1, 2, 3, 5])
def test_ranks_that_are_left_over_work_as_long_as_the_group(degree):
    for lengths in length_design(2048, degree):
        share = rank_share(lengths, degree)
        assert sum(share) >= sum(lengths) / degree
        work, wanted = sum(size**2 for size in share), sum(size**2 for size in lengths) / degree
        assert wanted * 0.999 <= work <= 1.1 * wanted
        plan = design_plan(7, MeasuredShape(AttentionKind.RING, degree), lengths, keep_busy=True)
        assert sorted(rank for each in plan.microbatches for rank in each.ranks) == list(range(7))
