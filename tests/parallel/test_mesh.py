"""The grid of ranks: every combination of coordinates is one rank; what does not fit is refused in one line."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.mesh import GridShape
from planner.errors import SpecError

SIZE = st.integers(1, 4)


@given(num_stages=SIZE, data_size=SIZE, tensor_size=SIZE)
def test_coordinates_are_ranks(num_stages, data_size, tensor_size):
    world_size = num_stages * data_size * tensor_size
    shape = GridShape.of(world_size, tensor_size=tensor_size, num_stages=num_stages)
    ranks = [
        shape.rank(stage=stage, data_rank=data_rank, tensor_rank=tensor_rank)
        for stage in range(num_stages) for data_rank in range(data_size) for tensor_rank in range(tensor_size)
    ]
    assert ranks == list(range(world_size))
    assert (shape.world_size, shape.data_size, shape.shard_size) == (world_size, data_size, data_size)


@pytest.mark.parametrize(
    ("sizes", "problem"),
    [
        ({"tensor_size": 3}, "--tensor-parallel 3 x --pipeline-parallel 1 does not divide the world size 8"),
        ({"tensor_size": 2, "num_stages": 3}, "--tensor-parallel 2 x --pipeline-parallel 3 does not divide"),
        ({"tensor_size": 1, "shard_size": 3}, "--parallel.shard-ranks 3 does not divide the 8 data ranks"),
    ],
)
def test_what_does_not_fit_is_refused(sizes, problem):
    with pytest.raises(SpecError, match=re.escape(problem)):
        GridShape.of(8, **sizes)
